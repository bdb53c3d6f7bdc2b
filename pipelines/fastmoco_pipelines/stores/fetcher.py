"""The shards of a remote set, brought into the cache before they are needed, by a few threads in
the background.

The threads reference only the state, not the set: an unreferenced set is collected, and they end.
They are daemons; a transfer that they leave unfinished is continued by the next process.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from fastmoco_pipelines.errors import NoRoomError, PassingError, RemoteError, StoppedError
from fastmoco_pipelines.sampling.window import ShardWindows
from fastmoco_pipelines.spec import MAX_TRANSFERS
from fastmoco_pipelines.stores.cache import ShardCache
from fastmoco_pipelines.stores.pace import Pace
from fastmoco_pipelines.stores.retries import Limits
from fastmoco_pipelines.stores.transfer import RemoteShard, download, read_range

_IDLE_SECONDS = 2.0
_POLL_SECONDS = 0.05
_LOOK_SECONDS = 1.0  # between two looks at which shards of a window are missing
_NO_ROOM_SECONDS = 1.0
_FAILED_SECONDS = 30.0
_NO_RANGES = (
    "and the shard cache cannot be used: make room for the cache, or give --data.cache-dir a folder "
    "that can be written"
)
_READERS = 8  # requests at once where nothing can be kept


@dataclass(frozen=True, slots=True)
class _Followed:
    """The window that was followed last."""

    windows: ShardWindows
    seed: int
    epoch: int
    low: int
    high: int
    now: set[int]
    wanted: list[int]

    def covers(self, windows: ShardWindows, seed: int, epoch: int, position: int) -> bool:
        same = (self.windows, self.seed, self.epoch) == (windows, seed, epoch)
        return same and self.low <= position < self.high


class ShardFetcher:
    """Fetches the shards of a set from their server. One thread at a time may use it; any thread
    may call `cancel`.

    Args:
        shards: all of the set.
        cache: where they are kept; None reads every sample from the server.
        limits: times and tries of a transfer.
        most: transfers at once at most; as many as pay are made (pace.py).
    """

    def __init__(
        self,
        shards: Sequence[RemoteShard],
        cache: ShardCache | None,
        limits: Limits,
        most: int = MAX_TRANSFERS,
    ) -> None:
        self._state = _State(shards, cache, limits, Pace(most))
        self._followed: _Followed | None = None
        self._look_at = 0.0

    @property
    def limits(self) -> Limits:
        """Times and tries of a transfer."""
        return self._state.limits

    def change(self, change: Callable[[Sequence[RemoteShard]], Sequence[RemoteShard]]) -> None:
        """Replace what is known of the shards."""
        self._state.shards = change(self._state.shards)

    def want(self, numbers: Sequence[int]) -> None:
        """Fetch these shards next, in this order, instead of those wanted before."""
        self._look_at = 0.0
        if self._state.cache is not None:
            self._state.want(numbers)

    def follow(self, windows: ShardWindows, *, seed: int, epoch: int, position: int) -> set[int]:
        """Fetch the shards of the window around a position, then those of the next.

        Every step asks. The cache is looked at, a file at a time, where a window begins, and then
        once in `_LOOK_SECONDS`: another process may have evicted what was there.

        Returns:
            The shards of the window.
        """
        if self._followed is None or not self._followed.covers(windows, seed, epoch, position):
            bounds = windows.bounds(seed, epoch)
            window = int(np.searchsorted(bounds, position, side="right")) - 1
            now, after = (shards.tolist() for shards in windows.ahead(seed, epoch, window))
            low, high = bounds[window : window + 2].tolist()
            self._followed = _Followed(
                windows, seed, epoch, low, high, set(now), list(dict.fromkeys([*now, *after]))
            )
            self._look_at = 0.0
        if time.monotonic() >= self._look_at:
            self.want(self._followed.wanted)
            self._look_at = time.monotonic() + _LOOK_SECONDS
        return self._followed.now

    def open(self, number: int, *, warn: bool = True) -> int | None:
        """A descriptor of a whole, checked copy of a shard, which stays until the descriptor is
        closed.

        Args:
            number: of the shard.
            warn: warn once if it cannot be kept.

        Returns:
            None where it cannot be kept on this machine: use `read`.

        Raises:
            RemoteError: naming the URL and the cause; also if another process fetches it
                indefinitely.
        """
        return self._state.open(number, warn)

    def read(self, number: int, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """(offset, size) ranges of a shard straight from the server; not checked.

        Raises:
            RemoteError: naming the URL and the cause.
        """
        state = self._state
        with ThreadPoolExecutor(
            min(_READERS, len(ranges)), thread_name_prefix="fastmoco-range"
        ) as pool:
            shard = state.shards[number]
            return list(
                pool.map(
                    lambda part: read_range(
                        shard.url, part[0], part[1], state.limits, state.stop, cure=_NO_RANGES
                    ),
                    ranges,
                )
            )

    def discard(self, number: int) -> None:
        """Discard the copy of a shard that has proved to be damaged."""
        if self._state.cache is not None:
            self._state.cache.discard(self._state.shards[number].key)

    def cancel(self) -> None:
        """End every wait and transfer of this object with StoppedError, until `close`."""
        self._state.stop.set()

    def close(self) -> None:
        """End the threads; using the object again starts new ones."""
        self.cancel()
        state = self._state
        self._state = _State(state.shards, state.cache, state.limits, state.pace)
        self._look_at = 0.0

    def __del__(self) -> None:
        if hasattr(self, "_state"):
            self._state.stop.set()


class _State:
    """What the threads share."""

    def __init__(
        self,
        shards: Sequence[RemoteShard],
        cache: ShardCache | None,
        limits: Limits,
        pace: Pace,
    ) -> None:
        self.shards = shards
        self.cache = cache
        self.limits = limits
        self.pace = pace
        self.stop = threading.Event()
        lock = threading.RLock()
        self._work = threading.Condition(lock)  # there is something to fetch
        self._change = threading.Condition(lock)  # a shard has come, or failed
        self._wanted: list[int] = []
        self._missing: list[int] = []
        self._busy: set[int] = set()
        self._failures: dict[int, BaseException] = {}
        self._not_before: dict[int, float] = {}
        self._threads = 0
        self._urgent = False
        self._warned = False

    def want(self, numbers: Sequence[int]) -> None:
        with self._change:
            self._wanted = list(numbers)
            holds = self.cache.holds if self.cache is not None else lambda key: True
            self._missing = [n for n in self._wanted if not holds(self.shards[n].key)]
            self._start_threads()
            self._work.notify_all()

    def arrived(self, size: int) -> None:
        """Some bytes of a shard have come."""
        if self.pace.arrived(size):
            with self._change:
                self._start_threads()

    def failed(self, error: PassingError) -> None:
        """One try to fetch a shard has failed."""
        self.pace.failed(error)

    def _start_threads(self) -> None:
        """As many as the pace allows and as there is work for."""
        if self.stop.is_set():
            return
        for _ in range(min(self.pace.width, len(self._missing)) - self._threads):
            self._threads += 1
            threading.Thread(target=_work, args=(self,), name="fastmoco-fetch", daemon=True).start()

    def open(self, number: int, warn: bool) -> int | None:
        if self.cache is None:
            return None
        shard = self.shards[number]
        descriptor = self.cache.lookup(shard.key, shard.size)
        if descriptor is not None:
            return descriptor
        with self.pace.waiting():
            return self._wait_for(number, warn, self.cache)

    def _wait_for(self, number: int, warn: bool, cache: ShardCache) -> int | None:
        shard = self.shards[number]
        waited = False
        until = time.monotonic() + 2 * self.limits.deadline_seconds + shard.size / 1e6
        while True:
            descriptor = cache.lookup(shard.key, shard.size)
            if descriptor is not None:
                return descriptor
            if self.stop.is_set():
                raise StoppedError(f"{shard.name}: not read, the loader was closed")

            # Another thread of this process may be fetching it.
            with self._change:
                failure = self._failures.pop(number, None)
                if waited and failure is not None:  # all its tries have just been made
                    raise failure
                waited = number in self._busy
                if waited:
                    self._change.wait(_POLL_SECONDS)
                else:
                    self._busy.add(number)
            if waited:
                continue

            here = False
            try:
                here = self._bring(number, keep=())
            except NoRoomError as error:
                if self._others_end(number, until):
                    continue
                if warn:
                    self._warn(error)
                return None
            finally:
                self._release(number, None, brought=here)

            # Another process fetches it.
            if not here:
                if time.monotonic() > until:
                    raise RemoteError(
                        f"{shard.name}: another process has been fetching it for too long: end "
                        "that one"
                    )
                self.stop.wait(_POLL_SECONDS)

    def _others_end(self, number: int, until: float) -> bool:
        """Wait for the shards that are being fetched ahead, and take the room; False if there are
        none."""
        with self._change:
            if not self._busy - {number}:
                return False
            self._urgent = True  # no further shard is fetched ahead until then
            try:
                while self._busy - {number} and not self.stop.is_set() and time.monotonic() < until:
                    self._change.wait(_POLL_SECONDS)
            finally:
                self._urgent = False
            return time.monotonic() < until

    def take(self) -> int | None:
        """The next shard to fetch ahead; None when there has been none for a while."""
        assert self.cache is not None  # noqa: S101 - a type: shards are fetched into a cache
        idle_since = time.monotonic()
        with self._work:
            while not self.stop.is_set() and self._threads <= self.pace.width:
                now = time.monotonic()
                missing = self._missing if not self._urgent else []
                ready = (n for n in missing if n not in self._busy)
                number = next((n for n in ready if self._not_before.get(n, 0.0) <= now), None)
                if number is not None and self.cache.holds(self.shards[number].key):
                    self._missing.remove(number)  # another process has brought it
                    continue
                if number is not None:
                    self._busy.add(number)
                    return number
                if now - idle_since > _IDLE_SECONDS:
                    break
                self._work.wait(4 * _POLL_SECONDS)
            self._threads -= 1
            return None

    def fetch_ahead(self, number: int) -> None:
        """Fetch a shard ahead of its use; an error is raised when it is used."""
        pause = 0.0
        failure = None
        brought = False
        try:
            keep = {self.shards[n].key for n in self._wanted}
            brought = self._bring(number, keep)
            pause = 0.0 if brought else 4 * _POLL_SECONDS
        except NoRoomError:
            self.pace.no_room()
            pause = _NO_ROOM_SECONDS
        except BaseException as error:
            pause = _FAILED_SECONDS
            failure = error
        self._release(number, failure, pause, brought)

    def _bring(self, number: int, keep: Sequence[str] | set[str]) -> bool:
        """Fetch a shard; False if another thread or process does."""
        assert self.cache is not None  # noqa: S101 - a type: shards are fetched into a cache
        shard = self.shards[number]
        part = self.cache.claim(shard.key, shard.size, keep)
        if part is None:
            return False
        try:
            download(shard, part, self.limits, self.stop, self)
            self.cache.finish(shard.key, part)
            self.pace.ended()
        except OSError as error:  # the disk is full in spite of all
            self.cache.abandon(part)
            raise NoRoomError(f"{self.cache.folder}: {error.strerror}") from error
        except RemoteError:
            if os.fstat(part.descriptor).st_size == 0:
                self.cache.abandon(part)
            raise
        finally:
            part.close()
        return True

    def _release(
        self,
        number: int,
        failure: BaseException | None,
        pause: float = 0.0,
        brought: bool = False,
    ) -> None:
        with self._change:
            self._busy.discard(number)
            if brought and number in self._missing:
                self._missing.remove(number)
            self._not_before[number] = time.monotonic() + pause
            if failure is not None:
                self._failures[number] = failure
            self._start_threads()
            self._change.notify_all()

    def _warn(self, error: NoRoomError) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{error}. Images are read from the server one by one, which is slow: give the "
                "shard cache more room (--data.cache-size-gb, --data.cache-dir) or shuffle fewer "
                "shards together (--data.shuffle-window)",
                RuntimeWarning,
                stacklevel=2,
            )


def _work(state: _State) -> None:
    """A fetching thread: until there is nothing to do."""
    while (number := state.take()) is not None:
        state.fetch_ahead(number)
