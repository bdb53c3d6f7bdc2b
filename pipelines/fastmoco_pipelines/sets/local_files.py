"""The bytes of local shards by (shard, offset, size).

One thread at a time may use such an object: ShardSet ensures that, and checks the bytes.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from fastmoco_pipelines.errors import ShardError
from fastmoco_pipelines.files.small import UnfitFileError, open_regular
from fastmoco_pipelines.files.whole import OWN_TROUBLE, read_at
from fastmoco_pipelines.formats.quarantine import NAME, Quarantine, read_list

MAX_OPEN_FILES = 128  # a process may hold 1024 by default, and several sets are open at once
# seconds before a local file is tried again: file systems on a network have hiccups
_PAUSES = (0.05, 0.45)

T = TypeVar("T")
Place = tuple[int, int, int]
"""Shard, offset and size in bytes."""
ReadFault = ShardError | OSError
"""Why one sample could not be read: a value beside the bytes of the others."""


class _NotOpenedError(ShardError):
    """A shard cannot be opened: no place of it can be read."""


class LocalFiles:
    """Local shards, read in place."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = tuple(paths)
        self._open: OrderedDict[int, int] = OrderedDict()
        self._folders = sorted(map(Path, {os.path.dirname(path) for path in paths}))
        # Shard and offset of the current read, for the report of a read that hangs.
        self.reading = (0, 0)
        # Shards that have failed all tries: the next read tries them once, without pauses.
        self._failing: set[int] = set()

    def read(self, places: Sequence[Place]) -> list[bytes | ReadFault]:
        """The bytes at some places, fewer where a file ends earlier; an error where they cannot be
        read, which names the file and comes after three tries.

        Only the first place of a shard that fails is waited for, so that a lost shard costs half a
        second, however many of its samples are asked for.

        Raises:
            ShardError: where this process may open no more files: then nothing can be read.
        """
        found: list[bytes | ReadFault] = []
        failed: dict[int, ReadFault] = {}
        for place in places:
            shard = place[0]
            if isinstance(failed.get(shard), _NotOpenedError):
                found.append(failed[shard])
                continue
            try:
                found.append(self._read(*place))
            except (ShardError, OSError) as error:
                if is_own_trouble(error):
                    raise
                found.append(error)
                failed[shard] = error
                self._failing.add(shard)
            else:
                if shard not in failed:
                    self._failing.discard(shard)
        return found

    def will_need(self, places: Sequence[Place]) -> None:
        """Ask the operating system to fetch these places from the disk in the background."""
        for shard, offset, size in places:
            os.posix_fadvise(self._descriptor(shard), offset, size, os.POSIX_FADV_WILLNEED)

    def renew(self, shard: int) -> None:
        """Throw away a damaged copy; here there is none."""

    def quarantine(self) -> tuple[Quarantine, list[str]]:
        """The lists beside the shards, as one, and what is wrong with them, in sentences."""
        found = Quarantine()
        problems = []
        for folder in self._folders:
            read, problem = read_list(folder / NAME)
            found.update(read)
            problems += [problem] if problem else []
        return found, problems

    def close(self) -> None:
        """Close the files; a later `read` opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        self.reading = (shard, offset)

        def read() -> bytes:
            descriptor = self._descriptor(shard)
            try:
                return read_at(descriptor, size, offset)
            except OSError:
                os.close(self._open.pop(shard))  # a stale handle stays stale
                raise

        return self._tried(shard, read, ShardError, f"cannot be read at byte {offset}")

    def _descriptor(self, shard: int) -> int:
        """An open descriptor of a shard; the one unused for longest is closed when there are too
        many."""
        descriptor = self._open.get(shard)
        if descriptor is not None:
            self._open.move_to_end(shard)
            return descriptor
        while len(self._open) >= MAX_OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        self._open[shard] = self._tried(
            shard,
            lambda: open_regular(self._paths[shard]),
            _NotOpenedError,
            "cannot be opened any more",
        )
        return self._open[shard]

    def _tried(
        self, shard: int, attempt: Callable[[], T], error_type: type[ShardError], problem: str
    ) -> T:
        """`tried`, once for a shard that failed before."""
        name = os.path.basename(self._paths[shard])
        return tried(attempt, f"{name}: {problem}", error_type, once=shard in self._failing)


def tried(
    attempt: Callable[[], T],
    problem: str,
    error_type: type[ShardError] = ShardError,
    *,
    once: bool = False,
) -> T:
    """The result of the first attempt that succeeds: of three with pauses, or of one.

    Args:
        attempt: raises OSError where it fails, UnfitFileError where another try cannot help.
        problem: names the file, and what cannot be done with it.
        error_type: of the error after the last attempt.
        once: make one attempt.
    """
    for pause in (None,) if once else (*_PAUSES, None):
        try:
            return attempt()
        except UnfitFileError as error:
            raise error_type(f"{problem} ({error}).") from error
        except OSError as error:
            if pause is None:
                raise error_type(f"{problem} ({error.strerror}).") from error
            time.sleep(pause)
    raise AssertionError


def is_own_trouble(fault: ReadFault) -> bool:
    """Whether a fault is of this machine (files or memory that a process may have), not of a
    shard."""
    cause = fault if isinstance(fault, OSError) else fault.__cause__
    return isinstance(cause, OSError) and cause.errno in OWN_TROUBLE
