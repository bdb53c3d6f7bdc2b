"""The index beside each tar (``x.tar.index.json``): where every image lies, how long it is and its checksum.

Columnar JSON, written once by ``pack_folder`` or ``index_shards`` and refused when its tar has changed since. Reading
images by offset from it needs no walk through the tar, and a lost or damaged sample is an error instead of a gap.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmoco_pipelines.images import EXTENSIONS, MAX_BYTES, ImageRefusedError, read_header
from fastmoco_pipelines.tar import TarError, TarMember, unsafe_name, walk_tar

FORMAT = "fastmoco-index"
VERSION = 1
SUFFIX = ".index.json"
COLUMNS = ("offset", "size", "crc32", "label", "height", "width")
CURE = "run `fastmoco data index` on the shards again"
_TEXT_BYTES = 64  # longest .cls member that can be a number
_LIMITS = {"offset": 2**63, "size": MAX_BYTES + 1, "crc32": 2**32, "label": 2**31, "height": 2**16, "width": 2**16}


class ShardError(RuntimeError):
    """A shard, an index or a manifest that cannot be used: names the file, the member, what is wrong and the cure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardIndex:
    """The samples of one tar, column by column; entry i of each list is sample i, in file order.

    Attributes:
        tar: file name of the tar, without its folder.
        tar_bytes: its size.
        tar_hash: SHA-256 (hex) over its first and last 4 KiB.
        keys: webdataset key of each sample; ``extensions``: of its image, as in the tar.
        columns: "offset", "size" (bytes), "crc32", "label" (-1 = none), "height", "width" (pixels, before rotation).
        skipped: (member, reason) of every member that is neither an image, nor its label, nor a folder.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexReport:
    """What ``index_shards`` found: ``skipped`` holds (tar, member, reason)."""

    shards: int
    samples: int
    skipped: tuple[tuple[str, str, str], ...]


def index_path(tar: Path) -> Path:
    """Where the index of a tar lies."""
    return tar.with_name(tar.name + SUFFIX)


def index_shards(pattern: str, progress: Callable[[int, int], None] | None = None) -> IndexReport:
    """Write the index of every shard; for tars that were not made by ``fastmoco data pack``.

    Args:
        pattern: as for ``expand_shards``.
        progress: called with (shards done, shards in all).

    Raises:
        ShardError: for a tar that is damaged or holds no image.
        ValueError: if the pattern names no shard.
    """
    from fastmoco_pipelines.shards import expand_shards  # shards.py reads what this file writes

    paths = expand_shards(pattern)
    samples, skipped = 0, []
    for done, path in enumerate(paths, start=1):
        index = build_index(path)
        write_index(path, index)
        samples += len(index)
        skipped += [(path.name, member, reason) for member, reason in index.skipped]
        if progress is not None:
            progress(done, len(paths))
    return IndexReport(shards=len(paths), samples=samples, skipped=tuple(skipped))


def build_index(tar: Path) -> ShardIndex:
    """Read a whole tar and note its images and labels (``KEY.cls`` beside ``KEY.jpg``).

    Raises:
        ShardError: if the tar is damaged or no usable image lies in it.
    """
    skipped: list[tuple[str, str]] = []
    images: dict[str, tuple[str, TarMember]] = {}
    labels: dict[str, TarMember] = {}
    try:
        placed = ((member.name, _place(member, images, labels)) for member in walk_tar(tar))
        skipped += [(ascii(name)[1:-1], reason) for name, reason in placed if reason]
    except TarError as error:
        raise ShardError(str(error)) from error
    index = ShardIndex(
        tar=tar.name,
        tar_bytes=os.path.getsize(tar),
        tar_hash=tar_hash(tar),
        keys=[],
        extensions=[],
        columns={name: [] for name in COLUMNS},
        skipped=skipped,
    )
    with open(tar, "rb") as file:
        for key, (extension, member) in images.items():
            data = os.pread(file.fileno(), min(member.size, MAX_BYTES + 1), member.offset)
            try:
                header = read_header(data)
            except ImageRefusedError as refused:
                skipped.append((member.name, str(refused)))
                continue
            label = _read_label(tar, file.fileno(), labels.get(key))
            row = (member.offset, member.size, zlib.crc32(data), label, header.height, header.width)
            index.keys.append(key)
            index.extensions.append(extension)
            for name, value in zip(COLUMNS, row, strict=True):
                index.columns[name].append(value)
    skipped += [(member.name, "a label without an image") for key, member in labels.items() if key not in images]
    if not index.keys:
        reasons = "; ".join(f"{member}: {reason}" for member, reason in skipped[:3]) or "it has no members"
        raise ShardError(f"{tar.name}: holds no usable image ({reasons}). Leave this tar out.")
    return index


def write_index(tar: Path, index: ShardIndex) -> Path:
    """Write the index beside its tar, replacing an older one in one go."""
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
    return write_json(index_path(tar), content)


def read_index(tar: Path) -> ShardIndex:
    """The index beside a tar, checked against the tar's size and hash.

    Raises:
        ShardError: if it is missing, broken, or was made for another tar.
    """
    path = index_path(tar)
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ShardError(f"{tar.name}: has no index beside it ({path.name}): {CURE}.") from None
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{path.name}: is no valid JSON ({error}): {CURE}.") from error
    index = _parse_index(path.name, content)
    if index.tar_bytes != os.path.getsize(tar) or index.tar_hash != tar_hash(tar):
        raise ShardError(f"{path.name}: was made for another state of {tar.name} (size or content differ): {CURE}.")
    return index


def tar_hash(tar: Path) -> str:
    """SHA-256 (hex) over the first and the last 4 KiB."""
    with open(tar, "rb") as file:
        digest = hashlib.sha256(file.read(4096))
        file.seek(max(0, os.path.getsize(tar) - 4096))
        digest.update(file.read(4096))
    return digest.hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> Path:
    """Write a JSON file so that a reader sees the old one or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content, separators=(",", ":")), encoding="ascii")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _place(member: TarMember, images: dict[str, tuple[str, TarMember]], labels: dict[str, TarMember]) -> str | None:
    """File one member under its key; the reason where it is left out."""
    if member.kind == "a folder":
        return None
    if member.kind:
        return f"{member.kind}: only plain files are read"
    if reason := unsafe_name(member.name):
        return reason
    folder, slash, name = member.name.rpartition("/")
    stem, _, extension = name.partition(".")  # webdataset's rule: the key ends at the first dot of the file name
    key = folder + slash + stem
    if extension.lower() == "cls":
        known = labels.setdefault(key, member)
        return None if known is member else "a second label of the same key"
    if extension.lower() not in EXTENSIONS:
        return "no image by its name"
    known_image = images.setdefault(key, (extension, member))[1]
    return None if known_image is member else "a second image of the same key"


def _read_label(tar: Path, descriptor: int, member: TarMember | None) -> int:
    if member is None:
        return -1
    text = os.pread(descriptor, min(member.size, _TEXT_BYTES), member.offset).strip()
    if not text.isdigit() or len(text) > 9:
        raise ShardError(
            f"{tar.name}: {member.name}: a label is a whole number from 0 as text, not {text!r}: pack the images again."
        )
    return int(text)


def _parse_index(name: str, content: Any) -> ShardIndex:
    """Types, lengths and ranges: a garbled index must never lead to a read at a wrong place."""

    def check(good: bool, what: str) -> None:
        if not good:
            raise ShardError(f"{name}: {what}: {CURE}.")

    check(isinstance(content, dict) and content.get("format") == FORMAT, "is no index of fastmoco")
    check(content.get("version") == VERSION, f"has version {content.get('version')!r}, this fastmoco reads {VERSION}")
    keys, extensions = content.get("key"), content.get("extension")
    check(
        isinstance(content.get("tar_bytes"), int) and isinstance(content.get("tar_hash"), str), "lacks its tar's hash"
    )
    columns = {column: content.get(column) for column in COLUMNS}
    for column, values in (("key", keys), ("extension", extensions), *columns.items()):
        check(isinstance(values, list) and len(values) == len(keys or ()), f"its column {column!r} is missing or short")
    for column, values in (("key", keys), ("extension", extensions)):
        check(all(type(value) is str and value.isprintable() for value in values), f"its column {column!r} is broken")
    check(len(keys) > 0, "lists no sample")
    for column, values in columns.items():
        low, high = (-1 if column == "label" else 0), _LIMITS[column]
        good = all(type(value) is int for value in values) and min(values) >= low and max(values) < high
        check(good, f"its column {column!r} is broken")
    ends = map(int.__add__, columns["offset"] or (), columns["size"] or ())
    check(max(ends) <= content["tar_bytes"], "lists a sample behind the end of its tar")
    skipped = content.get("skipped")
    check(isinstance(skipped, list) and all(isinstance(s, list) and len(s) == 2 for s in skipped), "is broken")
    return ShardIndex(
        tar=str(content.get("tar")),
        tar_bytes=content["tar_bytes"],
        tar_hash=content["tar_hash"],
        keys=keys,
        extensions=extensions,
        columns=columns,
        skipped=[(str(member), str(reason)) for member, reason in skipped],
    )
