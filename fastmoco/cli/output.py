"""Standard output: long output, of which a person may read the beginning alone, results alone, and the
progress of a run for programs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from fastmoco.errors import (
    EXIT_FAILED,
    EXIT_FINISHED,
    EXIT_INTERRUPTED,
    EXIT_REFUSED,
    EXIT_STOPPED,
    LAUNCHER,
)
from fastmoco.errors.log import STYLE, JsonLog, Style

STATES = {
    EXIT_FINISHED: "finished",
    EXIT_FAILED: "failed",
    EXIT_REFUSED: "refused",
    EXIT_STOPPED: "stopped",
    EXIT_INTERRUPTED: "interrupted",
}
"""How a line of JSON calls the end of a command, by its exit code."""

PROCESS_ENDS: ContextVar[bool] = ContextVar("PROCESS_ENDS", default=False)
"""Whether this process ends with the command; else a program has called it, and goes on."""


def width() -> int:
    """Columns of the terminal, within what can be read."""
    return min(max(shutil.get_terminal_size().columns, 50), 120)


@contextmanager
def until_closed() -> Iterator[None]:
    """A context that ends without an error when the reader of a pipe has closed it, e.g. `head`."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still in the buffer would fail again at the end of the process.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def training_beside_result() -> Iterator[None]:
    """A context of a command whose result is on standard output: what the training in it shows is on
    standard error."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def is_first() -> bool:
    """Whether this process is the first of its run, by the variables of the launcher."""
    from fastmoco.config.launched import read_launcher

    return read_launcher(os.environ).rank == 0


def run_logged(
    style: Style,
    call: Callable[[], int],
    *,
    starts_others: bool = False,
) -> int:
    """Run a command that trains, and show its progress as `--log` says.

    With `json`, standard output has lines of JSON alone, and whatever else this process and its
    libraries print there goes to standard error: where the process ends with the command
    (`PROCESS_ENDS`) also what they write to the descriptor. The last line says how the command ended.

    Args:
        style: of the option.
        call: returns the exit code.
        starts_others: whether `call` starts processes that write to the same standard output.

    Returns:
        The exit code.
    """
    if style != "json":
        token = STYLE.set(style)
        try:
            return call()
        finally:
            STYLE.reset(token)

    stream = sys.stdout
    if PROCESS_ENDS.get() and not starts_others:
        stream = open(os.dup(1), "w", encoding="utf-8")  # noqa: SIM115 - until the process ends
        sys.stdout.flush()
        os.dup2(2, 1)
    log = JsonLog(stream, active=_may_write())
    token = STYLE.set(log)
    code = EXIT_FAILED
    try:
        with training_beside_result():
            code = call()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else EXIT_REFUSED
        raise
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
        raise
    finally:
        STYLE.reset(token)
        if LAUNCHER not in os.environ:  # else the process that started this one says it
            log.write("end", code=code, state=STATES.get(code, "failed"))
    return code


def _may_write() -> bool:
    """`is_first`; variables that make no sense are refused later."""
    try:
        return is_first()
    except ValueError:
        return True


def json_log() -> JsonLog | None:
    """The lines of JSON of this command; None where its output is for people."""
    style = STYLE.get()
    return style if isinstance(style, JsonLog) else None


def print_result(line: str) -> None:
    """Print a result for programs, as the only line on standard output, or as one of the lines of
    `--log json`."""
    log = json_log()
    if log is None:
        print(line)
    else:
        log.write("result", **json.loads(line))
