"""After the last step of a run nothing changes its exit code: no signal, no error, no lack of time.

The run is saved and marked as done. What is left, such as the picture of its curves, is worth an
attempt, but a launcher that got another exit code for it would report a finished run as failed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType

from fastmoco.errors import EXIT_FINISHED, say
from fastmoco.faults.signals import PATIENCE_SECONDS, SIGNALS, to_handle

LIMIT_SECONDS = 240.0
"""Time after the last step in which attempts may be made. The agents of torchrun wait 300 s at the
end for those of other machines, and the store may be on one of them."""
END_SECONDS = LIMIT_SECONDS + 30.0
"""Time after the last step at which a process that hangs while it closes its files is ended."""
REPEAT_SECONDS = 5.0
"""Time that an interrupted attempt has for cleaning up, until it is interrupted again: Python
ignores an interruption inside a finalizer."""


class _Cut(BaseException):
    """Ends an attempt; derived as KeyboardInterrupt is, so that no library catches it."""


class AfterRun:
    """A context for the time after the last step, in which a signal does not end the process.

    Outside the main thread, which alone may handle signals, it has no effect on them, and attempts
    have no time limit.

    Args:
        process_ends: whether the process ends after this context. Then signals stay ignored after
            it, because Python would restore their default effect while it shuts down. A second
            signal more than `PATIENCE_SECONDS` after the first, or `END_SECONDS`, end the process
            with exit code 0, even if its main thread is blocked inside a library. Otherwise the
            previous handlers are restored, and the second signal has its previous effect.
    """

    def __init__(self, *, process_ends: bool = False) -> None:
        self._process_ends = process_ends
        self._began = time.monotonic()
        self._asked: str | None = None
        self._asked_at = 0.0
        self._attempting = False
        self._previous: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> AfterRun:
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in (*to_handle(), signal.SIGALRM):
            self._previous[number] = signal.signal(number, self._on_signal)
        if self._process_ends:
            self._receiver, self._sender = socket.socketpair()
            self._sender.setblocking(False)
            signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
            # Until the end of the process: threads of the loader may block its shutdown, too.
            threading.Thread(target=self._end_late, name="fastmoco-end", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if self._process_ends else handler)

    def attempt(
        self, work: Callable[[], object], failed: str, *, limit_s: float = LIMIT_SECONDS
    ) -> None:
        """Do something that may fail, be interrupted by a signal, or take too long.

        It is reported on standard error, and never raised. After a signal nothing is begun.

        Args:
            work: to be done; must leave no half-written file when it is interrupted.
            failed: beginning of the message, e.g. `curves.png not drawn`.
            limit_s: time after the beginning of the context at which it is interrupted.
        """
        done = False
        why = f"not done after {limit_s:.0f} s"
        # The outer block also catches a signal that arrives while an error is handled.
        try:
            try:
                if self._asked is None:
                    self._attempting = True
                    if self._previous:
                        left = max(self._began + limit_s - time.monotonic(), 1e-3)
                        signal.setitimer(signal.ITIMER_REAL, left, REPEAT_SECONDS)
                    work()
                    done = True
            except Exception as error:
                self._attempting = False
                why = str(error)
                if not isinstance(error, (ValueError, OSError)):
                    why = f"{type(error).__name__}: {why}"
            self._attempting = False
        except _Cut:
            pass
        finally:
            self._attempting = False
            if self._previous:
                signal.setitimer(signal.ITIMER_REAL, 0)
        if not done:
            if self._asked is not None:
                why = f"{self._asked}; the run is finished"
            _try_to_say(f"{failed}: {why}")

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGALRM:
            if self._attempting:
                raise _Cut
        elif self._asked is None:
            self._asked = signal.Signals(number).name
            self._asked_at = now
            if self._attempting:
                signal.setitimer(signal.ITIMER_REAL, REPEAT_SECONDS, REPEAT_SECONDS)
                raise _Cut
        elif now - self._asked_at > PATIENCE_SECONDS and not self._process_ends:
            for other, handler in self._previous.items():
                signal.signal(other, handler)
            os.kill(os.getpid(), number)

    def _end_late(self) -> None:
        """End the process at a second signal, or if it has not ended in time."""
        asked_at: float | None = None
        while (left := self._began + END_SECONDS - time.monotonic()) > 0:
            self._receiver.settimeout(left)
            try:
                received = self._receiver.recv(64)
            except TimeoutError:
                continue
            if not any(number in SIGNALS for number in received):
                continue
            if asked_at is None:
                asked_at = time.monotonic()
            elif time.monotonic() - asked_at > PATIENCE_SECONDS:
                break
        try:
            why = "a second signal" if left > 0 else f"not ended after {END_SECONDS:.0f} s"
            _try_to_say(f"{why}: ended at once; the run is finished")
        finally:
            os._exit(EXIT_FINISHED)


def _try_to_say(text: str) -> None:
    """As `say`, but standard error may be a file on a full disk."""
    with contextlib.suppress(OSError, ValueError):
        say(text)
