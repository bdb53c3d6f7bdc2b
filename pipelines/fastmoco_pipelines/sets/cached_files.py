"""The bytes of remote shards by (shard, offset, size), from copies in the shard cache.

One thread at a time may use such an object, except for `cancel`: ShardSet ensures that, and checks
the bytes.
"""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Event
from typing import TYPE_CHECKING

from fastmoco_pipelines.errors import ShardError, StoppedError
from fastmoco_pipelines.files.whole import read_at
from fastmoco_pipelines.formats.quarantine import Quarantine
from fastmoco_pipelines.sampling.window import ShardWindows
from fastmoco_pipelines.sets.local_files import (
    MAX_OPEN_FILES,
    Place,
    ReadFault,
    is_own_trouble,
)
from fastmoco_pipelines.spec import CacheSpec

if TYPE_CHECKING:
    from fastmoco_pipelines.stores.cache import ShardCache
    from fastmoco_pipelines.stores.fetcher import ShardFetcher

# Copies of remote shards that are held in the cache where the next ones are unknown.
MAX_UNPLANNED_COPIES = 4


class CachedFiles:
    """Shards of a server, read from copies in the cache. An open copy is not evicted.

    `quarantine` fetches the lists beside them again each time; see `fetch_lists`.
    """

    def __init__(
        self,
        fetcher: ShardFetcher,
        count: int,
        lists: Callable[[], tuple[Quarantine, list[str]]],
        stop: Event,
    ) -> None:
        self._stop = stop  # of transfers of indexes
        self._fetcher = fetcher
        self._count = count
        self._lists = lists
        self._open: OrderedDict[int, int] = OrderedDict()
        self.reading = (0, 0)
        self._planned: set[int] | None = None
        self._renewed: set[int] = set()

    def read(self, places: Sequence[Place]) -> list[bytes | ReadFault]:
        """The bytes at some places; an error, which names the URL, where they cannot be read.

        Shard by shard, so that one that must be fetched is fetched once.

        Raises:
            StoppedError: after `cancel`.
        """
        by_shard: dict[int, list[int]] = {}
        for i, (shard, _, _) in enumerate(places):
            by_shard.setdefault(shard, []).append(i)
        if self._planned is None:  # in the order of the set, as evaluation reads it
            last = max(by_shard, default=0)
            after = range(last + 1, min(last + 3, self._count))
            self._fetcher.want([shard for shard in (*by_shard, *after) if shard not in self._open])
        found: dict[int, bytes | ReadFault] = {}
        for shard, members in by_shard.items():
            ranges = [places[i][1:] for i in members]
            self.reading = (shard, 0)
            try:
                found |= zip(members, self._read_ranges(shard, ranges), strict=True)
            except StoppedError:
                raise
            except (ShardError, OSError) as error:
                if is_own_trouble(error):
                    raise
                found |= dict.fromkeys(members, error)
        return [found[i] for i in range(len(places))]

    def quarantine(self) -> tuple[Quarantine, list[str]]:
        """The lists beside the shards, as one, and what is wrong with them, in sentences. A shard
        that has changed on the server, and was checked since, is read in its new state from now
        on."""
        from fastmoco_pipelines.sets.remote_set import as_checked

        found, problems = self._lists()
        if found.checked:
            limits = self._fetcher.limits
            self._fetcher.change(lambda shards: as_checked(shards, found.checked.values(), limits))
        return found, problems

    def will_need(self, places: Sequence[Place]) -> None:
        """As for local files, for open copies only: this never waits for a server."""
        for shard, offset, size in places:
            if shard in self._open:
                os.posix_fadvise(self._open[shard], offset, size, os.POSIX_FADV_WILLNEED)

    def follow(self, windows: ShardWindows, *, seed: int, epoch: int, position: int) -> None:
        """Fetch the shards around a position of an epoch's order and those after them; release the
        others."""
        self._planned = self._fetcher.follow(windows, seed=seed, epoch=epoch, position=position)
        for shard in self._open.keys() - self._planned:
            os.close(self._open.pop(shard))

    def renew(self, shard: int) -> None:
        """Throw away a damaged copy, once for each shard; the next `read` fetches another."""
        if shard in self._renewed:
            return
        self._renewed.add(shard)
        if shard in self._open:
            os.close(self._open.pop(shard))
        self._fetcher.discard(shard)

    def cancel(self) -> None:
        """End a wait for a server in any thread: `read` raises there."""
        self._stop.set()
        self._fetcher.cancel()

    def close(self) -> None:
        """End the transfers and release the copies; a later `read` starts again."""
        while self._open:
            os.close(self._open.popitem()[1])
        self._planned = None
        self._fetcher.close()
        self._stop.clear()

    def _read_ranges(self, shard: int, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        descriptor = self._descriptor(shard)
        if descriptor is not None:
            # The disk of the cache fails: the server still has the bytes.
            with suppress(OSError):
                return [read_at(descriptor, size, offset) for offset, size in ranges]
        return self._fetcher.read(shard, ranges)

    def _descriptor(self, shard: int) -> int | None:
        """A descriptor of a copy; None where none can be kept."""
        if shard not in self._open:
            most = MAX_UNPLANNED_COPIES if self._planned is None else MAX_OPEN_FILES
            while len(self._open) >= most:
                os.close(self._open.popitem(last=False)[1])
            let_go = self._planned is None and len(self._open) > 0
            descriptor = self._fetcher.open(shard, warn=not let_go)
            # read in the order of the set, they have probably served
            if descriptor is None and let_go:
                while self._open:
                    os.close(self._open.popitem()[1])
                descriptor = self._fetcher.open(shard)
            if descriptor is None:
                return None
            self._open[shard] = descriptor
        self._open.move_to_end(shard)
        return self._open[shard]


def open_cache(spec: CacheSpec) -> ShardCache | None:
    """The cache of a spec; None, with a warning, where its folder can be neither found nor made.

    Raises:
        ValueError: if the folder is not this user's alone.
    """
    from fastmoco_pipelines.stores.cache import ShardCache

    try:
        return ShardCache.open(spec)
    except OSError as error:
        warnings.warn(
            f"the shard cache cannot be used ({error}): images are read from the server one by "
            "one, which is slow: give --data.cache-dir a folder that can be written",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
