"""A sink in a process of its own, with a limit for each of its calls.

Whatever it does there, the training's process keeps its interpreter, its memory, its signals and
its end. A call that takes too long ends the process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmoco.run.events import Event
from fastmoco.telemetry.trackers.interface import Histogram, Sink, Started, TrackedRun
from fastmoco.telemetry.trackers.messages import packed, unpacked
from fastmoco_pipelines.processes import child_environment, python_command

START_S = 60.0
"""For the import of a tracker, and its first words with its server."""
WRITE_S = 30.0
"""For each call after it."""
CHILD = "fastmoco.telemetry.trackers.child"


class TrackerError(RuntimeError):
    """A sink in its process has raised, taken too long, or ended."""


class Isolated(Sink):
    """A sink of another process, which its first call begins.

    Args:
        sink: `module:Class`.
        start_s: seconds for `start`.
        write_s: seconds for any other call.
    """

    def __init__(self, sink: str, *, start_s: float = START_S, write_s: float = WRITE_S) -> None:
        self._name = sink
        self._limits = {"start": start_s}
        self._limit = write_s
        self._child: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._unread = b""
        self._killed = False

    def start(self, run: TrackedRun) -> Started:
        """Begin the process, and the sink in it.

        Raises:
            TrackerError: as every other call.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            self._socket = ours
            self._child = subprocess.Popen(  # noqa: S603 - this interpreter and our own module
                python_command(CHILD, self._name, str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in the terminal reaches the run alone
                env=child_environment(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"),
            )
        if self._killed:
            self.kill()
        started: Started = self._call("start", run)
        return started

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """As the sink's."""
        self._call("write", step, dict(metrics))

    def event(self, event: Event) -> None:
        """As the sink's."""
        self._call("event", event)

    def picture(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        """As the sink's."""
        self._call("picture", step, name, image)

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """As the sink's."""
        self._call("histograms", step, dict(histograms))

    def summary(self, step: int, metrics: Mapping[str, float]) -> None:
        """As the sink's."""
        self._call("summary", step, dict(metrics))

    def close(self) -> None:
        """As the sink's; then its process ends."""
        try:
            self._call("close")
        finally:
            self.kill()

    def kill(self) -> None:
        """End the process at once, from any thread; a call that waits for it raises."""
        self._killed = True
        child = self._child
        if child is not None and child.returncode is None:  # else its number may be another's
            with contextlib.suppress(OSError):
                os.killpg(child.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # it hangs in its file system
                child.wait(1.0)
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _call(self, name: str, *arguments: Any) -> Any:
        """Send a call, and wait for its end.

        Raises:
            TrackerError: if it has raised, has taken too long, or the process has ended.
        """
        if self._socket is None or self._killed:
            raise TrackerError("its process has ended")
        limit = self._limits.get(name, self._limit)
        try:
            self._socket.settimeout(limit)
            self._socket.sendall(packed([name, list(arguments)]))
            while b"\n" not in self._unread:
                if not (found := self._socket.recv(1 << 16)):
                    raise TrackerError("its process has ended")
                self._unread += found
        except TimeoutError as error:
            raise TrackerError(f"{name} took more than {limit:g} s") from error
        except OSError as error:
            raise TrackerError("its process has ended") from error
        line, _, self._unread = self._unread.partition(b"\n")
        answer = unpacked(line)
        if "error" in answer:
            raise TrackerError(answer["error"])
        return answer["result"]
