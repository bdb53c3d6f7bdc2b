"""Inputs whose outcome another library, or the sound input, can judge: images, tars, indexes."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
import zlib
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.fuzz import samples
from benchmarks.fuzz.changes import change_bytes, change_tar
from benchmarks.fuzz.target import Target
from fastmoco_pipelines.errors import ImageRefusedError, ShardError, TarError
from fastmoco_pipelines.files.whole import sealed_json
from fastmoco_pipelines.formats.images import read_header
from fastmoco_pipelines.formats.index import (
    build_index,
    index_path,
    json_path,
    read_index,
    write_index,
)
from fastmoco_pipelines.formats.index_file import to_bytes
from fastmoco_pipelines.formats.index_json import json_content
from fastmoco_pipelines.formats.tar import walk_damaged, walk_tar
from fastmoco_pipelines.sets.shard_set import ShardSet
from fastmoco_pipelines.views.decode_child import Decoder

ALIKE_LEVELS = 1.0
"""Two decoders agree within this many levels of 0 to 255; CMYK has no unique
conversion: see CMYK_LEVELS."""
CMYK_LEVELS = 3.0
_decoder = Decoder()
_originals: dict[bytes, NDArray[np.uint8]] = {}


def judge_image(_: Path, data: bytes, sound: bytes) -> str:
    """Refused, accepted with the same pixels as in Pillow, or a violation."""
    if sound not in _originals:
        _originals[sound] = _decoder.decode(sound).copy()
    try:
        header = read_header(data)
    except ImageRefusedError:
        return "refused by its header"
    try:
        pixels = _decoder.decode(data)
    except Exception as error:  # DALI raises several types
        return f"refused by the decoder: {type(error).__name__}"
    if pixels.shape != (header.height, header.width, 3):
        return f"VIOLATION: another size than its header: {pixels.shape} {header}"
    if np.array_equal(pixels, _originals[sound]):
        return "accepted, pixels of the original"
    try:
        wanted, levels = pillow_pixels(data)
    except Exception:  # hostile bytes may raise anything
        return "accepted, Pillow refuses, caught by crc32"
    if wanted.shape != pixels.shape:
        return f"VIOLATION: another size than Pillow's: {pixels.shape} {wanted.shape}"
    far = np.abs(pixels - wanted).max()
    if far > levels:
        return f"VIOLATION: pixels differ from Pillow's by up to {far:.0f} levels"
    return "accepted, pixel-equal to Pillow, caught by crc32"


def pillow_pixels(data: bytes) -> tuple[NDArray[np.float64], float]:
    """(pixels as RGB of 8 bits, levels by which another decoder may differ)."""
    image = Image.open(io.BytesIO(data))
    image.load()
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float64) / 257
        return np.repeat(grey[..., None], 3, axis=2), ALIKE_LEVELS
    return np.asarray(image.convert("RGB")).astype(
        np.float64
    ), CMYK_LEVELS if image.mode == "CMYK" else ALIKE_LEVELS


def warm_up() -> None:
    """Load the decoders of every format in both libraries."""
    for kind in ("JPEG", "PNG", "WEBP"):
        out = io.BytesIO()
        Image.new("RGB", (16, 16)).save(out, kind)
        _decoder.decode(out.getvalue())
        pillow_pixels(out.getvalue())


def judge_tar(folder: Path, data: bytes, _: bytes) -> str:
    """Refused with a reason, or read as by the standard library."""
    path = folder / "x.tar"
    path.write_bytes(data)

    # The strict and the tolerant reader must agree on whether the tar is damaged.
    members, faults = walk_damaged(path)
    try:
        strict = list(walk_tar(path))
    except TarError as error:
        if not faults:
            return f"VIOLATION: refused and found sound: {error}"
        try:
            build_index(path)
        except ShardError:
            return "refused by name"
        return f"VIOLATION: a refused tar got an index: {error}"
    if faults or strict != members:
        return f"VIOLATION: accepted and found damaged: {faults}"

    # The standard library is the reference for members.
    ours = [(m.name, m.offset, m.size) for m in strict if not m.kind]
    try:
        with tarfile.open(path) as tar:
            theirs = [
                (m.name, m.offset_data, m.size)
                for m in tar.getmembers()
                if m.isreg() and not m.issparse()
            ]
    except Exception:  # of any kind
        return "accepted, the standard library refuses"
    try:
        write_index(path, build_index(path))
        with ShardSet.open(str(path)) as shards:
            shards.read(np.arange(len(shards)))
    except ShardError:
        return "accepted tar without a usable index"

    # Compare the members of both.
    places = [(offset, size) for _, offset, size in ours]
    if {(offset, size) for _, offset, size in theirs} - set(places):
        return "VIOLATION: a member that the standard library finds is missing"
    if len(places) > len(theirs):  # at a damaged field that no reader needs: an owner, a date
        return "accepted, the standard library loses members"
    if (
        ours != theirs
    ):  # a forged checksum over a damaged prefix, which GNU's own headers do not have
        return "accepted, the standard library reads another name"
    return "accepted, the members of the standard library"


def judge_index(folder: Path, data: bytes, sound: bytes) -> str:
    """Refused with a reason, or every sample has the right bytes and label."""
    forms = _index_seeds()
    raw = samples.tars()[forms.index(sound) // 2]
    path = folder / "x.tar"
    path.write_bytes(raw)
    truth = build_index(path)
    form = json_path(path) if data.lstrip()[:1] == b"{" else index_path(path)
    form.write_bytes(data)
    try:
        index = read_index(path)
        with ShardSet.open(str(path)) as shards:
            encoded = shards.read(np.arange(len(shards)))
    except ShardError:
        return "refused by name"
    offsets = truth.columns["offset"]
    for i, image in enumerate(encoded):
        offset = index.columns["offset"][i]
        row = offsets.index(offset) if offset in offsets else -1
        wanted = raw[offsets[row] : offsets[row] + truth.columns["size"][row]]
        if row < 0 or image.tobytes() != wanted:
            return f"VIOLATION: a wrong sample {index.member(i)}"
        label, key = truth.columns["label"][row], truth.keys[row]
        if index.columns["label"][i] != label or index.keys[i] != key:
            sealed = b'"content_hash"' in data or not data.lstrip().startswith(b"{")
            if sealed:
                return "VIOLATION: a wrong label"
            return "accepted, another label or key in an index without hash"
    if len(encoded) != len(truth):
        return f"VIOLATION: samples lost without an error, {len(encoded)} left"
    return "accepted, nothing that matters is changed"


def _index_seeds() -> list[bytes]:
    """The binary and the JSON form of the index of each tar, in turn."""
    pairs = ((to_bytes(index), sealed_json(json_content(index))) for index in samples.indexes())
    return [form for pair in pairs for form in pair][: 2 * len(samples.tars())]


def _change_index(rng: Random, data: bytes, seeds: list[bytes]) -> bytes:
    # The JSON form without the hash of its content, as the first versions wrote it.
    if data.startswith(b"{") and rng.random() < 0.5:
        data = data[: data.rindex(b',"content_hash"')] + b"}"
    changed = bytearray(change_bytes(rng, data, seeds))
    if not data.startswith(b"{") and rng.random() < 0.5:
        # The hash of the header made right, so that what is in it is looked at.
        size = int.from_bytes(changed[12:16], "little")
        changed[16:48] = hashlib.sha256(changed[48 : 48 + size]).digest()
    return bytes(changed)


def _change_image(rng: Random, data: bytes, seeds: list[bytes]) -> bytes:
    changed = bytearray(change_bytes(rng, data, seeds))
    if rng.random() < 0.5:
        _mend_png(changed)
    return bytes(changed)


def _mend_png(data: bytearray) -> None:
    """Correct the checksums, so that the decoder is reached."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return
    at = 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            return
        data[end : end + 4] = zlib.crc32(data[at + 4 : end]).to_bytes(4, "big")
        at = end + 4


def pith(text: str) -> str:
    """A message without its numbers and names, for counting; of a violation as of a refusal."""
    return re.sub(r"\d+", "N", re.sub(r"'[^']*'|b?\"[^\"]*\"", "'...'", text))[:160]


def targets() -> dict[str, Target]:
    """The targets of this module."""
    return {
        "image": Target(
            share=0.06,
            seeds=lambda: list(samples.images()),
            change=_change_image,
            read=judge_image,
            warm_up=warm_up,
        ),
        "tar": Target(
            share=0.06,
            seeds=lambda: list(samples.tars()),
            change=lambda rng, data, _: change_tar(rng, data),
            read=judge_tar,
        ),
        "index": Target(
            share=0.05,
            seeds=_index_seeds,
            change=_change_index,
            read=judge_index,
        ),
    }
