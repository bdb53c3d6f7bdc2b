"""The samples of a set by number: what the indexes say of them, loaded shard by shard."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastmoco_pipelines.errors import LostIndexError, ShardError, StoppedError
from fastmoco_pipelines.files.whole import drop_pages
from fastmoco_pipelines.formats.index_file import RECORD, IndexFile, IndexHeader

SHARD = np.dtype(
    [
        ("samples", "<u4"),
        ("skipped", "<u4"),
        ("unlabelled", "<u4"),
        ("tar_bytes", "<i8"),
        ("content", "V32"),
        ("seal", "V32"),
    ]
)
"""What is kept of the header of a shard's index; see `IndexHeader`."""
CHECKED_AT_OPENING = 64 << 20
"""Records of a set, in bytes, that are all loaded and checked when it is opened (2.8 million
samples); those of a larger one are, shard by shard, at the first use."""
LOADED_BYTES = 512 << 20
"""Size of the indexes that are loaded at the same time, at most; they are memory-mapped, and all
processes of a machine share the pages."""
LOADED_FILES = 4096
"""Their number: a process may have 65,530 mappings, and each takes some kB of its own memory."""


def shard_row(header: IndexHeader) -> tuple[int, int, int, int, bytes, bytes]:
    """The row of a header in an array of `SHARD`."""
    return (
        header.samples,
        header.skipped,
        header.unlabelled,
        header.tar_bytes,
        bytes.fromhex(header.content),
        header.seal,
    )


class Indexes(Protocol):
    """The indexes of the shards of a set."""

    @property
    def shards(self) -> NDArray[Any]:
        """[shards] `SHARD`."""
        ...

    def load(self, shard: int) -> IndexFile:
        """The whole index of a shard; its sections are not checked yet.

        Raises:
            ShardError: if it cannot be read, or is another one than when the set was opened.
        """
        ...


class Records:
    """The records of all samples of a set. Any thread may use it.

    Attributes:
        first: [shards + 1] int64: shard s holds the samples first[s] to first[s + 1] - 1.
    """

    def __init__(self, indexes: Indexes) -> None:
        self.first = np.zeros(len(indexes.shards) + 1, dtype=np.int64)
        np.cumsum(indexes.shards["samples"], out=self.first[1:])
        self._indexes = indexes
        self._lock = threading.RLock()
        self._loaded: OrderedDict[int, IndexFile] = OrderedDict()
        self._loaded_bytes = 0
        # The state of each index whose records were checked: loaded again, it is not checked again.
        self._checked: dict[int, tuple[int, ...] | None] = {}

    def shard_of(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """[B]: the shard of each sample."""
        return np.searchsorted(self.first, sample_ids, side="right") - 1

    def of(
        self, sample_ids: NDArray[np.int64], lost: dict[int, LostIndexError] | None = None
    ) -> NDArray[Any]:
        """[B] `RECORD`: the record of each sample.

        Args:
            sample_ids: [B] int64, each in [0, number of samples).
            lost: gets the error of each shard whose index is lost or broken; the records of its
                samples are 0. None: the first such error is raised.

        Raises:
            LostIndexError: naming the index.
            StoppedError: after a server's set was cancelled.
        """
        sample_ids = np.asarray(sample_ids, dtype=np.int64)
        found = np.zeros(len(sample_ids), dtype=RECORD)
        for shard, rows in self._by_shard(sample_ids):
            try:
                found[rows] = self.of_shard(shard)[sample_ids[rows] - self.first[shard]]
            except LostIndexError as error:
                if lost is None:
                    raise
                lost[shard] = error
        return found

    def of_shard(self, shard: int) -> NDArray[Any]:
        """[samples] `RECORD`: the records of one shard, read-only.

        Raises:
            LostIndexError: if its index cannot be read or is broken.
        """
        with self._lock:
            file = self.file(shard)
            if file.state is not None and self._checked.get(shard) == file.state:
                return file.unchecked_records()
            try:
                records = file.records
            except ShardError as error:
                self._forget(shard)
                raise LostIndexError(str(error)) from error.__cause__ or error
            self._checked[shard] = file.state
            return records

    def paths_of(self, sample_ids: NDArray[np.int64]) -> list[str]:
        """The path of each sample's original file, or its name in the tar.

        Raises:
            ShardError: if an index is lost, or its paths are damaged.
        """
        found = [""] * len(sample_ids)
        for shard, places in self._by_shard(sample_ids):
            rows = (sample_ids[places] - self.first[shard]).tolist()
            for place, path in zip(places.tolist(), self.file(shard).paths(rows), strict=True):
                found[place] = path
        return found

    def _by_shard(self, sample_ids: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Each shard with some of the samples, and the places of these among `sample_ids`."""
        shards = self.shard_of(sample_ids)
        order = np.argsort(shards, kind="stable")
        numbers, starts = np.unique(shards[order], return_index=True)
        yield from zip(numbers.tolist(), np.split(order, starts[1:]), strict=False)

    def check(self) -> None:
        """Load and check every index now, names too. The newest ones stay mapped, so a shard that
        vanishes later leaves its index; their pages are given back.

        Raises:
            ShardError: naming the first index that is broken.
        """
        for shard in range(len(self.first) - 1):
            self.of_shard(shard)
            file = self.file(shard).check()
            if isinstance(file.data, memoryview):
                drop_pages(file.data)

    def all(self) -> Iterator[NDArray[Any]]:
        """The records of every shard, one after another."""
        for shard in range(len(self.first) - 1):
            yield self.of_shard(shard)

    def file(self, shard: int) -> IndexFile:
        """The index of a shard.

        Raises:
            LostIndexError: if it cannot be read.
        """
        with self._lock:
            known = self._loaded.get(shard)
            if known is not None:
                self._loaded.move_to_end(shard)
                return known
            try:
                file = self._indexes.load(shard)
            except StoppedError:
                raise
            except ShardError as error:
                raise LostIndexError(str(error)) from error.__cause__ or error
            self._loaded[shard] = file
            self._loaded_bytes += file.size
            while len(self._loaded) > 1 and self._too_much():
                self._forget(next(iter(self._loaded)))
            return file

    def _too_much(self) -> bool:
        return self._loaded_bytes > LOADED_BYTES or len(self._loaded) > LOADED_FILES

    def _forget(self, shard: int) -> None:
        file = self._loaded.pop(shard, None)
        self._loaded_bytes -= 0 if file is None else file.size
