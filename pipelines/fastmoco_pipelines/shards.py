"""A set of shards as one list of samples: which tars, where each image lies, and its bytes, checked.

Only plain local paths and ``file:`` URLs are read. Nothing here starts a process, follows a link inside a tar or
unpickles anything.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import sys
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Self
from urllib.parse import unquote, urlsplit

import numpy as np
from numpy.typing import NDArray

from fastmoco_pipelines.headers import StructureError, image_size
from fastmoco_pipelines.images import MAX_PIXELS, MAX_PIXELS_PER_BYTE, MAX_SIDE
from fastmoco_pipelines.index import CURE, ShardError, ShardIndex, read_index
from fastmoco_pipelines.manifest import NAME as MANIFEST
from fastmoco_pipelines.manifest import read_sets

__all__ = ["ShardError", "ShardSet", "expand_shards"]

MAX_OPEN_FILES = 128  # a process may hold 1024 by default, and several sets are open at once
MAX_SHARDS = 1_000_000
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):")
_BRACES = re.compile(r"\{([^{}]*)\}")


def expand_shards(pattern: str) -> list[Path]:
    """The shard tars that a pattern names, sorted.

    Args:
        pattern: a tar, a folder of tars, a glob (``train-*.tar``), a brace pattern (``train-{000000..000099}.tar`` or
            ``{a,b}.tar``), or one of these behind ``file:``.

    Raises:
        ValueError: naming the pattern, if it names no file, one of the files it spells out is missing, the folder
            holds several sets, or its scheme is not supported.
    """
    plain = _without_scheme(pattern)
    if os.path.isdir(plain):
        return _tars_of_folder(pattern, Path(plain))
    paths: set[str] = set()
    for name in [plain] if os.path.exists(plain) else _expand_braces(pattern, plain):
        if os.path.isfile(name):
            paths.add(name)
        elif glob.has_magic(name):
            paths.update(path for path in glob.glob(name) if os.path.isfile(path))
        else:
            raise ValueError(f"shards={pattern!r}: there is no file {name}")
    if not paths:
        raise ValueError(f"shards={pattern!r}: no file has such a name (folder searched: {Path(plain).parent})")
    return sorted(Path(path) for path in paths)


class ShardSet:
    """All samples of some shards under one running number, the sample id: shard by shard, in file order.

    Attributes:
        labels: [n] int64, -1 = none.
        sizes: [n, 2] int32: height, width in pixels by the image's header, before any EXIF rotation.
        classes: class names by label; empty where no manifest tells.
        digest: SHA-256 (hex) over every sample's checksum, size and label in order: the identity of the data, wherever
            the files lie.
        skipped: members of the tars that are no usable image, counted when they were indexed.

    One thread at a time may call ``read``.
    """

    def __init__(self, paths: Sequence[Path], indexes: Sequence[ShardIndex], classes: tuple[str, ...]) -> None:
        self.classes = classes
        self.skipped = sum(len(index.skipped) for index in indexes)
        self._paths = tuple(paths)
        self._keys = [index.keys for index in indexes]
        self._extensions = [[sys.intern(extension) for extension in index.extensions] for index in indexes]
        counts = [len(index) for index in indexes]
        self._first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._shard = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        column = {name: np.concatenate([_column(i, name) for i in indexes]) for name in indexes[0].columns}
        self.labels: NDArray[np.int64] = column["label"]
        self.sizes: NDArray[np.int32] = np.stack([column["height"], column["width"]], axis=1).astype(np.int32)
        self._offset, self._size, self._crc32 = column["offset"], column["size"], column["crc32"]
        _check_budget(self)
        identity = np.stack([column[name] for name in ("crc32", "size", "label", "height", "width")])
        self.digest: str = hashlib.sha256(b"fastmoco-set-1" + identity.astype("<i8").tobytes()).hexdigest()
        self._files: OrderedDict[int, int] = OrderedDict()

    @classmethod
    def open(cls, pattern: str) -> Self:
        """Open the shards that ``pattern`` names, through the indexes beside them.

        Raises:
            ValueError: if the pattern names no shard.
            ShardError: if an index is missing, broken or stale, a shard of a packed set is missing, or shards of
                different sets number their classes differently.
        """
        paths = expand_shards(pattern)
        indexes = [read_index(path) for path in paths]
        explicit = os.path.isfile(_without_scheme(pattern)) or "{" in pattern
        return cls(paths, indexes, _classes_by_manifest(paths, indexes, explicit=explicit))

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def keys(self) -> list[str]:
        """The webdataset key of every sample."""
        return [key for keys in self._keys for key in keys]

    def describe(self, sample_id: int) -> str:
        """Where a sample lies, for people: ``train-000001.tar: 000123.jpg``."""
        shard = int(self._shard[sample_id])
        i = sample_id - int(self._first[shard])
        return f"{self._paths[shard].name}: {self._keys[shard][i]}.{self._extensions[shard][i]}"

    def will_need(self, sample_ids: NDArray[np.int64]) -> None:
        """Ask the operating system to fetch these samples' bytes from the disk in the background."""
        for shard, offset, size in self._places(sample_ids):
            os.posix_fadvise(self._descriptor(shard), offset, size, os.POSIX_FADV_WILLNEED)

    def read(self, sample_ids: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """The encoded bytes of some samples, checked against their crc32 and the size that the index gives them.

        Args:
            sample_ids: [B] int64, each in [0, len(self)).

        Returns:
            B arrays [size] uint8, read-only.

        Raises:
            ShardError: naming tar and member, if bytes are missing or differ from what was indexed, or if their header
                declares another size: crops and the limits on decoding rest on the index.
        """
        encoded = []
        checksums, sizes = self._crc32[sample_ids].tolist(), self.sizes[sample_ids].tolist()
        for i, (shard, offset, size) in enumerate(self._places(sample_ids)):
            data = os.pread(self._descriptor(shard), size, offset)
            if zlib.crc32(data) != checksums[i]:
                what = "its bytes differ from the index (crc32)" if len(data) == size else "the tar ends inside it"
                raise ShardError(
                    f"{self.describe(int(sample_ids[i]))}: {what}. Copy the tar again from its source; "
                    f"if it was changed on purpose, {CURE}."
                )
            declared = _declared_size(data)
            if declared is not None and declared != tuple(sizes[i]):
                (height, width), (in_height, in_width) = declared, sizes[i]
                raise ShardError(
                    f"{self.describe(int(sample_ids[i]))}: its header says {width}x{height} pixels, the index "
                    f"{in_width}x{in_height}: {CURE}."
                )
            encoded.append(np.frombuffer(data, dtype=np.uint8))
        return encoded

    def close(self) -> None:
        """Close the files; a later ``read`` opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def _places(self, sample_ids: NDArray[np.int64]) -> list[tuple[int, int, int]]:
        columns = (self._shard[sample_ids], self._offset[sample_ids], self._size[sample_ids])
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def _descriptor(self, shard: int) -> int:
        """An open descriptor of a shard; the one unused for longest is closed when there are too many."""
        descriptor = self._files.get(shard)
        if descriptor is not None:
            self._files.move_to_end(shard)
            return descriptor
        if len(self._files) >= MAX_OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        try:
            descriptor = os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ShardError(f"{self._paths[shard].name}: cannot be opened any more ({error.strerror}).") from error
        self._files[shard] = descriptor
        return descriptor


def _column(index: ShardIndex, name: str) -> NDArray[np.int64]:
    return np.array(index.columns[name], dtype=np.int64)


def _declared_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) by the header; None for a broken file, which the decoder's own check names."""
    try:
        return image_size(data)
    except StructureError:
        return None


def _check_budget(shards: ShardSet) -> None:
    """The limits of images.py, which building an index enforces; an index made elsewhere must keep them too."""
    height, width = shards.sizes.astype(np.int64).T
    pixels = height * width
    bad = (pixels < 1) | (pixels > MAX_PIXELS) | (np.maximum(height, width) > MAX_SIDE)
    bad |= pixels > MAX_PIXELS_PER_BYTE * shards._size
    if bad.any():
        first = int(bad.argmax())
        raise ShardError(
            f"{shards.describe(first)}: {width[first]}x{height[first]} pixels in {shards._size[first]} bytes are "
            f"outside what is decoded: {CURE}."
        )


def _classes_by_manifest(paths: Sequence[Path], indexes: Sequence[ShardIndex], *, explicit: bool) -> tuple[str, ...]:
    """Class names from the manifests beside the shards, after checking that no shard of a packed set is lost."""
    classes: tuple[str, ...] = ()
    for folder, group in groupby(zip(paths, indexes, strict=True), key=lambda pair: pair[0].parent):
        samples = {path.name: len(index) for path, index in group}
        for name, entry in read_sets(folder).items():
            listed = {shard["name"]: shard.get("samples") for shard in entry["shards"]}
            if not samples.keys() & listed.keys():
                continue
            for shard, count in listed.items():
                if not explicit and shard not in samples and not (folder / shard).exists():
                    raise ShardError(
                        f"{shard}: is listed in {MANIFEST} but missing in {folder}: copy it there too, or spell out "
                        f"the shards to use, e.g. {name}-{{000000..000003}}.tar."
                    )
                if shard in samples and samples[shard] != count:
                    raise ShardError(f"{shard}: {samples[shard]} samples, {MANIFEST} says {count}: pack it again.")
            if classes and tuple(entry["classes"]) != classes:
                raise ShardError(
                    f"{folder / MANIFEST}: set {name!r} numbers its classes differently: use one at a time."
                )
            classes = tuple(entry["classes"])
    return classes


def _without_scheme(pattern: str) -> str:
    match = _SCHEME.match(pattern)
    if match is None or os.path.exists(pattern):
        return pattern
    scheme = match.group(1).lower()
    if scheme == "file":
        url = urlsplit(pattern.replace("?", "%3F").replace("#", "%23"))
        if url.netloc in ("", "localhost"):
            return unquote(url.path)
        raise ValueError(f"shards={pattern!r}: a file: URL names a file of this machine: file:///path")
    if scheme == "pipe":
        raise ValueError("shards='pipe:...': refused: a shard pattern never starts a command")
    raise ValueError(
        f"shards={scheme + ':...'!r}: reading over {scheme} is not supported yet: copy or mount the shards and give a path"
    )


def _tars_of_folder(pattern: str, folder: Path) -> list[Path]:
    sets = read_sets(folder)
    if len(sets) > 1:
        names = " or ".join(f"{folder}/{name}-*.tar" for name in sorted(sets))
        raise ValueError(f"shards={pattern!r}: the folder holds several sets: name one, {names}")
    paths = sorted(path for path in folder.glob("*.tar") if path.is_file())
    if not paths:
        raise ValueError(f"shards={pattern!r}: the folder holds no .tar")
    return paths


def _expand_braces(pattern: str, text: str) -> list[str]:
    """``{000..007}`` counts with its zeros kept, ``{a,b}`` lists; the first braces are expanded, then the rest."""
    match = _BRACES.search(text)
    if match is None:
        return [text]
    low, dots, high = match.group(1).partition("..")
    if dots:
        if not (low.isdigit() and high.isdigit() and int(low) <= int(high) and int(high) - int(low) < MAX_SHARDS):
            raise ValueError(f"shards={pattern!r}: {match.group(0)} is no rising range of numbers like {{000..127}}")
        width = max(len(low), len(high)) if low.startswith("0") or high.startswith("0") else 0
        parts = [f"{number:0{width}d}" for number in range(int(low), int(high) + 1)]
    else:
        parts = match.group(1).split(",")
    names = [text[: match.start()] + part + text[match.end() :] for part in parts]
    expanded = [full for name in names for full in _expand_braces(pattern, name)]
    if len(expanded) > MAX_SHARDS:
        raise ValueError(f"shards={pattern!r}: names more than {MAX_SHARDS} shards")
    return expanded
