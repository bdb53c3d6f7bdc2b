"""A set of shards as one list of samples: the tars, the position of each image, and its checked
bytes. Local shards are read in place; those of a server through copies in a cache
(stores/fetcher.py), with the same checks. Nothing here starts a process, follows a link inside a
tar or unpickles anything.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import zlib
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fastmoco_pipelines.errors import LostIndexError, ShardError, StructureError
from fastmoco_pipelines.formats.headers import image_size
from fastmoco_pipelines.formats.index_file import CURE, RECORD
from fastmoco_pipelines.formats.members import split_name
from fastmoco_pipelines.formats.quarantine import Quarantine
from fastmoco_pipelines.sampling.window import ShardWindows, default_window
from fastmoco_pipelines.sets.cached_files import CachedFiles, open_cache
from fastmoco_pipelines.sets.local_files import LocalFiles, Place, ReadFault, is_own_trouble
from fastmoco_pipelines.sets.local_set import open_local
from fastmoco_pipelines.sets.patterns import expand_shards, is_remote
from fastmoco_pipelines.sets.records import CHECKED_AT_OPENING, Indexes, Records
from fastmoco_pipelines.spec import MAX_TRANSFERS, CacheSpec
from fastmoco_pipelines.stores.retries import Limits
from fastmoco_pipelines.text import escaped, redact

__all__ = ["ShardError", "ShardSet", "expand_shards"]


class ShardSet:
    """All samples of some shards under one running number, the sample id: shard by shard, in file
    order.

    Opening reads the headers of the indexes. The index of a shard is loaded when one of its samples
    is asked for: what the whole set is asked for (`labels`, `sizes`, `keys`) costs time and memory
    for every sample.

    Attributes:
        classes: class names by label; empty where no manifest contains them.
        digest: SHA-256 (hex) over the number of samples of every shard and over every sample's
            checksum, size and label in order: the identity of the data, wherever the files are
            stored.
        skipped: members of the tars that are no usable image, counted when they were indexed.
        unlabelled: samples without a label.

    Any thread may use it: one reads ahead while another reads the stand-ins of bad samples.
    """

    def __init__(
        self,
        names: Sequence[str],
        indexes: Indexes,
        classes: tuple[str, ...],
        files: LocalFiles | CachedFiles,
    ) -> None:
        shards = indexes.shards
        self.classes = classes
        self.skipped = int(shards["skipped"].sum(dtype=np.int64))
        self.unlabelled = int(shards["unlabelled"].sum(dtype=np.int64))
        self._names = tuple(names)
        self._files = files
        # The files close the least recently used descriptor.
        self._lock = threading.RLock()
        self._largest = int(shards["tar_bytes"].max())
        self._records = Records(indexes)
        self._first = self._records.first
        identity = np.empty(len(shards), dtype=[("samples", "<u4"), ("content", "V32")])
        identity["samples"], identity["content"] = shards["samples"], shards["content"]
        self.digest: str = hashlib.sha256(b"fastmoco-set-2" + identity.tobytes()).hexdigest()

    @classmethod
    def open(
        cls,
        pattern: str,
        *,
        cache: CacheSpec | None = None,
        limits: Limits | None = None,
        max_transfers: int = MAX_TRANSFERS,
    ) -> Self:
        """Open the shards that `pattern` names, through the indexes beside them.

        Args:
            pattern: as for `expand_shards`; or `https://`, `http://`, `s3://` or `gs://` with
                braces, with `*` in the file's name, or of a folder (with `/` at the end).
            cache: where shards from a server are kept; None: the default folder and size.
            limits: times and tries of each transfer; None: the defaults.
            max_transfers: shards of a server that are fetched at once, at most.

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
            names = [shard.name for shard in remote.remotes]
            lists = partial(fetch_lists, remote.folders, limits)
            fetcher = ShardFetcher(remote.remotes, kept, limits, max_transfers)
            files = CachedFiles(fetcher, len(names), lists, remote.stop)
            return cls(names, remote, remote.classes, files)
        local = open_local(pattern)
        for note in local.notes:
            logging.getLogger(__name__).warning(note)
        names = [os.path.basename(path) for path in local.paths]
        opened = cls(names, local, local.classes, LocalFiles(local.paths))
        if len(opened) * RECORD.itemsize <= CHECKED_AT_OPENING:
            opened._records.check()
        return opened

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

    @cached_property
    def digest_1(self) -> str:
        """The digest of version 1, which does not depend on how the samples are cut into shards:
        what runs of earlier versions have saved. It reads all records."""
        wanted = ("crc32", "size", "label", "height", "width")
        columns = [
            np.concatenate([records[name].astype("<i8") for records in self._records.all()])
            for name in wanted
        ]
        return hashlib.sha256(b"fastmoco-set-1" + np.stack(columns).tobytes()).hexdigest()

    @property
    def labels(self) -> NDArray[np.int64]:
        """[n] int64: the label of every sample, -1 = none."""
        parts = [records["label"] for records in self._records.all()]
        return np.concatenate(parts).astype(np.int64)

    @property
    def class_count(self) -> int:
        """Classes of the set: those that a manifest names, or one more than the highest label,
        which reads all records."""
        return len(self.classes) or int(self.labels.max(initial=-1)) + 1

    def require_labels(self, pattern: str, classes: int | None = None) -> None:
        """Refuse the set for a training that needs a label of every image.

        Args:
            pattern: that it was opened by, for the message.
            classes: that the training tells apart; None: any number.

        Raises:
            ShardError: naming the set and the cure.
        """
        if self.unlabelled:
            raise ShardError(
                f"{redact(pattern)}: {self.unlabelled} of {len(self)} images have no label, and a "
                "training with labels needs all: pack the set from one folder per class "
                "(fastmoco data pack), or index tars that contain labels (fastmoco data index)"
            )
        highest = int(self.labels.max(initial=-1))
        if self.classes and highest >= len(self.classes):
            raise ShardError(
                f"{redact(pattern)}: its indexes have labels up to {highest}, its manifest.json "
                f"names {len(self.classes)} classes: {CURE}, or pack the set again"
            )
        count = len(self.classes) or highest + 1
        if classes is not None and count > classes:
            raise ShardError(
                f"{redact(pattern)}: it has {count} classes, more than objective.classes="
                f"{classes}: give --objective.classes {count}, or the set of this number of classes"
            )

    @property
    def sizes(self) -> NDArray[np.int32]:
        """[n, 2] int32: height and width of every sample; see `sizes_of`."""
        return np.concatenate([_sizes(records) for records in self._records.all()])

    @property
    def keys(self) -> list[str]:
        """The webdataset key of every sample."""
        files = (self._records.file(shard) for shard in range(len(self._names)))
        return [split_name(member)[0] for file in files for member in file.members()]

    def labels_of(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """[B] int64: the labels of some samples, -1 = none."""
        return self._records.of(sample_ids)["label"].astype(np.int64)

    def checksums_of(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """[B, 2] int64: CRC-32 and number of bytes of some samples, as they are stored."""
        records = self._records.of(sample_ids)
        return np.stack([records["crc32"], records["size"]], axis=1).astype(np.int64)

    def sizes_of(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int32]:
        """[B, 2] int32: height, width of some samples in pixels by the image's header, before any
        EXIF rotation."""
        return _sizes(self._records.of(sample_ids))

    def path_of(self, sample_id: int) -> str:
        """The path of a sample's original file; see `paths_of`."""
        return self.paths_of(np.array([sample_id]))[0]

    def paths_of(self, sample_ids: NDArray[np.int64]) -> list[str]:
        """The path of each sample's original file, below the folder that was packed, or its name in
        the tar where the index has no paths, as for tars of other programs.

        Paths are text as `formats/paths.py` describes it; show them through `text.escaped`. Only
        the parts of the indexes that are asked for are read.

        Args:
            sample_ids: [B] int64, each in [0, len(self)).

        Raises:
            ShardError: if an index is lost, or its paths are damaged.
        """
        return self._records.paths_of(np.asarray(sample_ids, dtype=np.int64))

    def describe(self, sample_id: int) -> str:
        """Tar, member and original file of a sample, for people: `train-000001.tar: 000123.jpg
        (cat/IMG_1.jpg)`; its row in the index where that is lost."""
        shard = self._shard_of(sample_id)
        try:
            member = self._member(sample_id)
        except ShardError:
            return f"{self._names[shard]}: image {sample_id - int(self._first[shard])}"
        original = self.original_of(sample_id)
        return f"{self._names[shard]}: {member}" + (f" ({original})" if original else "")

    def original_of(self, sample_id: int) -> str:
        """The path of a sample's original file, escaped; empty where it is not known, or is the
        name in the tar."""
        try:
            path = self.path_of(sample_id)
            return "" if path == self._member(sample_id) else escaped(path)
        except ShardError:
            return ""

    def entry(self, sample_id: int) -> dict[str, str | int]:
        """The fields of a sample in a quarantine list: shard, key, extension, offset, size, crc32,
        file."""
        key, extension = split_name(self._member(sample_id))
        record = self._records.of(np.array([sample_id]))[0]
        return {
            "shard": self._names[self._shard_of(sample_id)],
            "key": key,
            "extension": extension,
            **{name: int(record[name]) for name in ("offset", "size", "crc32")},
            "file": self.original_of(sample_id),
        }

    @property
    def names(self) -> frozenset[str]:
        """The file names of all shards."""
        return frozenset(self._names)

    def shard_of(self, sample_id: int) -> tuple[str, range]:
        """The name of a sample's shard, and all samples in it."""
        shard = self._shard_of(sample_id)
        return self._names[shard], range(int(self._first[shard]), int(self._first[shard + 1]))

    def listed(self, quarantine: Quarantine) -> dict[int, str]:
        """The samples that are in a list, and their reasons."""
        named = {entry.shard for entry in quarantine}
        found: dict[int, str] = {}
        for number, name in enumerate(self._names if named else ()):
            if name in named:
                records = self._records.of_shard(number)
                rows = quarantine.rows(
                    name, *(records[column] for column in ("offset", "size", "crc32"))
                )
                first = int(self._first[number])
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
            self._files.will_need(self._places(sample_ids, self._records.of(sample_ids)))

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
            it cannot be read, it is cut off, it differs from what was indexed, its header
            declares another size, or the index of its shard is lost.

        Raises:
            StoppedError: after `cancel`.
            ShardError: where this process may open no more files: then nothing can be read.
        """
        sample_ids = np.asarray(sample_ids, dtype=np.int64)
        lost: dict[int, LostIndexError] = {}
        records = self._records.of(sample_ids, lost)
        own = next((error for error in lost.values() if is_own_trouble(error)), None)
        if own is not None:
            raise own
        places = self._places(sample_ids, records)
        found: list[NDArray[np.uint8] | ReadFault] = [lost.get(shard) for shard, _, _ in places]  # type: ignore[misc]
        rows = [row for row, place in enumerate(places) if place[0] not in lost]
        with self._lock:
            read = self._files.read([places[row] for row in rows])
            for row, data in zip(rows, read, strict=True):
                sample_id, record, place = int(sample_ids[row]), records[row], places[row]
                checked = self._checked(sample_id, record, data)
                if isinstance(data, bytes) and not isinstance(checked, np.ndarray):
                    self._files.renew(place[0])
                    checked = self._checked(sample_id, record, self._files.read([place])[0])
                found[row] = checked
        return found

    def _checked(
        self, sample_id: int, record: Any, data: bytes | ReadFault
    ) -> NDArray[np.uint8] | ReadFault:
        """The bytes of a sample as an array, or what is wrong with them."""
        if not isinstance(data, bytes):
            return data
        problem = _problem(record, data)
        if problem is not None:
            return ShardError(f"{self.describe(sample_id)}: {problem}")
        return np.frombuffer(data, dtype=np.uint8)

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

    def _places(self, sample_ids: NDArray[np.int64], records: NDArray[Any]) -> list[Place]:
        columns = (self._records.shard_of(sample_ids), records["offset"], records["size"])
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def _shard_of(self, sample_id: int) -> int:
        return int(np.searchsorted(self._first, sample_id, side="right")) - 1

    def _member(self, sample_id: int) -> str:
        shard = self._shard_of(sample_id)
        return self._records.file(shard).member(int(sample_id) - int(self._first[shard]))


def _problem(record: Any, data: bytes) -> str | None:
    """What is wrong with the bytes of a sample: they must be those that were indexed.

    A broken structure is not refused here: the engine does that, for all bytes that DALI gets.
    """
    if zlib.crc32(data) != record["crc32"]:
        whole = len(data) == record["size"]
        what = "its bytes differ from the index (crc32)" if whole else "the tar ends inside it"
        return f"{what}. Copy the tar again from its source; if it was changed on purpose, {CURE}."
    declared = _declared_size(data)
    height, width = declared or (0, 0)
    indexed = (int(record["height"]), int(record["width"]))
    if declared is not None and declared != indexed:
        return (
            f"its header declares {width}x{height} pixels, the index "
            f"{indexed[1]}x{indexed[0]}: {CURE}."
        )
    return None


def _sizes(records: NDArray[Any]) -> NDArray[np.int32]:
    return np.stack([records["height"], records["width"]], axis=1).astype(np.int32)


def _declared_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) by the header; None for a broken file, which the decoder's own check
    names."""
    try:
        return image_size(data)
    except StructureError:
        return None
