"""The process of a sink: makes the calls that a run sends, and ends with the run.

A run that is killed leaves its sink the time to send what it has.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import sys
import threading
from typing import Any

from fastmoco.telemetry.trackers.messages import packed, unpacked
from fastmoco_pipelines.processes import follow_parent

LAST_S = 15.0
"""Seconds to end after the run."""


def made(name: str) -> Any:
    """A new sink of `module:Class`.

    Raises:
        ImportError, AttributeError: if there is none.
    """
    module, _, kind = name.partition(":")
    return getattr(importlib.import_module(module), kind)()


def main(name: str, descriptor: int) -> None:
    """Make the calls until the run is closed or has ended."""
    with contextlib.suppress(OSError):
        os.nice(10)
    os.umask(0o077)
    connection = socket.socket(fileno=descriptor)

    def run_has_ended() -> None:
        connection.shutdown(socket.SHUT_RD)

    follow_parent(at_end=run_has_ended)
    sink: Any = None
    with connection.makefile("rb") as lines:
        for line in lines:
            call, arguments = unpacked(line)
            answer: dict[str, Any]
            try:
                sink = made(name) if call == "start" else sink
                answer = {"result": getattr(sink, call)(*arguments)}
            except BaseException as error:  # whatever a sink raises, also SystemExit
                answer = {"error": f"{type(error).__name__}: {error}"[:2000]}
            connection.sendall(packed(answer))
            if call == "close":
                return

    # The run has ended without a close.
    if sink is not None:
        limit = threading.Timer(LAST_S, os._exit, [1])
        limit.daemon = True
        limit.start()
        sink.close()


if __name__ == "__main__":
    try:
        main(sys.argv[1], int(sys.argv[2]))
    finally:
        os._exit(0)  # what a tracker does at the end of a process could take for ever
