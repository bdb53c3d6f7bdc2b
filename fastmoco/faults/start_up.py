"""Signals while a run starts: libraries, data and checkpoints are opened, and nothing is to be
saved.

The process ends with one line, and counts as stopped on request: the same command continues. The
main thread may be blocked inside a library, for example while it waits for other ranks. No handler
of Python runs then, so a thread reads the signals too and ends the process.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import NoReturn

from fastmoco.errors import (
    BEGUN,
    EXIT_INTERRUPTED,
    EXIT_REFUSED,
    EXIT_STOPPED,
    LAUNCHER,
    say,
)
from fastmoco.faults.signals import to_handle
from fastmoco_pipelines.files.small import UnfitFileError, open_regular, read_small
from fastmoco_pipelines.files.whole import missing_folders, remove_empty

GRACE_SECONDS = 2.0
"""Time that the main thread has to close what it has opened."""
_OWN_FILES = ("lock", "starts.json", "config.json", "metrics.jsonl", "PREEMPTED")
"""Files that a start writes before its first step."""


class Asked(BaseException):
    """Ends the start; derived as KeyboardInterrupt is, so that no library catches it."""


class StartUp:
    """A context in which a signal ends the process with one line and without a traceback.

    Outside the main thread, which alone may handle signals, it has no effect on them.

    A start that is refused or interrupted leaves no folder that it has made itself. After another
    signal the folder stays, with the mark `PREEMPTED`: schedulers read it.

    """

    def __init__(self) -> None:
        self._out: Path | None = None
        self._made: list[Path] = []
        self._previous: dict[signal.Signals, signal._HANDLER] = {}
        self._asked: signal.Signals | None = None
        self._leaving = False
        self._over = threading.Event()

    def __enter__(self) -> StartUp:
        if threading.current_thread() is not threading.main_thread():
            self._over.set()
            return self
        if reports := os.environ.get(LAUNCHER):  # of an earlier start of these workers
            with contextlib.suppress(OSError):
                (Path(reports) / BEGUN).unlink(missing_ok=True)
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        for number in to_handle():
            self._previous[number] = signal.signal(number, self._on_signal)
        self._wakeup_before = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._unraisable = sys.unraisablehook
        sys.unraisablehook = self._on_unraisable
        self._thread = threading.Thread(target=self._listen, name="fastmoco-start", daemon=True)
        self._thread.start()
        return self

    def opens(self, out: Path) -> None:
        """The folder of the run is known, and may be made from now on."""
        self._out = out
        self._made = missing_folders(out)

    def end(self) -> None:
        """The start is over: restore the previous handlers. May be called more than once."""
        if self._over.is_set():
            return
        # First the handlers: a signal that arrives meanwhile still ends the start.
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        sys.unraisablehook = self._unraisable
        self._over.set()
        signal.set_wakeup_fd(self._wakeup_before)
        self._sender.close()
        self._thread.join()
        self._receiver.close()

    def __exit__(self, kind: object, error: BaseException | None, _trace: object) -> None:
        self._leaving = True
        unfinished = not self._over.is_set()
        if isinstance(error, Asked):
            # A rank that is refused asks torchrun to end, which then sends it a signal.
            refused = isinstance(error.__context__, SystemExit)
            code = EXIT_REFUSED if refused else self._report()
            self.end()
            if refused:
                self._leave_nothing()
            raise SystemExit(code) from None
        self.end()
        if unfinished and isinstance(error, SystemExit) and error.code == EXIT_REFUSED:
            self._leave_nothing()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._asked is None and not self._leaving:
            self._asked = signal.Signals(number)
            raise Asked

    def _on_unraisable(self, lost: sys.UnraisableHookArgs) -> None:
        """A signal that arrives in a destructor is lost there, without a traceback: the thread that
        reads the signals ends the process."""
        if not isinstance(lost.exc_value, Asked):
            self._unraisable(lost)

    def _listen(self) -> None:
        """End the process if the main thread has not done so some time after a signal."""
        number = None
        while number not in self._previous:
            received = self._receiver.recv(1)
            if not received:  # the start is over
                return
            number = received[0]
        if not self._over.wait(GRACE_SECONDS):
            self._asked = signal.Signals(number)
            self._end_at_once()

    def _end_at_once(self) -> NoReturn:
        code = EXIT_STOPPED
        try:
            code = self._report()
        finally:
            os._exit(code)

    def _report(self) -> int:
        """Print one line, leave the mark or nothing, and return the exit code."""
        assert self._asked is not None  # noqa: S101 - a type: set by the signal that led here
        # A launcher of our own knows whether it was asked to stop, and prints the line.
        if LAUNCHER in os.environ:
            self._leave_nothing()
            return EXIT_STOPPED
        if os.environ.get("RANK", "0") == "0":
            say(ended_early(self._asked))
        if self._asked is signal.SIGINT:
            self._leave_nothing()
            return EXIT_INTERRUPTED
        # SIGTERM may come from a launcher after the failure of another rank.
        alone = os.environ.get("WORLD_SIZE", "1") == "1"
        if self._out and self._held_lock() and (alone or self._asked is not signal.SIGTERM):
            mark_stopped(self._out)
        return EXIT_STOPPED

    def _held_lock(self) -> bool:
        try:
            own = str(os.getpid()).encode()
            return self._out is not None and own == read_small(self._out / "lock", follow=False)
        except (OSError, UnfitFileError):
            return False

    def _leave_nothing(self) -> None:
        """Remove the folder if this start has made it and nothing else is in it."""
        if self._out is None or not self._made or not self._held_lock():
            return
        with contextlib.suppress(OSError):
            found = sorted(path.name for path in self._out.iterdir())
            if not set(found) <= {*_OWN_FILES, "checkpoints", "tensorboard"}:
                return
            if "checkpoints" in found:
                (self._out / "checkpoints").rmdir()
                found.remove("checkpoints")
            if "tensorboard" in found:
                shutil.rmtree(self._out / "tensorboard")
                found.remove("tensorboard")
            for name in found:
                (self._out / name).unlink()
            remove_empty(self._made)


def ended_early(number: signal.Signals) -> str:
    """The message after a signal before the first step."""
    return f"{number.name}: ended before the first step: nothing is lost"


def mark_stopped(out: Path) -> None:
    """Mark a run as stopped if its folder is there."""
    with contextlib.suppress(OSError, UnfitFileError):
        flags = os.O_WRONLY | os.O_CREAT
        os.close(open_regular(out / "PREEMPTED", flags, 0o600, follow=False))
