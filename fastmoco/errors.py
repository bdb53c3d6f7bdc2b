"""Exit codes, and the conversion of errors that a user can fix to one line;
other errors show their traceback.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastmoco_pipelines.text import escaped, escaped_lines, variable_hint

EXIT_FINISHED = 0
EXIT_FAILED = 1
EXIT_REFUSED = 2
EXIT_STOPPED = 75
"""The run stopped on request and saved its state; the same command continues it (EX_TEMPFAIL)."""
EXIT_INTERRUPTED = 130
"""Ctrl-C, with nothing to save, or with all of it saved."""
ASKED_TO_END = "asked-to-end"
"""File next to torchrun's reports of one start: a rank was refused and has
asked torchrun to end."""

EXTRAS = {
    "nvidia": "dali-cu13",
    "webdataset": "data",
    "sklearn": "data",
    "matplotlib": "logging",
    "torchao": "float8",
}
"""The extra of the distribution that installs a module."""


_CURES = {
    errno.EACCES: "check its permissions, or choose another place",
    errno.EPERM: "check its permissions, or choose another place",
    errno.EROFS: "choose a folder that can be written",
    errno.ENOSPC: "free some space, or choose a folder on another disk",
    errno.EDQUOT: "free some space, or choose a folder on another disk",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of this path is a file where a folder is needed",
    errno.EEXIST: "there is a file of this name: choose another name",
    errno.EISDIR: "give a file",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its symbolic links form a circle",
    errno.EMFILE: "allow more open files (ulimit -n)",
}


class RunError(RuntimeError):
    """A run cannot start or continue; the message names the reason and the cure."""


@contextmanager
def one_line(code: int, *fixable: type[Exception]) -> Iterator[None]:
    """Print errors that name their cure as one line on standard error and end the program.

    Args:
        code: exit code for them.
        fixable: further errors to treat so: `ValueError` and `OSError` where only values of the
            user can cause them.

    Raises:
        SystemExit: with `code` instead; 2 if an optional dependency is missing.
    """
    from fastmoco_pipelines import BadImageError, ShardError

    known: tuple[type[Exception], ...] = (RunError, ShardError, BadImageError, *fixable)
    try:
        yield
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        also = " (dali-cu12 for CUDA 12 drivers)" if extra == "dali-cu13" else ""
        say(f"this needs {error.name}: pip install '.[{extra}]' in fastmoco's source folder{also}")
        raise SystemExit(EXIT_REFUSED) from error
    except known as error:
        say(describe(error))
        raise SystemExit(code) from error


def describe(error: Exception) -> str:
    """An error as text: of the operating system's errors the file, what is wrong, and the cure."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if name is not None]
    cure = _CURES.get(error.errno or 0, "")
    hint = "".join({variable_hint(name) for name in names})
    where = " -> ".join(escaped(name) for name in names)
    return (f"{where}: " if where else "") + error.strerror + (f"; {cure}" if cure else "") + hint


def no_checkpoint(path: Path | str) -> RunError:
    """The error for a folder without checkpoints."""
    return RunError(
        f"{path} contains no checkpoint; is it the folder given to fastmoco train --out?"
    )


def say(text: str) -> None:
    """Print a message on standard error, with control characters escaped, because it may quote
    names of files; its further lines begin with two spaces.
    """
    print("fastmoco: " + escaped_lines(text), file=sys.stderr)


def show(text: str) -> None:
    """Print one line on standard output, with control characters escaped."""
    print(escaped(text))
