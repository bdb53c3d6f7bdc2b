"""After the last step of a run nothing changes its exit code: no signal, no error, no lack of time.

The run is saved and marked as done. What is left, such as the picture of its curves, is worth an
attempt, but a launcher that got another exit code for it would report a finished run as failed.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType

from fastmoco.errors import say
from fastmoco.faults.stop_signal import SIGNALS

LIMIT_SECONDS = 240.0
"""Time of an attempt. The agents of torchrun wait 300 s at the end for those of other machines, and
the store may be on one of them."""


class _Cut(BaseException):
    """Ends an attempt; derived as KeyboardInterrupt is, so that no library catches it."""


class AfterRun:
    """A context for the time after the last step, in which a signal does not end the process.

    Outside the main thread, which alone may handle signals, it has no effect on them, and attempts
    have no time limit.
    """

    def __init__(self) -> None:
        self._asked: str | None = None
        self._attempting = False
        self._previous: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> AfterRun:
        if threading.current_thread() is threading.main_thread():
            for number in (*SIGNALS, signal.SIGALRM):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def attempt(
        self, work: Callable[[], object], failed: str, *, limit_s: float = LIMIT_SECONDS
    ) -> None:
        """Do something that may fail, be interrupted by a signal, or take too long.

        It is reported on standard error, and never raised. After a signal nothing is begun.

        Args:
            work: to be done; must leave no half-written file when it is interrupted.
            failed: beginning of the message, e.g. `curves.png not drawn`.
            limit_s: time after which it is interrupted.
        """
        # The outer block also catches a signal that arrives while an error is reported.
        try:
            try:
                if self._asked is None:
                    self._attempting = True
                    if self._previous:
                        signal.setitimer(signal.ITIMER_REAL, limit_s)
                    work()
            except Exception as error:
                kind = (
                    "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
                )
                say(f"{failed}: {kind}{error}")
            finally:
                self._attempting = False
        except _Cut:
            pass
        finally:
            if self._previous:
                signal.setitimer(signal.ITIMER_REAL, 0)
        if self._asked == signal.SIGALRM.name:
            say(f"{failed}: not done after {limit_s:.0f} s")
        elif self._asked is not None:
            say(f"{failed}: {self._asked}; the run is finished")

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._asked is None:
            self._asked = signal.Signals(number).name
        if self._attempting:
            self._attempting = False  # once: a second signal must not interrupt the cleaning up
            raise _Cut
