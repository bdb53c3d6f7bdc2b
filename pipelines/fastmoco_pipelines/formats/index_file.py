"""The index file beside each tar (`x.tar.index`): binary, memory-mapped, checked part by part.

    0   8 bytes   magic
    8   uint32    version
    12  uint32    bytes of the header
    16  32 bytes  SHA-256 of the header
    48            header: JSON, ASCII; describes the tar and the sections
    ...           sections, each at a multiple of 64 bytes, by their distance from the first:
        records   24 bytes a sample: `RECORD`
        members   names of the images: [n + 1] uint32 positions, then UTF-8
        skipped   JSON: [[member, reason], ...]
        paths     may be absent: the original file of each image, its path below the folder that
                  was packed: [n + 1] uint32 positions, then the bytes of the file system, any but
                  zeros; as text UTF-8 with surrogateescape (paths.py)

All numbers are little-endian. Opening reads the header alone, which fits into `HEAD_BYTES` and
contains the SHA-256 of every section. A section is checked when it is first used, so that a set of
any size is opened in the time of its headers, and names cost nothing until one is asked for. A
reader ignores sections that it does not know. Where paths are absent, names in the tar take their
place.

A hash shows damage, not who wrote a file. All that a reader rests on is compared with what
`to_bytes` writes: sections follow each other, images are in the order of the tar, each behind a
header of its own, and names come once.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from fastmoco_pipelines.errors import ShardError
from fastmoco_pipelines.files.small import UnfitFileError, json_of, reason_of
from fastmoco_pipelines.formats.images import (
    BOMB_PIXELS,
    MAX_BYTES,
    MAX_PIXELS,
    MAX_PIXELS_PER_BYTE,
    MAX_SIDE,
)
from fastmoco_pipelines.formats.labels import MAX_LABEL
from fastmoco_pipelines.formats.members import is_skipped, name_fault, names_fault, split_name
from fastmoco_pipelines.formats.paths import is_file_name, path_bytes, path_text
from fastmoco_pipelines.formats.tar import BLOCK
from fastmoco_pipelines.text import escaped

SUFFIX = ".index"
MAGIC = b"\x89FMIDX\r\n"
VERSION = 2
"""Version 1 is the JSON form (index_json.py)."""
HEAD_BYTES = 4096
MAX_INDEX_BYTES = 1 << 30
"""Largest file of an index, in bytes: 14 million images in one tar."""
CURE = "run `fastmoco data index` on the shards"
RECORD = np.dtype(
    [
        ("offset", "<i8"),
        ("size", "<u4"),
        ("crc32", "<u4"),
        ("label", "<i4"),
        ("height", "<u2"),
        ("width", "<u2"),
    ]
)
"""One sample: the position of its image in the tar (bytes), its size (bytes), its crc32, its label
(-1: none), its height and width (pixels, before rotation)."""
IDENTITY = ("crc32", "size", "label", "height", "width")
"""Columns that identify the content of a shard, wherever its images lie in the tar."""

COLUMNS = ("offset", "size", "crc32", "label", "height", "width")
_PREFIX = struct.Struct("<8sII32s")
_ALIGN = 64
_SHA256 = re.compile("[0-9a-f]{64}")
_COUNTS = {"samples": 2**32 - 1, "skipped": 2**32 - 1, "unlabelled": 2**32 - 1, "tar_bytes": 2**62}
"""Numbers of the header, and the largest of each."""
_Buffer = bytes | memoryview
_Table = tuple[NDArray[Any], int]
"""The ends of all names, and where the first one starts in the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardIndex:
    """The samples of one tar, column by column; entry i of each list is sample i, in file order.

    Attributes:
        tar: file name of the tar, without its folder.
        tar_bytes: its size.
        tar_hash: SHA-256 (hex) over its first and last 4 KiB.
        keys: webdataset key of each sample; `extensions`: of its image, as in the tar.
        columns: "offset", "size" (bytes), "crc32", "label" (-1 = none), "height", "width" (pixels,
            before rotation).
        skipped: (member, reason) of every member that is neither an image, nor a text beside one,
            nor a folder.
        paths: of the original files, as text (paths.py); None: names in the tar take their place.
    """

    tar: str
    tar_bytes: int
    tar_hash: str
    keys: list[str]
    extensions: list[str]
    columns: dict[str, list[int]]
    skipped: list[tuple[str, str]]
    paths: list[str] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def member(self, i: int) -> str:
        """Name of sample i's image inside the tar."""
        return f"{self.keys[i]}.{self.extensions[i]}"

    def path(self, i: int) -> str:
        """Path of sample i's original file, or the name of its image inside the tar."""
        return self.member(i) if self.paths is None else self.paths[i]


class Section(NamedTuple):
    """Where a section is in its file, in bytes, and the SHA-256 (hex) of its content."""

    start: int
    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexHeader:
    """What an index file says about its tar as a whole.

    Attributes:
        tar: file name of the tar, without its folder.
        tar_bytes: its size.
        tar_hash: SHA-256 (hex) over its first and last 4 KiB.
        samples: images that can be used; `skipped`: members that cannot.
        unlabelled: samples without a label.
        content: SHA-256 (hex) over the columns `IDENTITY`: the identity of the samples.
        sections: by name.
        seal: SHA-256 of the header itself.
    """

    tar: str
    tar_bytes: int
    tar_hash: str
    samples: int
    skipped: int
    unlabelled: int
    content: str
    sections: dict[str, Section]
    seal: bytes

    @property
    def records_hash(self) -> str:
        """SHA-256 (hex) of the records: where each sample is, and what it is."""
        return self.sections["records"].sha256


def records_of(index: ShardIndex) -> NDArray[Any]:
    """[n] `RECORD`: the samples of an index as its file has them."""
    records = np.empty(len(index), dtype=RECORD)
    for name in COLUMNS:
        records[name] = index.columns[name]
    return records


def to_bytes(index: ShardIndex) -> bytes:
    """The content of the file of an index."""
    records = records_of(index)
    content = {
        "records": records.tobytes(),
        "members": _to_table([index.member(row) for row in range(len(index))]),
        "skipped": json.dumps(index.skipped, separators=(",", ":")).encode("ascii"),
    }
    if index.paths is not None:
        content["paths"] = _to_table(index.paths)

    # The sections follow each other after the header.
    sections = {}
    start = 0
    for name, data in content.items():
        sections[name] = [start, len(data), hashlib.sha256(data).hexdigest()]
        start += -(-len(data) // _ALIGN) * _ALIGN
    header = json.dumps(
        {
            "tar": index.tar,
            "tar_bytes": index.tar_bytes,
            "tar_hash": index.tar_hash,
            "samples": len(index),
            "skipped": len(index.skipped),
            "unlabelled": int((records["label"] < 0).sum()),
            "content": content_hash(records),
            "sections": sections,
        },
        separators=(",", ":"),
    ).encode("ascii")
    if _PREFIX.size + len(header) > HEAD_BYTES:
        raise ShardError(f"{escaped(index.tar)}: the name of this tar is too long for an index.")
    parts = [_PREFIX.pack(MAGIC, VERSION, len(header), hashlib.sha256(header).digest()), header]
    for data in content.values():
        parts += [bytes(-sum(map(len, parts)) % _ALIGN), data]
    return b"".join(parts)


def _to_table(names: list[str]) -> bytes:
    """A table of names: their positions, then their bytes."""
    data = [path_bytes(name) for name in names]
    ends = np.cumsum([0, *map(len, data)]).astype("<u4")
    return ends.tobytes() + b"".join(data)


def content_hash(records: NDArray[Any]) -> str:
    """SHA-256 (hex) over the columns that identify the samples."""
    packed = np.empty(len(records), dtype=[(name, RECORD[name]) for name in IDENTITY])
    for name in IDENTITY:
        packed[name] = records[name]
    return hashlib.sha256(packed.tobytes()).hexdigest()


def parse_header(name: str, head: bytes, file_bytes: int | None) -> IndexHeader:
    """The header of an index file.

    Args:
        name: what errors call the file.
        head: its first `HEAD_BYTES` bytes; fewer only where the file is smaller.
        file_bytes: its size; None where that is not known yet.

    Raises:
        ShardError: if it is no index, of another version, damaged, or cut off.
    """
    if len(head) < _PREFIX.size or not head.startswith(MAGIC):
        raise ShardError(f"{name}: is not an index of fastmoco: {CURE}.")
    if file_bytes is not None and file_bytes > MAX_INDEX_BYTES:
        raise ShardError(
            f"{name}: has {file_bytes:,} bytes, an index at most {MAX_INDEX_BYTES:,}: {CURE}."
        )
    _, version, size, seal = _PREFIX.unpack_from(head)
    if version != VERSION:
        raise ShardError(
            f"{name}: has version {version}, this fastmoco reads {VERSION} and the JSON form: "
            f"{CURE}."
        )
    text = head[_PREFIX.size : _PREFIX.size + size]
    if size > HEAD_BYTES or hashlib.sha256(text).digest() != seal:
        raise ShardError(f"{name}: was changed or damaged after it was written (header): {CURE}.")
    first = -(-(_PREFIX.size + size) // _ALIGN) * _ALIGN
    try:
        content = json.loads(text)
        sections = content["sections"]
        content["sections"] = {
            key: Section(first + start, length, sha256)
            for key, (start, length, sha256) in sections.items()
        }
        header = IndexHeader(**content, seal=seal)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ShardError(f"{name}: its header is broken ({error}): {CURE}.") from error
    problem = _header_problem(header, first)
    if problem is not None:
        raise ShardError(f"{name}: {problem}: {CURE}.")
    end = max(section.start + section.size for section in header.sections.values())
    if file_bytes is not None and file_bytes != end:
        raise ShardError(f"{name}: has {file_bytes} bytes instead of {end}: {CURE}.")
    return header


def _header_problem(header: IndexHeader, first: int) -> str | None:
    """What is wrong with a header whose hash is right; sections begin at byte `first`."""
    for name, most in _COUNTS.items():
        count = getattr(header, name)
        if type(count) is not int or not 0 <= count <= most:
            return f"its header is broken: {name}={count!a:.40}, a whole number up to {most} is due"
    if header.unlabelled > header.samples:
        return f"its header is broken: unlabelled={header.unlabelled} of {header.samples} samples"
    if not is_file_name(header.tar):
        return f"its header is broken: tar={header.tar!a:.80} is not the name of a file"
    for name in ("tar_hash", "content"):
        if not _is_sha256(getattr(header, name)):
            return f"its header is broken: {name} is not a SHA-256"
    if header.samples == 0:
        return "lists no sample"
    if not header.sections.keys() >= {"records", "members", "skipped"}:
        return "lacks a section"

    # Sections as they are written: one after another, without gaps.
    for name, section in header.sections.items():
        numbers = type(section.start) is type(section.size) is int and section.size >= 0
        if not numbers or not _is_sha256(section.sha256):
            return f"its header is broken: section {name!a:.40}: two numbers and a SHA-256 are due"
        if section.start != first:
            return (
                f"its header is broken: section {name!a:.40} begins at byte {section.start}, not "
                f"at {first}, where the one before it ends"
            )
        first += -(-section.size // _ALIGN) * _ALIGN
    if header.sections["records"].size != header.samples * RECORD.itemsize:
        return "its records are missing or short"
    if header.sections["members"].size < (header.samples + 1) * 4:
        return "its names are missing or short"
    return None


def _is_sha256(text: object) -> bool:
    return type(text) is str and _SHA256.fullmatch(text) is not None


class IndexFile:
    """The content of one index file; every section is checked at its first use, once.

    Args:
        name: what errors call the file.
        data: the whole file, as bytes or a view of a memory-mapped file.
        state: changes when the file does; None: not known.

    Attributes:
        header: of the file.
    """

    def __init__(self, name: str, data: _Buffer, state: tuple[int, ...] | None = None) -> None:
        self.name = name
        self.header = parse_header(name, bytes(data[:HEAD_BYTES]), len(data))
        self.data = data
        self.state = state

    @property
    def size(self) -> int:
        """Bytes of the file that a run reads: without the paths, which are for people."""
        paths = self.header.sections.get("paths")
        return len(self.data) - (0 if paths is None else paths.size)

    @cached_property
    def records(self) -> NDArray[Any]:
        """[n] `RECORD`, read-only; a view of the file.

        Raises:
            ShardError: if the section is damaged, or a record is outside of what may be read: a
                garbled index must never lead to a read at a wrong place.
        """
        self._section("records")
        records = self.unchecked_records()
        self._check(records)
        return records

    def check(self, *, paths: bool = False) -> Self:
        """Check the records and the hashes of the sections now; of `paths`, which no run needs, only
        if asked.

        Raises:
            ShardError: if one of them is broken.
        """
        _ = self.records, self._names, self._section("skipped")
        if paths:
            _ = self._paths
        return self

    def rows(self) -> list[tuple[int, int, int]]:
        """Offset, size in bytes and crc32 of each image."""
        columns = (self.records[name].tolist() for name in ("offset", "size", "crc32"))
        return list(zip(*columns, strict=True))

    def unchecked_records(self) -> NDArray[Any]:
        """`records` of a file whose section was checked before."""
        section = self.header.sections["records"]
        return np.frombuffer(
            self.data, dtype=RECORD, count=self.header.samples, offset=section.start
        )

    def member(self, row: int) -> str:
        """Name of an image inside the tar."""
        name = self._entry(self._names, row)
        self._refuse_names(name_fault(name))
        return name

    def path(self, row: int) -> str:
        """Path of an image's original file; its name inside the tar where the index has none.

        Raises:
            ShardError: if the section is damaged.
        """
        return self.paths([row])[0]

    def paths(self, rows: Iterable[int] | None = None) -> list[str]:
        """`path` of some images, or of all in file order."""
        table = self._paths
        if table is None:
            return self.members() if rows is None else [self.member(row) for row in rows]
        paths = self._all(table) if rows is None else [self._entry(table, row) for row in rows]
        zero = next((path for path in paths if "\0" in path), None)
        self._refuse_names(zero and f"{escaped(zero)!s:.80}: holds a zero byte")
        return paths

    def members(self) -> list[str]:
        """The names of all images, in file order."""
        names = self._all(self._names)
        self._refuse_names(names_fault(names))
        return names

    def skipped(self) -> list[tuple[str, str]]:
        """(member, reason) of what is no sample."""
        section = self._section("skipped")
        try:
            found = json_of(bytes(self.data[section.start :][: section.size]), self.name)
        except UnfitFileError as error:
            what = reason_of(error, self.name)
            raise ShardError(f"{self.name}: skipped: is broken ({what}): {CURE}.") from error
        if not is_skipped(found) or len(found) != self.header.skipped:
            raise ShardError(
                f"{self.name}: skipped: is broken: {self.header.skipped} pairs of a member and a "
                f"reason are due: {CURE}."
            )
        return [(member, reason) for member, reason in found]

    def whole(self) -> ShardIndex:
        """All of it, as lists.

        Raises:
            ShardError: if a part of it is broken.
        """
        header = self.header
        names = [split_name(member) for member in self.members()]
        return ShardIndex(
            tar=header.tar,
            tar_bytes=header.tar_bytes,
            tar_hash=header.tar_hash,
            keys=[key for key, _ in names],
            extensions=[extension for _, extension in names],
            columns={name: self.records[name].tolist() for name in COLUMNS},
            skipped=self.skipped(),
            paths=None if self._paths is None else self.paths(),
        )

    @cached_property
    def _names(self) -> _Table:
        return self._table("members")

    @cached_property
    def _paths(self) -> _Table | None:
        return self._table("paths") if "paths" in self.header.sections else None

    def _entry(self, table: _Table, row: int) -> str:
        """One entry of a table."""
        ends, start = table
        return path_text(bytes(self.data[start + int(ends[row]) : start + int(ends[row + 1])]))

    def _refuse_names(self, fault: str | None) -> None:
        if fault:
            raise ShardError(f"{self.name}: its names are broken ({fault}): {CURE}.")

    def _all(self, table: _Table) -> list[str]:
        """All entries of a table."""
        ends, start = table
        blob = bytes(self.data[start : start + int(ends[-1])])
        return [path_text(blob[low:high]) for low, high in pairwise(ends.tolist())]

    def _table(self, name: str) -> _Table:
        """A table of names, after its hash is checked."""
        section = self._section(name)
        count = self.header.samples + 1
        length = section.size - 4 * count
        whole = length >= 0
        if whole:
            ends = np.frombuffer(self.data, dtype="<u4", count=count, offset=section.start)
            whole = ends[0] == 0 and ends[-1] == length and not (ends[1:] < ends[:-1]).any()
        if not whole:
            raise ShardError(f"{self.name}: its names are broken: {CURE}.")
        return ends, section.start + 4 * count

    def _section(self, name: str) -> Section:
        """Where a section is, after its hash is checked."""
        section = self.header.sections[name]
        part = memoryview(self.data)[section.start : section.start + section.size]
        whole = hashlib.sha256(part).hexdigest() == section.sha256
        if not whole:
            raise ShardError(
                f"{self.name}: was changed or damaged after it was written ({name}): {CURE}."
            )
        return section

    def _check(self, records: NDArray[Any]) -> None:
        """Ranges, the account of the header, and the limits on decoding that building an index
        enforces: an index made elsewhere must keep them too."""
        header = self.header
        offset, size = records["offset"].astype(np.int64), records["size"].astype(np.int64)
        if int(offset.min()) < 0 or int(size.min()) < 1 or int(size.max()) > MAX_BYTES:
            raise ShardError(f"{self.name}: its column 'offset' or 'size' is broken: {CURE}.")
        # both are below 2**63, and a size is small
        if (offset > header.tar_bytes - size).any():
            raise ShardError(f"{self.name}: lists a sample after the end of its tar: {CURE}.")
        self._check_places(offset, size)
        label = records["label"]
        if int(label.min()) < -1 or int(label.max()) > MAX_LABEL:
            first = int(((label < -1) | (label > MAX_LABEL)).argmax())
            raise ShardError(
                f"{self.name}: its column 'label' is broken: {self.member(first)} has "
                f"{label[first]}, labels are from -1 (none) to {MAX_LABEL}: {CURE}."
            )
        unlabelled = int((records["label"] < 0).sum())
        if unlabelled != header.unlabelled or content_hash(records) != header.content:
            raise ShardError(f"{self.name}: its header does not fit its records: {CURE}.")

        height, width = (records[name].astype(np.int64) for name in ("height", "width"))
        pixels = height * width
        bad = (pixels < 1) | (pixels > MAX_PIXELS) | (np.maximum(height, width) > MAX_SIDE)
        bad |= (pixels > BOMB_PIXELS) & (pixels > MAX_PIXELS_PER_BYTE * size)
        if bad.any():
            first = int(bad.argmax())
            raise ShardError(
                f"{escaped(header.tar)}: {self.member(first)}: "
                f"{width[first]}x{height[first]} pixels in {size[first]} bytes are outside what "
                f"is decoded: {CURE}."
            )

    def _check_places(self, offset: NDArray[np.int64], size: NDArray[np.int64]) -> None:
        """Each image once, in the order of the tar, at a whole block behind a header of its own."""
        free = np.zeros_like(offset)  # first byte behind the image before
        free[1:] = (offset + (size + (BLOCK - 1) & -BLOCK))[:-1]
        bad = (offset & (BLOCK - 1) != 0) | (offset - BLOCK < free)
        if bad.any():
            row = int(bad.argmax())
            raise ShardError(
                f"{self.name}: its column 'offset' is broken: {self.member(row)} is at byte "
                f"{offset[row]}: images are listed once, in the order of the tar, each at a "
                f"multiple of {BLOCK} behind a header of its own: {CURE}."
            )
