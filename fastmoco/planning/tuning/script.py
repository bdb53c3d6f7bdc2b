"""A launch script with given settings: what it contains, and how it is written.

It has no path of the machine that it was made on: the caller gives images and folder as options.
"""

from __future__ import annotations

import os
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastmoco.planning.tuning.measure import LAUNCH_VARIABLES
from fastmoco.planning.tuning.settings import Settings
from fastmoco_pipelines.files.whole import write_file

PRIVATE = (
    "data.shards",
    "data.images",
    "data.cache_dir",
    "knn.train_shards",
    "knn.test_shards",
    "knn.images",
    "accuracy.test_shards",
    "model.init",
)
"""Fields with paths or addresses: a script leaves them to its caller, comments show a word in
capitals."""
UNTRAINED = ("data.synthetic",)
"""Fields of a measurement that a run must not have."""
REASONS = {
    "MALLOC_MMAP_MAX_": "malloc keeps the memory that a step has freed for the next one.",
    "GLIBC_TUNABLES": "malloc asks the system for pages of 2 MiB.",
    "MALLOC_ARENA_MAX": "Fewer heaps of malloc for all threads.",
    "LD_PRELOAD": "Another malloc.",
    "PYTORCH_CUDA_ALLOC_CONF": "How torch splits and keeps blocks of the GPU's memory.",
    "GOMP_SPINCOUNT": "How long threads of OpenMP spin while they wait.",
    "OMP_PROC_BIND": "Each thread of OpenMP stays on a core.",
}
"""Comments of variables; further ones of the same setting follow without a comment."""
SETTINGS = "settings.sh"
"""The file beside launch scripts with the settings that they share."""
SEARCHED = """\
absolute() {
    local part parts kept=""
    IFS=: read -ra parts <<<"$1"
    for part in "${parts[@]}"; do
        # A folder that somebody has named stays, e.g. `src`.
        [[ -z $part || $part == /* || -z $2 || $part -ef . ]] || part=$2/$part
        [[ $part != /* ]] || kept+=":$part"
    done
    echo "${kept#:}"
}
PATH=$(absolute "$PATH" "")
PATH=${PATH:-/usr/bin:/bin}  # an empty one is the current folder again
[[ -z ${PYTHONPATH:-} ]] || PYTHONPATH=$(absolute "$PYTHONPATH" "$PWD")
"""
"""Its lines about where programs and modules are looked for."""
WIDTH = 100
CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), 127)}
"""Control characters as bash writes them."""


@dataclass(frozen=True, kw_only=True)
class Script:
    """The content of a launch script."""

    recipe: str
    """Name of the recipe, or path of the config file."""
    overrides: Mapping[str, Sequence[str]]
    """Options that the user has typed, by dotted name, each with its words: part of what is
    trained."""
    settings: Settings
    command: Sequence[str]
    """The words that made it, after `fastmoco`."""
    name: str
    """Of the file, as the comment shows it."""
    about: Sequence[str]
    """Comment lines: how the settings were found."""
    made: str
    """Date and commit."""
    processes: int = 1
    """Processes of the run."""
    on_gpu: bool = False
    beside_settings: bool = True
    """Whether `settings.sh` is in the same folder; else its variables are written out."""

    def text(self) -> str:
        """The whole file."""
        lines = [
            "#!/bin/bash",
            *_comment(f"{self.recipe} with settings that change only its speed:"),
            f"#     {_one_line([self.name])} --data.shards SHARDS --out FOLDER [overrides]",
            "#",
            *(line for text in self.about for line in _comment(text)),
            "#",
            *_comment(f"Made {self.made} by:"),
            f"#     {_one_line(['fastmoco', *self.command])}",
            "set -euo pipefail",
            "",
        ]
        lines += self._variables()
        lines += self._shared()
        if self.on_gpu and self.processes == 1:
            lines += [
                "# The first GPU by default; a second run on it would share its memory.",
                'export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"',
                "",
            ]
        lines += [
            "# exec, so that signals to this script reach the run. Options of the caller come last",
            "# and win.",
            self._exec(),
        ]
        return "\n".join(lines) + "\n"

    def _variables(self) -> list[str]:
        """The variables of the settings."""
        lines: list[str] = []
        for name, value in self.settings.variables:
            lines += _comment(REASONS[name]) if name in REASONS else []
            lines.append(_export(name, value))
        return [*lines, ""] if lines else []

    def _shared(self) -> list[str]:
        """What all launch scripts set."""
        if self.beside_settings:
            return [
                "here=${BASH_SOURCE[0]}",
                "[[ $here == */* ]] || here=./$here",
                "# shellcheck source-path=SCRIPTDIR source=settings.sh",
                f'source "${{here%/*}}/{SETTINGS}"',
                "",
            ]
        own = dict(self.settings.variables)
        lines = ["# As launch/settings.sh of fastmoco sets them; it has the reasons."]
        lines += SEARCHED.splitlines()
        lines += [_export(*pair) for pair in LAUNCH_VARIABLES.items() if pair[0] not in own]
        lines += ["# The python in which fastmoco is installed.", 'PYTHON="${PYTHON:-python}"', ""]
        return lines

    def _exec(self) -> str:
        """The command of the run."""
        start = " ".join(["exec", *map(shlex.quote, self.settings.prefix)])
        parts = [f'{start} "$PYTHON" -m fastmoco train {shlex.quote(self.recipe)}']
        hidden = (*PRIVATE, *UNTRAINED)
        parts += [shlex.join(words) for name, words in self.overrides.items() if name not in hidden]
        parts += [shlex.join(words) for words in self.settings.words()]
        parts += [f"--gpus {self.processes}"] if self.processes > 1 else []
        parts += ['"$@"']
        return " \\\n    ".join(parts)


def without_paths(name: str, words: Sequence[str]) -> Sequence[str]:
    """The words of an option as a comment shows them."""
    return (words[0], name.rpartition(".")[2].upper()) if name in PRIVATE else words


def check_place(path: Path, *, force: bool) -> None:
    """Refuse a script that could not be written, before anything is measured.

    Raises:
        ValueError: naming the file and the cure.
    """
    if path.is_dir():
        raise ValueError(f"out={str(path)!r}: is a folder; give a file, e.g. launch/NAME.sh")
    if not path.parent.is_dir():
        raise ValueError(f"out={str(path)!r}: there is no folder {str(path.parent)!r}; make it")
    if path.exists() and not force:
        raise ValueError(f"out={str(path)!r}: exists already; --force replaces it")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"out={str(path)!r}: its folder cannot be written; choose another one")


def write(path: Path, text: str) -> None:
    """Write a script whole, with the permission to run it."""
    write_file(path, text.encode(), mode=0o777)


def _export(name: str, value: str) -> str:
    """A variable that keeps its value where it is set already."""
    return f'export {name}="${{{name}:-{value}}}"'


def _one_line(words: Sequence[str]) -> str:
    """A command in one line of a comment, which a line break in a word would end."""
    return " ".join(
        shlex.quote(word) if word.isprintable() else f"$'{_escaped(word)}'" for word in words
    )


def _escaped(word: str) -> str:
    """A word as bash reads it between `$'` and `'`."""
    return word.replace("\\", "\\\\").replace("'", "\\'").translate(CONTROLS)


def _comment(text: str) -> list[str]:
    """A text as comment lines; spaces before it stay."""
    indent = text[: len(text) - len(text.lstrip())]
    return textwrap.wrap(
        text.strip(),
        WIDTH - 2,
        initial_indent=f"# {indent}",
        subsequent_indent=f"# {indent}",
        break_on_hyphens=False,
        break_long_words=False,
    )
