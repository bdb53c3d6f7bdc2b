"""The process of a sink: makes the calls that a run sends, and ends with the run.

A run that is killed leaves its sink the time to send what it has. Signals that ask a run to stop do
not reach the sink: SLURM sends them to every process of a job, and the run needs its trackers until
it has ended. What a sink has started may outlive it: W&B writes its last records so.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import sys
import threading
from typing import Any

from fastmoco.telemetry.trackers.interface import Started
from fastmoco.telemetry.trackers.messages import packed, unpacked
from fastmoco.telemetry.trackers.outlet import without_values, worded
from fastmoco_pipelines.processes import follow_parent

LONGEST = 2000
"""Characters of an error that reach the run."""
LAST_S = 15.0
"""Seconds to end after the run, also for a call that is being made."""
REQUESTS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)
"""Signals that ask a run to stop (`faults/signals.py`)."""


def made(name: str) -> Any:
    """A new sink of `module:Class`.

    Raises:
        ImportError, AttributeError: if there is none.
    """
    module, _, kind = name.partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        where = "install it, or add its folder, absolute, to PYTHONPATH"
        raise ImportError(f"{error}; {where}") from error
    return getattr(found, kind)()


def made_call(sink: Any, name: str, arguments: list[Any]) -> Any:
    """Make a call, and return what `start` returns. What a sink does not have does nothing."""
    method = getattr(sink, name, None)
    result = method(*arguments) if method is not None else None
    if name != "start":
        return None
    if result is not None and not isinstance(result, Started):
        raise TypeError(f"start returned {type(result).__name__}, not Started")
    return result or Started()


def _ignored(*_: object) -> None:
    """A handler, because the programs that a sink starts would inherit `SIG_IGN`."""


def main(name: str, descriptor: int) -> None:
    """Make the calls until the run is closed or has ended."""
    for number in REQUESTS:
        signal.signal(number, _ignored)
    with contextlib.suppress(OSError):
        os.nice(10)
    os.umask(0o077)
    connection = socket.socket(fileno=descriptor)

    def run_has_ended() -> None:
        limit = threading.Timer(LAST_S, os._exit, [1])
        limit.daemon = True
        limit.start()
        connection.shutdown(socket.SHUT_RD)

    follow_parent(at_end=run_has_ended)
    sink: Any = None
    with connection.makefile("rb") as lines:
        for line in lines:
            call, arguments = unpacked(line)
            try:
                sink = made(name) if call == "start" else sink
                answer = packed({"result": made_call(sink, call, arguments)})
            except BaseException as error:  # whatever a sink raises, also SystemExit
                text = without_values(worded(error))  # before it is cut
                answer = packed({"error": text[:LONGEST]})
            with contextlib.suppress(OSError):  # the run has ended meanwhile
                connection.sendall(answer)
            if call == "close":
                return

    # The run has ended without a close.
    if sink is not None:
        made_call(sink, "close", [])


if __name__ == "__main__":
    try:
        main(sys.argv[1], int(sys.argv[2]))
    finally:
        os._exit(0)  # what a tracker does at the end of a process could take for ever
