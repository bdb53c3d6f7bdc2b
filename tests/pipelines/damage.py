"""Sets of shards with known damage, for the tests of the loaders."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastmoco_pipelines.formats.index import read_any_index, tar_hash, write_index
from fastmoco_pipelines.formats.quarantine import Quarantine
from fastmoco_pipelines.sets.shard_set import ShardSet

KINDS = ("changed", "garbage", "truncated", "empty")


def place_of(folder: Path, sample_id: int) -> tuple[Path, int, int, int]:
    """Tar, row in its index, offset and size of a sample."""
    with ShardSet.open(str(folder)) as shards:
        entry, (_, samples) = shards.entry(sample_id), shards.shard_of(sample_id)
    return folder / entry["shard"], sample_id - samples.start, entry["offset"], entry["size"]


def damage(folder: Path, sample_id: int, kind: str) -> str:
    """Damage one image in place; returns its name.

    "changed": other bytes than in the index. "garbage", "truncated" (without its second half) and
    "empty" (zeros) match the index, as if another tool had packed damaged files.
    """
    tar, row, offset, size = place_of(folder, sample_id)
    raw = bytearray(tar.read_bytes())
    rng = np.random.default_rng(sample_id)
    if kind == "changed":
        raw[offset + size // 2] ^= 0xFF
    elif kind == "garbage":
        raw[offset : offset + size] = rng.bytes(size)
    elif kind == "truncated":
        raw[offset + size // 2 : offset + size] = bytes(size - size // 2)
        if raw[offset : offset + 4] == b"RIFF":  # half of a lossy WebP decodes without an error
            raw[offset + 4 : offset + 8] = (size + 100).to_bytes(4, "little")
    elif kind == "empty":
        raw[offset : offset + size] = bytes(size)
    tar.write_bytes(raw)
    index = replace(read_any_index(tar), tar_hash=tar_hash(tar))
    if kind != "changed":
        index.columns["crc32"][row] = zlib.crc32(bytes(raw[offset : offset + size]))
    write_index(tar, index)
    return f"{tar.name}: {index.member(row)}"


def damaged_copy(packed: Path, to: Path, bad: Mapping[int, str]) -> Path:
    """A copy of a set in which some samples are damaged, each in its way."""
    folder = Path(shutil.copytree(packed, to))
    for sample_id, kind in bad.items():
        damage(folder, sample_id, kind)
    return folder


def listed(**reasons: str) -> Quarantine:
    """A list with the first sample of some shards, by the name of the shard without its ending."""
    quarantine = Quarantine()
    for shard, reason in reasons.items():
        quarantine.add(
            shard=f"{shard.replace('_', '-')}.tar",
            key="1",
            extension="jpg",
            offset=0,
            size=1,
            crc32=1,
            reason=reason,
        )
    return quarantine
