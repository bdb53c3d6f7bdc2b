"""Exit codes, and how an error that a user can mend becomes one line; anything else shows its traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastmoco_pipelines.text import escaped

EXIT_FINISHED = 0
EXIT_FAILED = 1
EXIT_REFUSED = 2
EXIT_STOPPED = 75
"""A run that was asked to stop, has saved its state, and continues with the same command (EX_TEMPFAIL)."""
ASKED_TO_END = "asked-to-end"
"""File beside torchrun's reports of one start: a rank was refused, and has asked torchrun to end."""

EXTRAS = {"nvidia": "dali-cu13", "webdataset": "data", "sklearn": "data", "matplotlib": "logging", "torchao": "float8"}
"""Which extra of the distribution brings a module."""


class RunError(RuntimeError):
    """A run cannot start or go on; the text says why and what to do."""


@contextmanager
def one_line(code: int, *mendable: type[Exception]) -> Iterator[None]:
    """Turn errors that name their cure into one line on standard error and the end of the program.

    Args:
        code: exit code for them.
        mendable: further errors that count: `ValueError` and `OSError` where only the user's own values are at work.

    Raises:
        SystemExit: with `code`, in their place; 2 where an optional dependency is missing.
    """
    from fastmoco_pipelines import BadImageError, ShardError

    known: tuple[type[Exception], ...] = (RunError, ShardError, BadImageError, *mendable)
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
        say(str(error))
        raise SystemExit(code) from error


def no_checkpoint(path: Path | str) -> RunError:
    """The error of who looks for a run where there is none."""
    return RunError(f"{path} holds no checkpoint; is it the folder given to fastmoco train --out?")


def say(text: str) -> None:
    """Print one line on standard error; names of files and members that it quotes cannot steer the terminal."""
    print("fastmoco: " + escaped(text, keep="\n"), file=sys.stderr)
