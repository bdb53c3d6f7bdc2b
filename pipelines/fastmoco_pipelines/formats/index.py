"""The index beside each tar (`x.tar.index`): the position, size and checksum of every image.

Written once by `pack_folder` or `index_shards` and refused when its tar has changed since. Reading
images by offset from it needs no walk through the tar, and a lost or damaged sample is an error
instead of a gap. The form of the file is described in index_file.py; here are whole indexes, which
are made, edited and compared.
"""

from __future__ import annotations

import errno
import hashlib
import os
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

from fastmoco_pipelines.errors import ImageRefusedError, ShardError, TarError
from fastmoco_pipelines.files.small import UnfitFileError, open_regular, read_small, reason_of
from fastmoco_pipelines.files.whole import OWN_TROUBLE, read_at, write_file, write_json
from fastmoco_pipelines.formats.images import bytes_problem, image_kind, read_header
from fastmoco_pipelines.formats.index_file import (
    COLUMNS,
    CURE,
    MAX_INDEX_BYTES,
    SUFFIX,
    IndexFile,
    IndexHeader,
    ShardIndex,
    to_bytes,
)
from fastmoco_pipelines.formats.index_json import JSON_SUFFIX, json_content, parse_json
from fastmoco_pipelines.formats.labels import Found, LabelRule, number_labels, read_labels
from fastmoco_pipelines.formats.members import (
    NO_IMAGE_NAME,
    KeysAt,
    TarContent,
    group_members,
)
from fastmoco_pipelines.formats.paths import DAMAGED, MAX_LIST_BYTES, parse_list
from fastmoco_pipelines.formats.tar import OUTSIDE, walk_damaged, walk_tar

END_BYTES = 4096
"""At each end of a tar: what `tar_hash` is a hash of."""
SALVAGE = "Or index what is left of it, for new runs: `fastmoco data index --salvage`."
CHECK = (
    "or run `fastmoco data check` on the shards, which lists what is lost, and the same command goes "
    "on without it"
)


def index_path(tar: Path) -> Path:
    """Path of the index of a tar."""
    return tar.with_name(tar.name + SUFFIX)


def json_path(tar: Path) -> Path:
    """Path of the JSON form of a tar's index."""
    return tar.with_name(tar.name + JSON_SUFFIX)


def index_file(tar: Path) -> Path | None:
    """The file that is read as the index of a tar: the binary form, else the JSON form, else None.

    An earlier version of fastmoco writes the JSON form beside a binary one, which is then stale: so
    the JSON form is read where it alone fits the tar.
    """
    binary, text = (path if path.exists() else None for path in (index_path(tar), json_path(tar)))
    if binary is None or text is None:
        return binary or text
    return text if _fits(binary, tar) is False and _fits(text, tar) else binary


def _fits(path: Path, tar: Path) -> bool | None:
    """Whether an index fits its tar; None if one of them cannot be read."""
    try:
        return fits_tar(open_index(path.name, index_bytes(path)).header, tar)
    except (ShardError, OSError):
        return None


def index_bytes(path: Path) -> bytes:
    """The content of the file of an index.

    Raises:
        ShardError: if it cannot be read.
        OSError: if that is this process's own trouble: too many open files, too little memory.
    """
    try:
        return read_small(path, MAX_INDEX_BYTES)
    except UnfitFileError as error:
        if not path.is_dir():
            raise ShardError(f"{path.name}: {reason_of(error, path)}; then {CURE}.") from error
        how = f"cannot be read ({os.strerror(errno.EISDIR)}): move this folder away, and {CURE}"
        raise ShardError(f"{path.name}: {how}.") from error
    except OSError as error:
        if error.errno in OWN_TROUBLE:
            raise
        raise ShardError(f"{path.name}: cannot be read ({error.strerror}): {CURE}.") from error


def write_json_index(tar: Path, index: ShardIndex) -> Path:
    """Write the JSON form of an index beside its tar, for other programs."""
    return write_json(json_path(tar), json_content(index), sealed=True)


def build_index(tar: Path) -> ShardIndex:
    """Read a whole tar and note its images and labels (`KEY.cls` beside `KEY.jpg`).

    Raises:
        ShardError: if the tar is damaged or contains no usable image.
    """
    rule = LabelRule(source="cls")
    scan = scan_tar(tar, rule)
    scan.index.columns["label"] = number_labels([scan.found], rule).labels[0]
    return scan.index


@dataclass(frozen=True, slots=True)
class TarScan:
    """What a tar holds.

    Attributes:
        index: without labels.
        found: the labels of each image.
        damages: lost stretches, which are in the index's `skipped` too.
        left_out: how many images the index does not list, by their names.
        shared: names of those whose key, which ends at a dot, is that of another image.
    """

    index: ShardIndex
    found: list[Found] = field(default_factory=list)
    damages: list[TarError] = field(default_factory=list)
    left_out: int = 0
    shared: list[str] = field(default_factory=list)


def scan_tar(
    tar: Path, rule: LabelRule, *, salvage: bool = False, keys: KeysAt = "first-dot"
) -> TarScan:
    """Read a whole tar. With `salvage` a damage does not end the walk: sound members before and
    after it are taken. Without, there are no damages.

    Raises:
        ShardError: as for `build_index`; with `salvage` only where no usable image is left.
    """
    try:
        members, damages = walk_damaged(tar) if salvage else (walk_tar(tar), [])
        content = group_members(members, keys)
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
    found: list[Found] = []
    left_out = content.left_out
    with open(open_regular(tar), "rb") as file:
        for sample in content.samples:
            member = sample.image
            if member is None or sample.kind:
                continue
            try:
                if problem := bytes_problem(member.size):
                    raise ImageRefusedError(problem)
                data = os.pread(file.fileno(), member.size, member.offset)
                header = read_header(data)
            except ImageRefusedError as refused:
                index.skipped.append((member.name, str(refused)))
                left_out += 1
                continue
            found.append(read_labels(file.fileno(), sample, rule))
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
        raise ShardError(
            f"{tar.name}: holds no usable image ({reasons}). {_cure(tar, content.others)}"
        )

    # A source that was asked for by name must hold labels.
    faults = number_labels([found], rule).faults[0] if rule.source != "auto" else []
    if faults:
        more = f" (and {len(faults) - 1} more of its labels)" if len(faults) > 1 else ""
        raise ShardError(
            f"{tar.name}: {faults[0]}{more}: fix it in the tar, or index with --labels auto, where "
            "such images have no label, or --labels none."
        )

    # The original files.
    paths = read_paths(tar, content)
    if paths is not None:
        rows = range(len(index))
        index = replace(index, paths=[paths.get(index.keys[i], index.member(i)) for i in rows])
    elif content.paths is not None:
        index.skipped.append((content.paths.name, DAMAGED))
    return TarScan(index, found, damages, left_out, content.shared)


def _cure(tar: Path, others: list[tuple[str, str]]) -> str:
    """What to do with a tar without usable images: other names, if there are images under names
    that are not of images."""
    if any(reason == OUTSIDE for _, reason in others):
        return "Write the tar with names relative to its folder and /, or leave it out."
    unnamed = [member for member, reason in others if reason == NO_IMAGE_NAME][:20]
    places = {member.name: member for member in walk_tar(tar)} if unnamed else {}
    with open(open_regular(tar), "rb") as file:
        for name in unnamed:
            member = places.get(name)
            if member and image_kind(os.pread(file.fileno(), 16, member.offset)):
                return (
                    f"The content of {name} is an image: write the tar with names that end in "
                    ".jpg, .png or .webp."
                )
    return "Leave this tar out."


def read_paths(tar: Path, content: TarContent) -> dict[str, str] | None:
    """Paths of the original files by key, from the list in a tar; None without a sound one."""
    member = content.paths
    if member is None or member.size > MAX_LIST_BYTES:
        return None
    with open(open_regular(tar), "rb") as file:
        return parse_list(os.pread(file.fileno(), member.size, member.offset))


def lost_entry(damage: TarError) -> tuple[str, str]:
    """The entry of a lost stretch among `skipped`."""
    member = ascii(damage.member)[1:-1] if damage.member else f"byte {damage.position}"
    return member, f"{damage.lost} bytes from byte {damage.position} on are lost: {damage.reason}"


def write_index(tar: Path, index: ShardIndex) -> Path:
    """Write the index beside its tar, whole or not at all; its JSON form, which is older, goes."""
    path = write_file(index_path(tar), to_bytes(index))
    json_path(tar).unlink(missing_ok=True)
    return path


def read_index(tar: Path) -> ShardIndex:
    """The index beside a tar, checked against the tar's size and hash.

    Raises:
        ShardError: if it is missing, broken, or was made for another tar.
    """
    index = read_any_index(tar)
    if not fits_tar(index, tar):
        raise ShardError(stale(tar, index_name(tar)))
    return index


def index_name(tar: Path) -> str:
    """Name of the file that is read as the index of a tar."""
    return (index_file(tar) or index_path(tar)).name


def stale(tar: Path, name: str) -> str:
    """What is wrong with the index of another state of a tar; `name`: of the index's file."""
    return (
        f"{name}: was made for another state of {tar.name} (size or content differ): copy the tar "
        f"again from its source, {CHECK}. Only if it was changed on purpose, {CURE}, for new runs."
    )


def fits_tar(index: ShardIndex | IndexHeader, tar: Path) -> bool:
    """Whether an index was made for this state of a tar, by size and hash."""
    return index.tar_bytes == os.path.getsize(tar) and index.tar_hash == tar_hash(tar)


def read_any_index(tar: Path) -> ShardIndex:
    """The index beside a tar, even if it is stale or another tar's; the JSON form where there is no
    other.

    Raises:
        ShardError: if it is missing or broken.
    """
    path = index_file(tar)
    if path is None:
        raise ShardError(missing(tar))
    return open_index(path.name, index_bytes(path)).whole()


def missing(tar: Path) -> str:
    """What is wrong with a tar that has no index."""
    return f"{tar.name}: has no index beside it ({index_path(tar).name}): {CURE}."


def open_index(name: str, data: bytes) -> IndexFile:
    """An index file from its content; the JSON form is converted.

    Args:
        name: what errors call the file.
        data: its content, in either form.

    Raises:
        ShardError: if its header is broken, or anything in the JSON form.
    """
    if data.lstrip()[:1] not in (b"{", b"["):
        return IndexFile(name, data)
    converted = IndexFile(name, to_bytes(parse_json(name, data)))
    return converted.check()


def tar_hash(tar: Path) -> str:
    """SHA-256 (hex) over the first and the last 4 KiB."""
    descriptor = open_regular(tar)
    try:
        return hash_ends(descriptor)
    finally:
        os.close(descriptor)


def hash_ends(descriptor: int) -> str:
    """`tar_hash` of a file that is open."""
    size = os.fstat(descriptor).st_size
    head = read_at(descriptor, END_BYTES, 0)
    tail = read_at(descriptor, END_BYTES, max(0, size - END_BYTES))
    return hashlib.sha256(head + tail).hexdigest()
