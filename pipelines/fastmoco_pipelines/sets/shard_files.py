"""The bytes of shards by (shard, offset, size): from local files, or from copies of what lies on a server.

One thread at a time may use such an object, but for ``cancel``: ShardSet sees to that, and checks the bytes.
"""

from __future__ import annotations

import os
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fastmoco_pipelines.errors import ShardError
from fastmoco_pipelines.formats.quarantine import NAME, Quarantine, read_list
from fastmoco_pipelines.sampling.window import ShardWindows
from fastmoco_pipelines.spec import CacheSpec

if TYPE_CHECKING:
    from fastmoco_pipelines.stores.cache import ShardCache
    from fastmoco_pipelines.stores.fetcher import ShardFetcher

MAX_OPEN_FILES = 128  # a process may hold 1024 by default, and several sets are open at once
MAX_UNPLANNED_COPIES = 4  # copies of remote shards held in the cache where nobody has said which ones come next
_PAUSES = (0.05, 0.45)  # seconds before a local file is tried again: file systems on a network have hiccups

Place = tuple[int, int, int]
"""Shard, offset and size in bytes."""


class LocalFiles:
    """Shards that are read where they lie."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)
        self._open: OrderedDict[int, int] = OrderedDict()
        self._folders = sorted({path.parent for path in paths})
        self.reading = (0, 0)  # shard and offset of what is being read: where a read that hangs, hangs

    def read(self, places: Sequence[Place]) -> list[bytes]:
        """The bytes at some places; fewer where a file ends earlier.

        Raises:
            ShardError: naming the file that cannot be opened or read, also on a second and third try.
        """
        return [self._read(*place) for place in places]

    def will_need(self, places: Sequence[Place]) -> None:
        """Ask the operating system to fetch these places from the disk in the background."""
        for shard, offset, size in places:
            os.posix_fadvise(self._descriptor(shard), offset, size, os.POSIX_FADV_WILLNEED)

    def renew(self, shard: int) -> bool:
        """Whether reading damaged bytes again may help; here it does not."""
        del shard
        return False

    def quarantine(self) -> tuple[Quarantine, list[str]]:
        """The lists beside the shards, as one, and what is wrong with them, in sentences."""
        lists = [read_list(folder / NAME) for folder in self._folders]
        return Quarantine(entry for entries, _ in lists for entry in entries), [text for _, text in lists if text]

    def close(self) -> None:
        """Close the files; a later ``read`` opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        self.reading = (shard, offset)
        for pause in (*_PAUSES, None):
            descriptor = self._descriptor(shard)
            try:
                return _read_at(descriptor, size, offset)
            except OSError as error:
                os.close(self._open.pop(shard))  # a stale handle is of no use any more
                if pause is None:
                    name = self._paths[shard].name
                    raise ShardError(f"{name}: cannot be read at byte {offset} ({error.strerror}).") from error
                time.sleep(pause)
        raise AssertionError

    def _descriptor(self, shard: int) -> int:
        """An open descriptor of a shard; the one unused for longest is closed when there are too many."""
        descriptor = self._open.get(shard)
        if descriptor is not None:
            self._open.move_to_end(shard)
            return descriptor
        while len(self._open) >= MAX_OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        for pause in (*_PAUSES, None):
            try:
                self._open[shard] = os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC)
                break
            except OSError as error:
                if pause is None:
                    name = self._paths[shard].name
                    raise ShardError(f"{name}: cannot be opened any more ({error.strerror}).") from error
                time.sleep(pause)
        return self._open[shard]


class RemoteFiles:
    """Shards of a server, read from copies in the cache. An open copy is not evicted.

    ``quarantine`` fetches the lists beside them, anew each time; see ``fetch_lists``.
    """

    def __init__(self, fetcher: ShardFetcher, count: int, lists: Callable[[], tuple[Quarantine, list[str]]]) -> None:
        self._fetcher = fetcher
        self._count = count
        self.quarantine = lists
        self._open: OrderedDict[int, int] = OrderedDict()
        self.reading = (0, 0)
        self._planned: set[int] | None = None
        self._renewed: set[int] = set()

    def read(self, places: Sequence[Place]) -> list[bytes]:
        """The bytes at some places. Shard by shard, so that one that must be fetched is fetched once.

        Raises:
            RemoteError: naming the URL and the cause.
        """
        by_shard: dict[int, list[int]] = {}
        for i, (shard, _, _) in enumerate(places):
            by_shard.setdefault(shard, []).append(i)
        if self._planned is None:  # in the order of the set, as evaluation reads it
            last = max(by_shard, default=0)
            after = range(last + 1, min(last + 3, self._count))
            self._fetcher.want([shard for shard in (*by_shard, *after) if shard not in self._open])
        found: dict[int, bytes] = {}
        for shard, members in by_shard.items():
            ranges = [places[i][1:] for i in members]
            self.reading = (shard, 0)
            found.update(zip(members, self._read_ranges(shard, ranges), strict=True))
        return [found[i] for i in range(len(places))]

    def will_need(self, places: Sequence[Place]) -> None:
        """As for local files, of what is at hand: here nobody waits for a server."""
        for shard, offset, size in places:
            if shard in self._open:
                os.posix_fadvise(self._open[shard], offset, size, os.POSIX_FADV_WILLNEED)

    def follow(self, windows: ShardWindows, *, seed: int, epoch: int, position: int) -> None:
        """Fetch the shards around a position of an epoch's order and those after them; let go of the others."""
        self._planned = self._fetcher.follow(windows, seed=seed, epoch=epoch, position=position)
        for shard in self._open.keys() - self._planned:
            os.close(self._open.pop(shard))

    def renew(self, shard: int) -> bool:
        """Throw away a damaged copy, once for each shard: whether it is worth another try."""
        if shard in self._renewed:
            return False
        self._renewed.add(shard)
        if shard in self._open:
            os.close(self._open.pop(shard))
        self._fetcher.discard(shard)
        return True

    def cancel(self) -> None:
        """End a wait for a server, in whichever thread it is: there ``read`` raises."""
        self._fetcher.cancel()

    def close(self) -> None:
        """End the transfers and let go of the copies; a later ``read`` begins again."""
        while self._open:
            os.close(self._open.popitem()[1])
        self._planned = None
        self._fetcher.close()

    def _read_ranges(self, shard: int, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        descriptor = self._descriptor(shard)
        if descriptor is not None:
            with suppress(OSError):  # the disk under the cache gives up: the server still has what it held
                return [_read_at(descriptor, size, offset) for offset, size in ranges]
        return self._fetcher.read(shard, ranges)

    def _descriptor(self, shard: int) -> int | None:
        """A descriptor of a copy; None where none can be kept."""
        if shard not in self._open:
            most = MAX_UNPLANNED_COPIES if self._planned is None else MAX_OPEN_FILES
            while len(self._open) >= most:
                os.close(self._open.popitem(last=False)[1])
            let_go = self._planned is None and len(self._open) > 0
            descriptor = self._fetcher.open(shard, warn=not let_go)
            if descriptor is None and let_go:  # read in the order of the set, they have probably served
                while self._open:
                    os.close(self._open.popitem()[1])
                descriptor = self._fetcher.open(shard)
            if descriptor is None:
                return None
            self._open[shard] = descriptor
        self._open.move_to_end(shard)
        return self._open[shard]


def _read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Bytes of a file, fewer only where it ends: file systems on a network may hand out less than was asked for."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more
    return data


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
            f"the shard cache cannot be used ({error}): images are read from the server one by one, which is slow: give "
            "--data.cache-dir a folder that can be written",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
