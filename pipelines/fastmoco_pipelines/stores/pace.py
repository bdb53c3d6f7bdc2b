"""How many transfers go on at once: measured while they run.

More while the loader waits for shards and more of them bring more bytes; fewer where the server
asks for it (429, 503, SlowDown), where many transfers fail, where the cache has no room, and where
nobody waits. The number is doubled until that does not pay, and rises by one from then on. Which
shards are fetched, and in which order their samples are used, does not depend on it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastmoco_pipelines.errors import BusyError, PassingError
from fastmoco_pipelines.spec import MAX_TRANSFERS

START = 4
"""Transfers at first, and the number to which it falls when nobody waits."""
_PERIOD = 0.5  # seconds over which bytes are counted; longer while no transfer ends
_PERIODS = 4  # of these at most
_WAITING = 0.05  # share of the time that the loader waits from which on more are tried
_PAYS = 0.25  # share of the ideal gain that more transfers must bring
_CLEAR = 0.5  # share of it that is no accident
_FAILING = 0.3  # share of tries that fail, from which on there are too many; resets are fewer
_HOLD = 5.0  # seconds without a rise after a fall
_QUIET = 20  # periods in which nobody waits, after which one transfer less will do


class Pace:
    """Any thread may call any method.

    Args:
        most: transfers at once at most.
        clock: returns seconds.
    """

    def __init__(
        self, most: int = MAX_TRANSFERS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most = most
        self._clock = clock
        self._lock = threading.Lock()
        self._width = min(START, most)
        self._fast = True
        self._before: tuple[int, float] | None = None
        self._settling = False
        self._hold_until = 0.0
        self._lowered_at = -_HOLD
        self._quiet = 0
        self._waiters = 0
        self._waiting_since = 0.0
        self._begin(clock())

    @property
    def width(self) -> int:
        """Transfers that may go on at once."""
        return self._width

    def arrived(self, size: int) -> bool:
        """Some bytes have come; whether more transfers may go on than before."""
        with self._lock:
            self._bytes += size
            return self._judge()

    def ended(self) -> bool:
        """A transfer has ended well; whether more may go on than before."""
        with self._lock:
            self._ends += 1
            return self._judge()

    def failed(self, error: PassingError) -> None:
        """One try of a transfer has failed."""
        with self._lock:
            self._failures += 1
            if isinstance(error, BusyError):
                self._lower(self._width // 2, max(error.retry_after, _HOLD))

    def no_room(self) -> None:
        """The cache has no room for one more transfer."""
        with self._lock:
            self._lower(self._width - 1, _HOLD)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The loader waits for a shard meanwhile."""
        with self._lock:
            self._waiters += 1
            if self._waiters == 1:
                self._waiting_since = self._clock()
        try:
            yield
        finally:
            with self._lock:
                self._waiters -= 1
                if not self._waiters:
                    self._waited += self._clock() - self._waiting_since

    def _begin(self, now: float) -> None:
        """A new period."""
        self._since = now
        self._bytes = self._ends = self._failures = 0
        self._waited = 0.0
        self._waiting_since = now

    def _judge(self) -> bool:
        now = self._clock()
        elapsed = now - self._since
        if elapsed < _PERIOD or (self._ends < self._width and elapsed < _PERIODS * _PERIOD):
            return False
        width, rate = self._width, self._bytes / elapsed
        waited = self._waited + (now - self._waiting_since if self._waiters else 0.0)
        tries = self._ends + self._failures
        failing = self._failures > max(2, _FAILING * tries)
        self._begin(now)
        if self._settling:  # the first answers to more requests are on their way
            self._settling = False
        elif failing:
            self._lower(width * 3 // 4, _HOLD)
        elif waited < _WAITING * elapsed:
            self._before = None
            self._quiet += 1
            if self._quiet >= _QUIET and width > START:
                self._quiet = 0
                self._width -= 1
        elif now >= self._hold_until:
            self._quiet = 0
            self._try_more(rate)
        return self._width > width

    def _try_more(self, rate: float) -> None:
        """One more, or twice as many; back to the number before if that was of no use."""
        width = self._width
        if self._before is None:
            self._before = (width, rate)
        less, slower = self._before
        ideal = (width - less) / less
        if rate < slower * (1 + _PAYS * ideal):
            self._lower(less, _HOLD)
            return
        if rate >= slower * (1 + _CLEAR * ideal):  # else small steps add up before they are judged
            self._before = (width, rate)
        more = min(self._most, 2 * width if self._fast else width + 1)
        if more > width:
            self._width = more
            self._settling = True

    def _lower(self, width: int, hold: float) -> None:
        """Fewer transfers for some seconds; once for all failures of a moment."""
        now = self._clock()
        self._hold_until = max(self._hold_until, now + hold)
        self._fast = False
        self._before = None
        if now - self._lowered_at >= _PERIOD:
            self._lowered_at = now
            self._width = max(1, min(width, self._width))
