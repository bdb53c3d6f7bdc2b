"""The words of a command line, before they are parsed: what a shell has done to them, or has not.

* A pattern without quotes reaches a command as many words: they become one pattern again.
* `~` reaches it as it is in quotes and after `=`: it becomes the home folder.
* `$NAME` reaches it as it is in single quotes: refused, or a folder of this name would be made.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from itertools import takewhile

from fastmoco_pipelines.files.whole import at_home
from fastmoco_pipelines.sets.folder_sets import pattern_of
from fastmoco_pipelines.text import counted, redact, shown_word, variable_hint

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_OPTION = re.compile(r"(--?[A-Za-z][\w.-]*=)(.*)", re.DOTALL)
_LONGEST_NAME = 200
"""Characters of an option's name, more than twice as many as the longest has."""
_BESIDE = re.compile(
    r".*\.tar\.index(\.json)?|manifest\.json|quarantine.*\.jsonl|check-progress.*\.jsonl"
)
"""Files that are beside shards, and that `data/*` names too."""


def prepare_streams() -> None:
    """Let standard output and standard error print every text: what their encoding lacks appears
    as an escape, and does not end the command."""
    for stream in (sys.stdout, sys.stderr):
        if (change := getattr(stream, "reconfigure", None)) is not None:
            change(errors="backslashreplace")


def prepare_words(words: Sequence[str]) -> list[str]:
    """The words of a command as they were meant.

    Args:
        words: after the name of the program.

    Raises:
        ValueError: for a variable that the shell has not replaced, the home folder of a user who
            does not exist, words of which some are shards and others are not, and an option's name
            that is too long to look for near ones.
    """
    for word in words:
        name = word.partition("=")[0]
        if word.startswith("--") and len(name) > _LONGEST_NAME:
            raise ValueError(
                f"{shown_word(name)[:40]}...: is no option: a name has no {len(name):,} characters"
            )
    meant = _join_shards([_typed(word) for word in words])
    if len(meant) > 2 and meant[0] == "data":
        _require_places(meant[1], list(takewhile(lambda word: word[:1] != "-", meant[2:])))
    return meant


def _require_places(verb: str, places: Sequence[str]) -> None:
    """Refuse what a shell has made of `photos/*`, before a parser lists every name."""
    if "" in places:
        raise ValueError(
            f"data {verb}: an empty name: a variable of the shell may be unset; . is this folder"
        )
    folder = shlex.quote(os.path.dirname(places[0]) or ".") if places else ""
    if verb == "pack" and len(places) > 2:
        raise ValueError(
            f"{places[0]!r}, {places[1]!r}, ...: data pack takes one folder of images and one for "
            f"the shards, not {len(places)} names: give the folder itself, e.g. fastmoco data pack "
            f"{folder} {shlex.quote(places[-1])}"
        )
    if verb in ("check", "index", "stats", "views") and len(places) > 1:
        raise ValueError(
            f"{places[0]!r}, {places[1]!r}, ...: data {verb} takes one pattern, not {len(places)} "
            "names: give a folder of shards, or a pattern in quotes, e.g. 'data/train-*.tar'"
        )


def _typed(word: str) -> str:
    """A word with `~` at its beginning, or after the `=` of an option, replaced."""
    option, value = match.groups() if (match := _OPTION.fullmatch(word)) else ("", word)
    return option + typed_path(value)


def typed_path(value: str) -> str:
    """A value that may be a path, with `~` at its beginning replaced; URLs are as they were.

    Raises:
        ValueError: for a variable that no shell has replaced, and the home folder of nobody.
    """
    if _URL.match(value):
        return value
    if value.startswith("~"):
        value = at_home(value)
    _refuse_variable(value)
    return value


def _refuse_variable(path: str) -> None:
    """Refuse `$NAME/...` unless there is something of this name."""
    parts = path.split("/")
    for number, part in enumerate(parts):
        hint = variable_hint(part)
        if hint and not os.path.lexists("/".join(parts[: number + 1])):
            raise ValueError(f"{path!r}: there is nothing of this name{hint}")


def _join_shards(words: Sequence[str]) -> list[str]:
    """The words with each run of several shards as one pattern."""
    joined: list[str] = []
    files = ("--out",) if "index" in words[:2] else ("--out", "--json")
    start = 0
    while start < len(words):
        end = start
        while end < len(words) and (_is_shard(words[end]) or _is_beside(words[end])):
            end += 1
        if joined and joined[-1] in files and start < end and _is_beside(words[start]):
            end = start  # the file that an option writes
        run = words[start:end]
        tars = [word for word in run if _is_shard(word)]
        if len(run) < 2 or not tars:
            joined.append(words[start])
            start += 1
            continue
        _require_end(run, words[end] if end < len(words) else "")
        if joined and not (len(joined) > 1 and joined[-2] in files):
            _require_end(run, joined[-1])
        joined.append(tars[0] if len(tars) == 1 else _one_pattern(tars))
        start = end
    return joined


def _is_shard(word: str) -> bool:
    if _URL.match(word):
        return re.split(r"[?#]", word, maxsplit=1)[0].endswith(".tar")
    return word.endswith(".tar") and os.path.isfile(word)


def _is_beside(word: str) -> bool:
    return _BESIDE.fullmatch(os.path.basename(word)) is not None and os.path.isfile(word)


def _one_pattern(tars: Sequence[str]) -> str:
    urls = [bool(_URL.match(tar)) for tar in tars]
    if not any(urls):
        return pattern_of(tars)
    if not all(urls) or any(re.search(r"[{},]", tar) for tar in tars):
        raise ValueError(
            f"{redact(tars[0])!r} and {counted(len(tars) - 1, 'further shard')}: cannot be one "
            "pattern: give one, in quotes"
        )
    return "{" + ",".join(tars) + "}"


def _require_end(run: Sequence[str], neighbour: str) -> None:
    """Refuse a further file of the same folder beside a run of shards: it is no shard, and would be
    taken for another argument."""
    folder = os.path.dirname(run[0])
    beside = not neighbour.startswith("-") and os.path.dirname(neighbour) == folder
    if beside and os.path.isfile(neighbour):
        raise ValueError(
            f"{neighbour!r}: is no shard, but among {counted(len(run) + 1, 'word')} that a shell "
            f"has made of a pattern: put the pattern in quotes, e.g. '{folder or '.'}/*.tar'"
        )
