"""Exit codes, and the conversion of errors that a user can fix to one line;
other errors show their traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from fastmoco_pipelines.text import escaped

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


WORDING: ContextVar[Callable[[Exception], str]] = ContextVar("WORDING", default=str)
"""How an error is shown: on the command line a field is named by its option (`cli.mistakes`)."""


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
        say(WORDING.get()(error))
        raise SystemExit(code) from error


def no_checkpoint(path: Path | str) -> RunError:
    """The error for a folder without checkpoints."""
    return RunError(
        f"{path} contains no checkpoint; is it the folder given to fastmoco train --out?"
    )


def say(text: str) -> None:
    """Print one line on standard error, with control characters escaped,
    because it may quote names of files.
    """
    print("fastmoco: " + escaped(text, keep="\n"), file=sys.stderr)
