"""The tars of a check, local or of a server: their state, by which an interrupted check knows those
that it has finished; and their ends and single images, for a check of a sample.

A sample of tars of a server is read by ranges. The bytes are put at their offsets into sparse files
of this machine, so that the decoding processes read local and remote images in the same way.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import Any

from fastmoco_pipelines.files.small import UnfitFileError
from fastmoco_pipelines.files.whole import hash_file
from fastmoco_pipelines.formats.index import (
    END_BYTES,
    fits_tar,
    index_bytes,
    index_file,
    open_index,
    tar_hash,
)
from fastmoco_pipelines.formats.index_file import IndexFile, IndexHeader
from fastmoco_pipelines.sets.remote_set import THREADS
from fastmoco_pipelines.sets.whole_tars import Copy, LocalTars, RemoteTars
from fastmoco_pipelines.stores.transfer import read_range
from fastmoco_pipelines.views.decode_pool import Item

_NO_RANGES = (
    "so that a sample would cost as much as everything: check the whole set, without --sample"
)
State = dict[str, Any]
"""What identifies the content of a tar and of its index, as JSON; another state: check again."""


class LocalCheckTars(LocalTars):
    """Tars of this machine."""

    def skip(self, numbers: Iterable[int]) -> None:
        """These tars are not asked for: nothing to do."""

    def state(self, number: int) -> State | None:
        """The state of a tar now; None where it cannot be read."""
        path = self.paths[number]
        with suppress(OSError, UnfitFileError):
            info = path.stat()
            return {
                "bytes": info.st_size,
                "mtime_ns": info.st_mtime_ns,
                # `rsync -a` replaces a tar by one of the same size and time
                "inode": info.st_ino,
                "ctime_ns": info.st_ctime_ns,
                "ends": tar_hash(path),
                "index": _content_hash(index_file(path)),
            }
        return None

    def state_at_hand(self, number: int) -> State | None:
        """The same, while `at_hand` holds the tar."""
        return self.state(number)

    def index(self, number: int) -> IndexFile | None:
        """The index of a tar, fitting or not; None where there is none.

        Raises:
            ShardError: if it is broken.
        """
        path = index_file(self.paths[number])
        return None if path is None else open_index(path.name, index_bytes(path))

    def fits(self, number: int, index: IndexHeader) -> bool:
        """Whether an index was made for this state of a tar, by size and hash."""
        return fits_tar(index, self.paths[number])

    @contextmanager
    def images(self, wanted: Mapping[int, Sequence[Item]]) -> Iterator[None]:
        """Some images of some tars, by number, to be read at their offsets in `paths`."""
        yield


class RemoteCheckTars(RemoteTars):
    """Tars of servers."""

    _skipped: frozenset[int] = frozenset()

    def skip(self, numbers: Iterable[int]) -> None:
        """These tars are not asked for: they are not fetched ahead either, where an open copy would
        take the room of others."""
        self._skipped = frozenset(numbers)

    def _fetch(self, number: int) -> Copy:
        return Copy(None, None) if number in self._skipped else super()._fetch(number)

    def state(self, number: int) -> State | None:
        """The state of a tar on the server; None where the server gives nothing that changes with
        it."""
        return self._state(number, self._index(self._urls[number])[1])

    def state_at_hand(self, number: int) -> State | None:
        """The same, of the tar and the index that `at_hand` holds."""
        path = index_file(self.paths[number])
        return self._state(number, None if path is None else path.read_bytes())

    def _state(self, number: int, index: bytes | None) -> State | None:
        head = self._heads[self._urls[number]]
        if not head.validator:
            return None
        digest = None if index is None else hashlib.sha256(index).hexdigest()
        return {"bytes": head.size, "validator": head.validator, "index": digest}

    def index(self, number: int) -> IndexFile | None:
        """The index of a tar, fitting or not; None where there is none.

        Raises:
            ShardError: if it is broken; RemoteError, which is one, if the server fails.
        """
        return self._files.find_index(self._urls[number])

    def fits(self, number: int, index: IndexHeader) -> bool:
        """Whether an index was made for this state of a tar, by size and hash."""
        size = self.sizes[number]
        if index.tar_bytes != size:
            return False
        first = self._read(number, 0, min(size, END_BYTES))
        start = max(0, size - END_BYTES)
        last = self._read(number, start, size - start)
        return hashlib.sha256(first + last).hexdigest() == index.tar_hash

    @contextmanager
    def images(self, wanted: Mapping[int, Sequence[Item]]) -> Iterator[None]:
        """Some images of some tars, by number, fetched to be read at their offsets in `paths`."""
        try:
            for number in wanted:
                with open(self.paths[number], "wb") as file:
                    file.truncate(self.sizes[number])
            parts = [(number, item) for number, items in wanted.items() for item in items]
            with ThreadPoolExecutor(
                min(THREADS, max(1, len(parts))), thread_name_prefix="fastmoco-sample"
            ) as pool:
                for _ in pool.map(lambda part: self._bring_image(*part), parts):
                    pass
            yield
        finally:
            for number in wanted:
                self.paths[number].unlink(missing_ok=True)

    def _bring_image(self, number: int, item: Item) -> None:
        """Bytes that differ from the index are requested once more: they may have been damaged on
        the way."""
        data = self._read(number, item.offset, item.size)
        if zlib.crc32(data) != item.crc32:
            data = self._read(number, item.offset, item.size)
        with open(self.paths[number], "r+b") as file:
            os.pwrite(file.fileno(), data, item.offset)

    def _read(self, number: int, start: int, size: int) -> bytes:
        """Some bytes of a tar, straight from the server."""
        if not size:
            return b""
        url = self._urls[number]
        return read_range(url, start, size, self._limits, Event(), cure=_NO_RANGES)


def _content_hash(path: Path | None) -> str | None:
    """SHA-256 (hex) of a file; None where there is none."""
    try:
        return None if path is None else hash_file(path)
    except UnfitFileError as error:  # the check of the tar reports it
        return str(error)
