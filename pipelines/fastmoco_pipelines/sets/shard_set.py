"""A set of shards as one list of samples: the tars, the position of each image, and its checked
bytes. Local shards are read in place; those of a server through copies in a cache
(stores/fetcher.py), with the same checks. Nothing here starts a process, follows a link inside a
tar or unpickles anything.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import zlib
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fastmoco_pipelines.errors import ShardError, StructureError
from fastmoco_pipelines.formats.headers import image_size
from fastmoco_pipelines.formats.images import MAX_PIXELS, MAX_PIXELS_PER_BYTE, MAX_SIDE
from fastmoco_pipelines.formats.index import CURE, ShardIndex, read_index
from fastmoco_pipelines.formats.manifest import FolderOfShards, check_folders, read_sets
from fastmoco_pipelines.formats.quarantine import Quarantine
from fastmoco_pipelines.sampling.window import ShardWindows, default_window
from fastmoco_pipelines.sets.cached_files import CachedFiles, open_cache
from fastmoco_pipelines.sets.local_files import LocalFiles, Place, ReadFault
from fastmoco_pipelines.sets.patterns import expand_shards, is_remote, without_scheme
from fastmoco_pipelines.spec import CacheSpec
from fastmoco_pipelines.stores.retries import Limits

__all__ = ["ShardError", "ShardSet", "expand_shards"]


class ShardSet:
    """All samples of some shards under one running number, the sample id: shard by shard, in file
    order.

    Attributes:
        labels: [n] int64, -1 = none.
        sizes: [n, 2] int32: height, width in pixels by the image's header, before any EXIF
            rotation.
        classes: class names by label; empty where no manifest contains them.
        digest: SHA-256 (hex) over every sample's checksum, size and label in order: the identity of
            the data, wherever the files are stored.
        skipped: members of the tars that are no usable image, counted when they were indexed.

    Any thread may use it: one reads ahead while another reads the stand-ins of bad samples.
    """

    def __init__(
        self,
        names: Sequence[str],
        indexes: Sequence[ShardIndex],
        classes: tuple[str, ...],
        files: LocalFiles | CachedFiles,
    ) -> None:
        self.classes = classes
        self.skipped = sum(len(index.skipped) for index in indexes)
        self._names = tuple(names)
        self._files = files
        # The files close the least recently used descriptor.
        self._lock = threading.RLock()
        self._largest = max(index.tar_bytes for index in indexes)
        self._keys = [index.keys for index in indexes]
        self._extensions = [
            [sys.intern(extension) for extension in index.extensions] for index in indexes
        ]

        # The columns of all indexes, one below the other.
        counts = [len(index) for index in indexes]
        self._first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._shard = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        column = {
            name: np.concatenate([_column(i, name) for i in indexes]) for name in indexes[0].columns
        }
        self.labels: NDArray[np.int64] = column["label"]
        self.sizes: NDArray[np.int32] = np.stack(
            [column["height"], column["width"]], axis=1
        ).astype(np.int32)
        self._offset = column["offset"]
        self._size = column["size"]
        self._crc32 = column["crc32"]

        _check_budget(self)
        identity = np.stack(
            [column[name] for name in ("crc32", "size", "label", "height", "width")]
        )
        self.digest: str = hashlib.sha256(
            b"fastmoco-set-1" + identity.astype("<i8").tobytes()
        ).hexdigest()

    @classmethod
    def open(
        cls, pattern: str, *, cache: CacheSpec | None = None, limits: Limits | None = None
    ) -> Self:
        """Open the shards that `pattern` names, through the indexes beside them.

        Args:
            pattern: as for `expand_shards`; or `https://`, `http://`, `s3://` or `gs://` with
                braces, with `*` in the file's name, or of a folder (with `/` at the end).
            cache: where shards from a server are kept; None: the default folder and size.
            limits: times and tries of each transfer; None: the defaults.

        Raises:
            ValueError: if the pattern names no shard, or its scheme is not read.
            ShardError: if an index is missing, broken or stale, a shard of a packed set is missing,
                or shards of different sets number their classes differently; RemoteError, which is
                one, if a server fails.
        """
        if is_remote(pattern):
            from fastmoco_pipelines.sets.remote_set import fetch_lists, open_remote
            from fastmoco_pipelines.stores.fetcher import ShardFetcher

            kept = open_cache(cache or CacheSpec())
            limits = limits or Limits()
            remote = open_remote(pattern, kept, limits)
            names = [shard.name for shard in remote.shards]
            lists = partial(fetch_lists, remote.folders, limits)
            files = CachedFiles(ShardFetcher(remote.shards, kept, limits), len(names), lists)
            return cls(names, remote.indexes, remote.classes, files)
        paths = expand_shards(pattern)
        indexes = [read_index(path) for path in paths]
        explicit = os.path.isfile(without_scheme(pattern)) or "{" in pattern
        classes = check_folders(_local_folders(paths, indexes, explicit=explicit))
        return cls([path.name for path in paths], indexes, classes, LocalFiles(paths))

    def windows(self, shuffle_window: int | None, cache: CacheSpec | None = None) -> ShardWindows:
        """Which shards are shuffled together; the same on every machine.

        Args:
            shuffle_window: number of shards; 0: all; None: all of a local set, as many of a remote
                one as fit into its cache.
            cache: of a remote set.
        """
        if shuffle_window is None:
            size = (cache or CacheSpec()).cache_bytes
            shuffle_window = (
                default_window(self._largest, size) if isinstance(self._files, CachedFiles) else 0
            )
        whole = shuffle_window >= len(self._names)
        return ShardWindows(first=self._first, window=0 if whole else shuffle_window)

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def keys(self) -> list[str]:
        """The webdataset key of every sample."""
        return [key for keys in self._keys for key in keys]

    def describe(self, sample_id: int) -> str:
        """Tar and member of a sample, for people: `train-000001.tar: 000123.jpg`."""
        shard = int(self._shard[sample_id])
        i = sample_id - int(self._first[shard])
        return f"{self._names[shard]}: {self._keys[shard][i]}.{self._extensions[shard][i]}"

    def entry(self, sample_id: int) -> dict[str, str | int]:
        """The fields of a sample in a quarantine list: shard, key, extension, offset, size,
        crc32."""
        shard = int(self._shard[sample_id])
        i = sample_id - int(self._first[shard])
        columns = {"offset": self._offset, "size": self._size, "crc32": self._crc32}
        return {
            "shard": self._names[shard],
            "key": self._keys[shard][i],
            "extension": self._extensions[shard][i],
            **{name: int(column[sample_id]) for name, column in columns.items()},
        }

    @property
    def names(self) -> frozenset[str]:
        """The file names of all shards."""
        return frozenset(self._names)

    def shard_of(self, sample_id: int) -> tuple[str, range]:
        """The name of a sample's shard, and all samples in it."""
        shard = int(self._shard[sample_id])
        return self._names[shard], range(int(self._first[shard]), int(self._first[shard + 1]))

    def listed(self, quarantine: Quarantine) -> dict[int, str]:
        """The samples that are in a list, and their reasons."""
        found: dict[int, str] = {}
        for shard in {entry.shard for entry in quarantine} & self.names:
            for number in (i for i, name in enumerate(self._names) if name == shard):
                first = int(self._first[number])
                part = np.s_[self._first[number] : self._first[number + 1]]
                rows = quarantine.rows(
                    shard, self._offset[part], self._size[part], self._crc32[part]
                )
                found |= {first + row: reason for row, reason in rows.items()}
        return found

    def quarantine(self) -> tuple[Quarantine, list[str]]:
        """The quarantine lists beside the shards, as one, and what is wrong with them, in
        sentences.

        Raises:
            RemoteError: if a server does not answer whether there is one.
        """
        return self._files.quarantine()

    @property
    def reading(self) -> str:
        """What is being read, or was last, for people: a shard and, of a local one, the byte."""
        shard, offset = self._files.reading
        return self._names[shard] + (f" at byte {offset}" if offset else "")

    def will_need(self, sample_ids: NDArray[np.int64]) -> None:
        """Ask the operating system to fetch these samples' bytes from the disk in the
        background."""
        with self._lock:
            self._files.will_need(self._places(sample_ids))

    def follow(self, windows: ShardWindows, *, seed: int, epoch: int, position: int) -> None:
        """Fetch the shards around a position (in samples) of an epoch's order, then those after
        them.

        For a local set there is nothing to do.
        """
        if isinstance(self._files, CachedFiles):
            with self._lock:
                self._files.follow(windows, seed=seed, epoch=epoch, position=position)

    def read(self, sample_ids: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """The encoded bytes of some samples, checked as in `read_each`.

        Args:
            sample_ids: [B] int64, each in [0, len(self)).

        Returns:
            B arrays [size] uint8, read-only.

        Raises:
            ShardError: the first fault.
        """
        encoded = []
        for data in self.read_each(sample_ids):
            if not isinstance(data, np.ndarray):
                raise data
            encoded.append(data)
        return encoded

    def read_each(self, sample_ids: NDArray[np.int64]) -> list[NDArray[np.uint8] | ReadFault]:
        """The encoded bytes of each sample, or why there are none.

        Bytes are checked against the crc32 and the size that the index gives them: crops and the
        limits on decoding rest on the index. Bytes that fail are read once more; of a remote shard,
        from a new copy.

        Args:
            sample_ids: [B] int64, each in [0, len(self)).

        Returns:
            For each sample an array [size] uint8, read-only, or an error that names tar and member:
            it cannot be read, it is cut off, it differs from what was indexed, or its header
            declares another size.

        Raises:
            StoppedError: after `cancel`.
        """
        sample_ids = np.asarray(sample_ids, dtype=np.int64)
        places = self._places(sample_ids)
        found = []
        with self._lock:
            for sample_id, place, data in zip(
                sample_ids.tolist(), places, self._files.read(places), strict=True
            ):
                checked = self._checked(sample_id, data)
                if isinstance(data, bytes) and not isinstance(checked, np.ndarray):
                    self._files.renew(place[0])
                    checked = self._checked(sample_id, self._files.read([place])[0])
                found.append(checked)
        return found

    def _checked(self, sample_id: int, data: bytes | ReadFault) -> NDArray[np.uint8] | ReadFault:
        """The bytes of a sample as an array, or what is wrong with them."""
        if not isinstance(data, bytes):
            return data
        problem = self._problem(sample_id, data)
        if problem is not None:
            return ShardError(f"{self.describe(sample_id)}: {problem}")
        return np.frombuffer(data, dtype=np.uint8)

    def _problem(self, sample_id: int, data: bytes) -> str | None:
        """What is wrong with the bytes of a sample: they must be those that were indexed.

        A broken structure is not refused here: the engine does that, for all bytes that DALI gets.
        """
        if zlib.crc32(data) != self._crc32[sample_id]:
            whole = len(data) == self._size[sample_id]
            what = "its bytes differ from the index (crc32)" if whole else "the tar ends inside it"
            return (
                f"{what}. Copy the tar again from its source; if it was changed on purpose, {CURE}."
            )
        declared = _declared_size(data)
        (height, width) = declared or (0, 0)
        indexed = tuple(self.sizes[sample_id].tolist())
        if declared is not None and declared != indexed:
            return (
                f"its header declares {width}x{height} pixels, the index "
                f"{indexed[1]}x{indexed[0]}: {CURE}."
            )
        return None

    def cancel(self) -> None:
        """End a wait for a server in any thread: `read` raises there. Then `close`."""
        if isinstance(self._files, CachedFiles):
            self._files.cancel()

    def close(self) -> None:
        """Close the files, when no thread reads any more; a later `read` opens them again."""
        with self._lock:
            self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def _places(self, sample_ids: NDArray[np.int64]) -> list[Place]:
        columns = (self._shard[sample_ids], self._offset[sample_ids], self._size[sample_ids])
        return list(zip(*(column.tolist() for column in columns), strict=True))


def _column(index: ShardIndex, name: str) -> NDArray[np.int64]:
    return np.array(index.columns[name], dtype=np.int64)


def _declared_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) by the header; None for a broken file, which the decoder's own check
    names."""
    try:
        return image_size(data)
    except StructureError:
        return None


def _check_budget(shards: ShardSet) -> None:
    """The limits of images.py, which building an index enforces; an index made elsewhere must keep
    them too."""
    height, width = shards.sizes.astype(np.int64).T
    pixels = height * width
    bad = (pixels < 1) | (pixels > MAX_PIXELS) | (np.maximum(height, width) > MAX_SIDE)
    bad |= pixels > MAX_PIXELS_PER_BYTE * shards._size
    if bad.any():
        first = int(bad.argmax())
        raise ShardError(
            f"{shards.describe(first)}: {width[first]}x{height[first]} pixels in "
            f"{shards._size[first]} bytes are outside what is decoded: {CURE}."
        )


def _local_folders(
    paths: Sequence[Path], indexes: Sequence[ShardIndex], *, explicit: bool
) -> Iterable[FolderOfShards]:
    """The shards by folder. A pattern that spells names out may leave some of the manifest's
    out."""
    for folder, group in groupby(zip(paths, indexes, strict=True), key=lambda pair: pair[0].parent):
        samples = {path.name: len(index) for path, index in group}
        yield FolderOfShards(
            where=str(folder),
            sets=read_sets(folder),
            samples=samples,
            present=lambda name, folder=folder: explicit or (folder / name).exists(),  # type: ignore[misc]
        )
