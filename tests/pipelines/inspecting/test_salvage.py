"""What is left of damaged tars: indexed on demand alone, and every byte and sample that is gone is
told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fastmoco_pipelines.errors import ShardError
from fastmoco_pipelines.formats.index import build_index, index_path, read_index, write_index
from fastmoco_pipelines.formats.tar import BLOCK, MAX_FAULTS, walk_damaged
from fastmoco_pipelines.making.indexing import index_shards
from fastmoco_pipelines.making.pack import pack_folder
from fastmoco_pipelines.sets.shard_set import ShardSet
from tests.pipelines.tar_faults import COUNT, DAMAGES, good_members, member

SOUND = ("zeroed block in the data",)  # the walk goes through, one image is none any more
HOPELESS = (
    "zero bytes",
    "valid empty tar",
    "HTML",
    "random bytes",
    "gzip named .tar",
    "truncated gzip",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, write_tar, noise_image):
    path = write_tar(tmp_path_factory.mktemp("whole") / "whole.tar", good_members(noise_image))
    write_index(path, build_index(path))
    return path


def require_account(path: Path) -> None:
    """Every byte is a member's, or lost, or of the zeros at the end. (No long names: no records
    before members.)"""
    members, faults = walk_damaged(path)
    total = path.stat().st_size
    spans = [
        (m.offset - BLOCK, m.offset + (0 if m.kind else -(-m.size // BLOCK) * BLOCK))
        for m in members
    ]
    spans += [(fault.position, fault.position + fault.lost) for fault in faults]
    position = 0
    for start, end in sorted(spans):
        assert start == position, "two parts overlap, or one is missing"
        position = end
    assert not path.read_bytes()[min(position, total) :].strip(b"\0")


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_found_and_what_is_lost_add_up(name, whole, tmp_path):
    damage, path = DAMAGES[name], tmp_path / "x.tar"
    path.write_bytes(damage.make(whole.read_bytes()))
    if "gzip" not in name:
        require_account(path)
    if name in HOPELESS:
        with pytest.raises(
            ShardError, match="compressed" if "gzip" in name else "holds no usable image"
        ):
            index_shards(str(path), salvage=True)
        assert not index_path(path).exists()
        return
    if name not in SOUND:
        with pytest.raises(ShardError, match=r"x\.tar: byte \d+: .*fastmoco data index --salvage"):
            index_shards(str(path))
        assert not index_path(path).exists()
    report = index_shards(str(path), salvage=True)
    assert report.samples == damage.fresh
    assert bool(report.lost) == (name not in SOUND)
    with ShardSet.open(str(path)) as shards, ShardSet.open(str(whole)) as good:
        places = [good.keys.index(key) for key in shards.keys]
        for ours, theirs in zip(
            shards.read(np.arange(len(shards))), good.read(np.array(places)), strict=True
        ):
            assert np.array_equal(ours, theirs)
    # The index itself tells too, to whoever opens the set.
    texts = [
        f"{part.size} bytes from byte {part.offset} on are lost: {part.reason}"
        for part in report.lost
    ]
    assert [reason for _, reason in read_index(path).skipped if "are lost: " in reason] == texts
    again = index_shards(str(path), salvage=True)
    assert (again.samples, again.lost) == (report.samples, report.lost)


def test_places_sizes_and_reasons_are_exact(whole, tmp_path):
    raw, path = whole.read_bytes(), tmp_path / "x.tar"
    start, data, size = member(raw, "010.jpg")
    following, _, _ = member(raw, "010.cls")
    path.write_bytes(DAMAGES["random bytes in a header"].make(raw))
    (part,) = index_shards(str(path), salvage=True).lost
    assert (part.shard, part.offset, part.size, part.member) == (
        "x.tar",
        start,
        following - start,
        "",
    )
    assert part.reason == "no valid member header (checksum)"
    path.write_bytes(DAMAGES["cut inside a member"].make(raw))
    (part,) = index_shards(str(path), salvage=True).lost
    assert (part.offset, part.size, part.member) == (start, BLOCK + size // 2, "010.jpg")
    assert "reaches past the file's end" in part.reason
    path.write_bytes(DAMAGES["cut at a member's edge"].make(raw))
    (part,) = index_shards(str(path), salvage=True).lost
    assert (part.offset, part.size) == (start, 0)
    assert "without the archive's end mark" in part.reason
    assert data == start + BLOCK


def test_an_older_index_or_a_manifest_tells_how_many_samples_are_gone(
    whole, tmp_path, write_tar, noise_image
):
    path = tmp_path / "whole.tar"
    path.write_bytes(DAMAGES["cut inside a member"].make(whole.read_bytes()))
    index_path(path).write_bytes(index_path(whole).read_bytes())
    assert index_shards(str(path), salvage=True).gone == (("whole.tar", 10),)
    assert (
        index_shards(str(path), salvage=True).gone == ()
    )  # the index has been replaced: nobody knows of them any more
    (tmp_path / "named").mkdir()
    named = write_tar(
        tmp_path / "named" / "x.tar",
        [
            (name.replace("cls", "txt"), data + b"th" if "cls" in name else data)
            for name, data in good_members(noise_image)
        ],
    )
    index_shards(str(named))
    assert json.loads((named.parent / "manifest.json").read_text())["sets"]["x"]["samples"] == COUNT
    index_path(named).unlink()
    raw = named.read_bytes()
    named.write_bytes(raw[: member(raw, "015.jpg")[0]])
    report = index_shards(str(named), salvage=True)
    assert (report.samples, report.gone) == (15, (("x.tar", 5),))
    with ShardSet.open(str(named)) as shards:  # the manifest follows
        assert len(shards) == 15


def test_a_salvaged_shard_of_a_packed_set_is_read(image_folder, tmp_path):
    pytest.importorskip("webdataset")
    report = pack_folder(image_folder, tmp_path / "out", shard_samples=30)
    raw = report.shards[0].read_bytes()
    report.shards[0].write_bytes(raw[: len(raw) // 2])
    left = index_shards(report.pattern, salvage=True)
    assert left.gone == (("train-000000.tar", 45 - left.samples),)
    with ShardSet.open(report.pattern) as shards:
        assert len(shards) == left.samples
        labels = shards.labels.tolist()
    entry = json.loads((tmp_path / "out" / "manifest.json").read_text())["sets"]["train"]
    assert entry["samples"] == left.samples
    assert entry["class_counts"] == [labels.count(label) for label in range(3)]
    paths = [read_index(shard).paths for shard in report.shards]
    assert all(path.count("/") == 1 for part in paths for path in part)


def test_an_index_that_knows_more_is_not_thrown_away(whole, tmp_path):
    """A damaged header hides a sample from a new index; the old one still delivers it."""
    path = tmp_path / "whole.tar"
    path.write_bytes(DAMAGES["random bytes in a header"].make(whole.read_bytes()))
    before = index_path(whole).read_bytes()
    index_path(path).write_bytes(before)
    with pytest.raises(
        ShardError, match=r"its index knows 1 sample more .* delete whole\.tar\.index first"
    ):
        index_shards(str(path), salvage=True)
    assert index_path(path).read_bytes() == before
    with ShardSet.open(str(path)) as shards:
        assert len(shards.read(np.arange(COUNT))) == COUNT


def test_one_bad_tar_among_good_ones(whole, tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.tar").write_bytes(whole.read_bytes())
    bad = DAMAGES["zeroed kilobyte in a header"].make(whole.read_bytes())
    (tmp_path / "1.tar").write_bytes(bad)
    report = index_shards(str(tmp_path), salvage=True)
    assert (report.shards, report.samples, {part.shard for part in report.lost}) == (
        3,
        59,
        {"1.tar"},
    )
    assert (tmp_path / "1.tar").read_bytes() == bad


def test_a_tar_of_damage_alone_is_not_searched_for_ever_and_is_told_whole(tmp_path, write_tar):
    path = write_tar(
        tmp_path / "x.tar", [(f"{i:03d}.jpg", b"x") for i in range(MAX_FAULTS * 2 + 50)]
    )
    raw = bytearray(path.read_bytes())
    for at in range(2 * BLOCK, len(raw), 4 * BLOCK):  # every second header
        raw[at : at + BLOCK] = bytes([7]) * BLOCK
    path.write_bytes(raw)
    members, faults = walk_damaged(path)
    assert len(faults) == MAX_FAULTS
    assert len(members) == MAX_FAULTS
    assert faults[-1].position + faults[-1].lost == len(raw)
    assert "is not searched" in faults[-1].reason
    require_account(path)


def test_random_damage_always_adds_up(whole, tmp_path):
    raw, path = whole.read_bytes(), tmp_path / "x.tar"
    rng = np.random.default_rng(0)
    faulty = 0
    for _ in range(300):
        damaged = bytearray(raw)
        for at in rng.integers(0, len(raw), rng.integers(1, 4)).tolist():
            block = at // BLOCK * BLOCK if rng.random() < 0.7 else at
            damaged[block : block + int(rng.choice([1, 100, BLOCK, 3000]))] = rng.bytes(
                int(rng.choice([1, 100, BLOCK]))
            )
        path.write_bytes(
            damaged[: int(rng.integers(1, len(damaged)))] if rng.random() < 0.3 else damaged
        )
        require_account(path)
        faulty += bool(walk_damaged(path)[1])
    assert faulty > 100
