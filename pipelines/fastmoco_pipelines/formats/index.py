"""The index beside each tar (`x.tar.index.json`): the position, size and checksum of every image.

Columnar JSON, written once by `pack_folder` or `index_shards` and refused when its tar has changed
since. Reading images by offset from it needs no walk through the tar, and a lost or damaged sample
is an error instead of a gap.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fastmoco_pipelines.errors import ImageRefusedError, LabelError, ShardError, TarError
from fastmoco_pipelines.files import is_sealed, write_json
from fastmoco_pipelines.formats.images import MAX_BYTES, read_header
from fastmoco_pipelines.formats.labels import (
    LabelRule,
    RawLabel,
    Source,
    number_labels,
    read_labels,
)
from fastmoco_pipelines.formats.members import group_members
from fastmoco_pipelines.formats.tar import walk_damaged, walk_tar

FORMAT = "fastmoco-index"
VERSION = 1
SUFFIX = ".index.json"
COLUMNS = ("offset", "size", "crc32", "label", "height", "width")
CURE = "run `fastmoco data index` on the shards"
SALVAGE = "Or index what is left of it: `fastmoco data index --salvage`."
_LIMITS = {
    "offset": 2**63,
    "size": MAX_BYTES + 1,
    "crc32": 2**32,
    "label": 2**31,
    "height": 2**16,
    "width": 2**16,
}


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
    """

    tar: str
    tar_bytes: int
    tar_hash: str
    keys: list[str]
    extensions: list[str]
    columns: dict[str, list[int]]
    skipped: list[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.keys)

    def member(self, i: int) -> str:
        """Name of sample i's image inside the tar."""
        return f"{self.keys[i]}.{self.extensions[i]}"


def index_path(tar: Path) -> Path:
    """Path of the index of a tar."""
    return tar.with_name(tar.name + SUFFIX)


def build_index(tar: Path) -> ShardIndex:
    """Read a whole tar and note its images and labels (`KEY.cls` beside `KEY.jpg`).

    Raises:
        ShardError: if the tar is damaged or contains no usable image.
    """
    rule = LabelRule(source="cls")
    index, found, _ = scan_tar(tar, rule)
    index.columns["label"] = number_labels([found], rule).labels[0]
    return index


def scan_tar(
    tar: Path, rule: LabelRule, *, salvage: bool = False
) -> tuple[ShardIndex, list[dict[Source, RawLabel]], list[TarError]]:
    """Read a whole tar: its index without labels, the labels beside each image, and the damages.
    With `salvage` a damage does not end the walk: sound members before and after it are taken, and
    each lost stretch is a fault, which is in the index's `skipped` too. Without, the last list is
    empty.

    Raises:
        ShardError: as for `build_index`; with `salvage` only where no usable image is left.
    """
    try:
        members, damages = walk_damaged(tar) if salvage else (walk_tar(tar), [])
        content = group_members(members)
    except TarError as error:
        hint = "" if error.position is None else f" {SALVAGE}"
        raise ShardError(f"{error}{hint}") from error

    if damages and damages[0].position is None:
        raise ShardError(str(damages[0]))
    index = ShardIndex(
        tar=tar.name,
        tar_bytes=os.path.getsize(tar),
        tar_hash=tar_hash(tar),
        keys=[],
        extensions=[],
        columns={name: [] for name in COLUMNS},
        skipped=[*content.others, *(lost_entry(damage) for damage in damages)],
    )

    # Every image that could be used by its name: its header, its labels, its checksum.
    found: list[dict[Source, RawLabel]] = []
    with open(tar, "rb") as file:
        for sample in content.samples:
            member = sample.image
            if member is None or sample.kind:
                continue
            data = os.pread(file.fileno(), min(member.size, MAX_BYTES + 1), member.offset)
            try:
                header = read_header(data)
            except ImageRefusedError as refused:
                index.skipped.append((member.name, str(refused)))
                continue
            try:
                found.append(read_labels(file.fileno(), sample, rule))
            except LabelError as error:
                raise ShardError(
                    f"{tar.name}: {error}: fix it in the tar, or index with --labels none."
                ) from error
            row = (member.offset, member.size, zlib.crc32(data), -1, header.height, header.width)
            index.keys.append(sample.key)
            index.extensions.append(sample.extension)
            for name, value in zip(COLUMNS, row, strict=True):
                index.columns[name].append(value)

    if not index.keys:
        reasons = (
            "; ".join(f"{member}: {reason}" for member, reason in index.skipped[:3])
            or "it has no members"
        )
        raise ShardError(f"{tar.name}: holds no usable image ({reasons}). Leave this tar out.")
    return index, found, damages


def lost_entry(damage: TarError) -> tuple[str, str]:
    """The entry of a lost stretch among `skipped`."""
    member = ascii(damage.member)[1:-1] if damage.member else f"byte {damage.position}"
    return member, f"{damage.lost} bytes from byte {damage.position} on are lost: {damage.reason}"


def write_index(tar: Path, index: ShardIndex) -> Path:
    """Write the index beside its tar, whole or not at all."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "tar": index.tar,
        "tar_bytes": index.tar_bytes,
        "tar_hash": index.tar_hash,
        "key": index.keys,
        "extension": index.extensions,
        **index.columns,
        "skipped": index.skipped,
    }
    return write_json(index_path(tar), content, sealed=True)


def read_index(tar: Path) -> ShardIndex:
    """The index beside a tar, checked against the tar's size and hash.

    Raises:
        ShardError: if it is missing, broken, or was made for another tar.
    """
    index = read_any_index(tar)
    if not fits_tar(index, tar):
        raise ShardError(
            f"{index_path(tar).name}: was made for another state of {tar.name} (size or content "
            f"differ): {CURE}."
        )
    return index


def fits_tar(index: ShardIndex, tar: Path) -> bool:
    """Whether an index was made for this state of a tar, by size and hash."""
    return index.tar_bytes == os.path.getsize(tar) and index.tar_hash == tar_hash(tar)


def read_any_index(tar: Path) -> ShardIndex:
    """The index beside a tar, even if it is stale or another tar's.

    Raises:
        ShardError: if it is missing or broken.
    """
    path = index_path(tar)
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise ShardError(f"{tar.name}: has no index beside it ({path.name}): {CURE}.") from None
    return parse_index(path.name, text)


def parse_index(name: str, text: bytes) -> ShardIndex:
    """An index from the content of its file, which errors call `name`.

    Raises:
        ShardError: if it is broken.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{name}: is not valid JSON ({error}): {CURE}.") from error
    index = _checked_index(name, content)
    if "content_hash" not in content:
        raise ShardError(
            f"{name}: has no content_hash, an earlier version of fastmoco wrote it: {CURE}."
        )
    if not is_sealed(text):
        raise ShardError(
            f"{name}: was changed or damaged after it was written (content_hash): {CURE}."
        )
    return index


def tar_hash(tar: Path) -> str:
    """SHA-256 (hex) over the first and the last 4 KiB."""
    with open(tar, "rb") as file:
        return hash_ends(file)


def hash_ends(file: BinaryIO) -> str:
    """`tar_hash` of a file that is open."""
    file.seek(0)
    digest = hashlib.sha256(file.read(4096))
    file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
    digest.update(file.read(4096))
    return digest.hexdigest()


def _checked_index(name: str, content: Any) -> ShardIndex:
    """Types, lengths and ranges: a garbled index must never lead to a read at a wrong place."""

    def check(good: bool, what: str) -> None:
        if not good:
            raise ShardError(f"{name}: {what}: {CURE}.")

    check(
        isinstance(content, dict) and content.get("format") == FORMAT, "is not an index of fastmoco"
    )
    check(
        content.get("version") == VERSION,
        f"has version {content.get('version')!r}, this fastmoco reads {VERSION}",
    )
    keys = content.get("key")
    extensions = content.get("extension")
    check(
        isinstance(content.get("tar_bytes"), int) and isinstance(content.get("tar_hash"), str),
        "lacks its tar's hash",
    )
    columns = {column: content.get(column) for column in COLUMNS}
    for column, values in (("key", keys), ("extension", extensions), *columns.items()):
        check(
            isinstance(values, list) and len(values) == len(keys or ()),
            f"its column {column!r} is missing or short",
        )
    for column, values in (("key", keys), ("extension", extensions)):
        check(
            all(type(value) is str and value.isprintable() for value in values),
            f"its column {column!r} is broken",
        )
    check(len(keys) > 0, "lists no sample")
    for column, values in columns.items():
        low, high = (-1 if column == "label" else 0), _LIMITS[column]
        good = (
            all(type(value) is int for value in values)
            and min(values) >= low
            and max(values) < high
        )
        check(good, f"its column {column!r} is broken")
    ends = map(int.__add__, columns["offset"] or (), columns["size"] or ())
    check(max(ends) <= content["tar_bytes"], "lists a sample after the end of its tar")
    skipped = content.get("skipped")
    check(
        isinstance(skipped, list) and all(isinstance(s, list) and len(s) == 2 for s in skipped),
        "is broken",
    )
    return ShardIndex(
        tar=str(content.get("tar")),
        tar_bytes=content["tar_bytes"],
        tar_hash=content["tar_hash"],
        keys=keys,
        extensions=extensions,
        columns=columns,
        skipped=[(str(member), str(reason)) for member, reason in skipped],
    )
