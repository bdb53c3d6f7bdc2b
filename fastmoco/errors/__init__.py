"""Exit codes, and the conversion of errors that a user can fix to one line;
other errors show their traceback.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from fastmoco_pipelines.files.small import UnfitFileError, open_regular
from fastmoco_pipelines.text import escaped, shown, shown_lines, variable_hint

EXIT_FINISHED = 0
EXIT_FAILED = 1
EXIT_REFUSED = 2
EXIT_STOPPED = 75
"""The run stopped on request and saved its state; the same command continues it (EX_TEMPFAIL)."""
EXIT_INTERRUPTED = 130
"""Ctrl-C, with nothing to save, or with all of it saved."""
EXIT_UNREAD = 141
"""The reader of the output has closed its pipe, e.g. `head`: as a shell reports SIGPIPE."""
ASKED_TO_END = "asked-to-end"
"""File next to torchrun's reports of one start: a rank was refused and has
asked torchrun to end."""

LAUNCHER = "FASTMOCO_LAUNCHER"
"""Variable that `fastmoco train --gpus N` sets for its workers: its folder for reports. Lines that
would only repeat another rank's line go to a file there (`say_again`)."""
BEGUN = "begun"
"""File there: a worker has done its first step."""
OWNED = "owned"
"""File there: a worker holds, or has held, the lock of the run's folder."""
ECHOES = "ranks.log"
"""File there with these lines."""

EXTRAS = {
    "nvidia": "cuda13",
    "sklearn": "data",
    "matplotlib": "logging",
    "plotly": "report",
    "jinja2": "report",
    "tensorboard": "logging",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
    "torchao": "float8",
    "pyarrow": "parquet",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "transformers": "export",
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


def describe(error: Exception) -> str:
    """An error as text: of the operating system's errors the file, what is wrong, and the cure."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if name is not None]
    cure = _CURES.get(error.errno or 0, "")
    hint = "".join({variable_hint(name) for name in names})
    where = " -> ".join(escaped(name) for name in names)
    return (f"{where}: " if where else "") + error.strerror + (f"; {cure}" if cure else "") + hint


WORDING: ContextVar[Callable[[Exception], str]] = ContextVar("WORDING", default=describe)
"""How an error is shown: on the command line a field is named by its option (`cli.mistakes`)."""


class RunError(RuntimeError):
    """A run cannot start or continue; the message names the reason and the cure."""

    repeats = False
    """Whether another rank prints the reason too."""


def reader_is_gone() -> bool:
    """Whether standard output is a pipe that its reader has closed, e.g. `head`. From then on all
    output is dropped, also what is still in the buffer."""
    state = select.poll()
    state.register(sys.stdout, 0)
    if not state.poll(0):
        return False
    _drop_output()
    return True


def output_fault() -> str:
    """What keeps standard output from being written, e.g. a full disk; "" for nothing. From then on
    all output is dropped, also what is still in the buffer."""
    try:
        print(flush=True)
    except OSError as error:
        _drop_output()
        return describe(error)
    return ""


def _drop_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
    from fastmoco_pipelines.errors import DecoderBrokenError, install_command

    known: tuple[type[Exception], ...] = (
        RunError,
        ShardError,
        BadImageError,
        DecoderBrokenError,
        UnfitFileError,
        *fixable,
    )
    try:
        yield
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        also = " (cuda12 for CUDA 12 drivers)" if extra == "cuda13" else ""
        say(f"this needs {error.name}: {install_command(extra)}{also}")
        raise SystemExit(EXIT_REFUSED) from error
    except known as error:
        if isinstance(error, BrokenPipeError) and reader_is_gone():
            raise SystemExit(EXIT_UNREAD) from error
        words = WORDING.get()(error)
        if getattr(error, "repeats", False):
            say_again(words)
        else:
            say(words)
        raise SystemExit(code) from error


_WHERE_RUNS_ARE = (
    "no such file or folder; give the folder given to fastmoco train --out, `fastmoco runs` lists "
    "those below a folder"
)


def no_run(path: Path | str) -> RunError:
    """The error for a path where there is nothing, given as that of a run."""
    return RunError(f"{path}: {_WHERE_RUNS_ARE}")


def no_checkpoint(path: Path | str) -> RunError:
    """The error for a folder without checkpoints, and for a path where there is nothing."""
    if not os.path.lexists(path):
        return RunError(f"{path} contains no checkpoint: {_WHERE_RUNS_ARE}")
    return RunError(
        f"{path} contains no checkpoint; is it the folder given to fastmoco train --out?"
    )


def say(text: str) -> None:
    """Print a message on standard error as by `text.shown_lines`, because it may quote names of files
    and words of the command; its further lines begin with two spaces.

    Standard error may be a closed terminal or a file on a full disk: nothing is raised then.
    """
    with contextlib.suppress(OSError, ValueError):
        print("fastmoco: " + shown_lines(text), file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Print one line on standard output as by `text.shown`."""
    print(shown(text))


def say_again(text: str) -> None:
    """Print a line that repeats another rank's; with `--gpus N` it goes to a file instead."""
    folder = os.environ.get(LAUNCHER)
    if not folder:
        say(text)
        return
    line = f"rank {os.environ.get('RANK', '?')}: {shown(text)}\n"
    with contextlib.suppress(OSError, UnfitFileError):
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        with open(open_regular(Path(folder) / ECHOES, flags, follow=False), "a") as file:
            file.write(line)


def tell_launcher(name: str, holds: bool = True) -> None:
    """Leave an empty file in the folder for reports of `fastmoco train --gpus N`, if it is there.

    Args:
        name: of the file.
        holds: whether it is true now; else the file is removed.
    """
    if folder := os.environ.get(LAUNCHER):
        path = Path(folder) / name
        with contextlib.suppress(OSError):
            path.touch() if holds else path.unlink(missing_ok=True)


def close_output() -> None:
    """Write what standard output and error still hold, before the end of the process.

    Python would exit with code 120 if it fails then, for example because the terminal is closed.
    """
    for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            with contextlib.suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
