"""Tars of 20 samples, damaged in every way of the test plan: each lost sample is counted, and the
rest is delivered."""

from __future__ import annotations

import tarfile

import numpy as np
import pytest

from fastmoco_pipelines.errors import ShardError
from fastmoco_pipelines.formats.index import build_index, index_path, write_index
from fastmoco_pipelines.formats.manifest import write_sets
from fastmoco_pipelines.formats.quarantine import Quarantine, quarantine_path
from fastmoco_pipelines.inspecting.check import check_shards
from fastmoco_pipelines.making.indexing import index_shards
from fastmoco_pipelines.sets.shard_set import ShardSet
from tests.pipelines.index_forms import json_of, put_json
from tests.pipelines.tar_faults import COUNT, DAMAGES, good_members


@pytest.fixture(scope="module")
def whole(tmp_path_factory, write_tar, noise_image):
    path = write_tar(tmp_path_factory.mktemp("whole") / "whole.tar", good_members(noise_image))
    write_index(path, build_index(path))
    return path


@pytest.fixture(scope="module")
def damaged(tmp_path_factory, whole):
    """(folder of damaged tars with the indexes of the whole ones, folder without indexes), {tar
    name: damage}."""
    folders = tmp_path_factory.mktemp("indexed"), tmp_path_factory.mktemp("fresh")
    raw, index = whole.read_bytes(), json_of(whole)
    names = {f"{i:02d}.tar": name for i, name in enumerate(DAMAGES)}
    for tar, name in names.items():
        for folder in folders:
            (folder / tar).write_bytes(DAMAGES[name].make(raw))
        put_json(folders[0] / tar, index | {"tar": tar})
    return folders, names


@pytest.fixture(scope="module")
def reports(damaged):
    (indexed, fresh), _ = damaged
    return check_shards(str(indexed), workers=1), check_shards(str(fresh), workers=2)


def kinds_by_tar(report) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for fault in report.faults:
        found.setdefault(fault.shard, set()).add(fault.kind)
    return found


def test_every_promised_sample_is_delivered_or_quarantined(damaged, reports):
    """20 for each of the tars, whatever happened to them."""
    report, names = reports[0], damaged[1]
    assert report.promised == COUNT * len(names)
    assert report.delivered == sum(damage.delivered for damage in DAMAGES.values())
    assert report.delivered + report.quarantined == report.promised
    by_tar = dict.fromkeys(names, COUNT)
    for fault in report.faults:
        by_tar[fault.shard] -= fault.outcome == "quarantined"
    assert by_tar == {tar: DAMAGES[name].delivered for tar, name in names.items()}


def test_every_damage_is_named(damaged, reports):
    found = [kinds_by_tar(report) for report in reports]
    for tar, name in damaged[1].items():
        assert set(DAMAGES[name].kinds) <= found[0][tar], name
        assert set(DAMAGES[name].fresh_kinds) <= found[1][tar], name


def test_without_an_index_what_can_be_found_is_counted(damaged, reports):
    report = reports[1]
    assert report.promised == report.delivered == sum(damage.fresh for damage in DAMAGES.values())
    assert len(report.notes) == len(DAMAGES)  # each lacks its index


def test_the_quarantine_and_the_loaders_view_of_it_agree(damaged, reports, tmp_path):
    """A tar whose size and ends are right is opened, and one that the list describes as it is now:
    quarantined samples fail to read, all others are delivered."""
    (indexed, _), names = damaged
    quarantine = Quarantine.read(quarantine_path(indexed))
    assert len(quarantine) == reports[0].quarantined
    for tar, name in names.items():
        shards = ShardSet.open(str(indexed / tar))
        fault = "its bytes differ"
        if "stale index" in DAMAGES[name].kinds:
            fault = f"({fault}|the tar ends inside it)"
            alone = tmp_path / tar
            alone.write_bytes((indexed / tar).read_bytes())
            index_path(alone).write_bytes(index_path(indexed / tar).read_bytes())
            with pytest.raises(ShardError, match=tar):
                ShardSet.open(str(alone))
        index = json_of(indexed / tar)
        bad = quarantine.rows(tar, index["offset"], index["size"], index["crc32"])
        for i in range(len(shards)):
            if i in bad:
                with pytest.raises(ShardError, match=rf"{tar}: 0\d\d\.jpg: {fault}"):
                    shards.read(np.array([i]))
            else:
                shards.read(np.array([i]))
        assert len(shards) - len(bad) == DAMAGES[name].delivered


def test_a_damaged_tar_gets_no_index_and_the_others_do(damaged, whole, tmp_path):
    (_, fresh), names = damaged
    for tar in names:
        (tmp_path / tar).write_bytes((fresh / tar).read_bytes())
    (tmp_path / "whole.tar").write_bytes(whole.read_bytes())
    with pytest.raises(ShardError, match=r"00\.tar: .*And 12 more of the 15 tars failed"):
        index_shards(str(tmp_path))
    indexed = sorted(path.name for path in tmp_path.glob("*.index"))
    # A hole in an image's bytes leaves the tar whole: that image is no image any more and is left
    # out.
    assert indexed == [
        f"{list(DAMAGES).index('zeroed block in the data'):02d}.tar.index",
        "whole.tar.index",
    ]


def test_a_manifest_counts_what_nothing_else_tells(damaged, tmp_path):
    """A cut tar without its index: the manifest knows that 20 were promised."""
    (_, fresh), names = damaged
    tar = next(tar for tar, name in names.items() if name == "cut at a member's edge")
    (tmp_path / tar).write_bytes((fresh / tar).read_bytes())
    shards = [{"name": tar, "samples": COUNT}, {"name": "99.tar", "samples": 7}]
    write_sets(tmp_path, {"train": {"classes": [], "shards": shards}})
    report = check_shards(str(tmp_path), workers=1, quarantine=False)
    assert (report.promised, report.delivered, report.quarantined) == (COUNT + 7, 10, 17)
    assert report.counts() == {"damaged tar": 1, "lost samples": 1, "missing shard": 1}


def test_samples_that_their_names_give_away(tmp_path, write_tar, noise_image):
    """Duplicate keys, split groups, missing images, escapes from the archive, links and devices:
    all counted."""
    image = noise_image(0)
    write_tar(
        tmp_path / "x.tar",
        [
            ("dup.jpg", image),
            ("dup.cls", b"1"),
            ("dup.jpg", noise_image(1)),
            ("split.jpg", image),
            ("other.JPG", image),
            ("split.cls", b"2"),
            ("noimage.cls", b"3"),
            ("../../evil.jpg", image),
            ("/abs/evil.jpg", image),
            ("a\\..\\b.jpg", image),
            ("esc\x1b[2J\x07.jpg", image),
            ("soft.jpg", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
            ("hard.jpg", {"type": tarfile.LNKTYPE, "linkname": "dup.jpg"}),
            ("null.jpg", {"type": tarfile.CHRTYPE}),
            ("fifo.jpg", {"type": tarfile.FIFOTYPE}),
            ("folder", {"type": tarfile.DIRTYPE}),
            ("moving.gif", b"GIF89a"),
            ("._other.JPG", b"what macOS leaves"),
        ],
    )
    before = (tmp_path / "x.tar").read_bytes()
    report = check_shards(str(tmp_path), workers=1)
    assert report.counts() == {
        "unsafe name": 4,
        "link or device": 4,
        "duplicate key": 1,
        "missing image": 1,
        "unsupported format": 1,
        "scattered sample": 1,
    }
    assert (report.promised, report.delivered, report.left_out) == (3, 3, 11)
    assert all(fault.member.isprintable() and fault.reason.isprintable() for fault in report.faults)
    assert "\\x1b" in next(fault.member for fault in report.faults if "esc" in fault.member)
    assert (tmp_path / "x.tar").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "x.tar"
    ]  # nothing is unpacked, nothing else written


@pytest.mark.parametrize("layout", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_upper_case_are_fine(tmp_path, write_tar, noise_image, layout):
    long = "folder/" * 30
    path = write_tar(
        tmp_path / "x.tar", [(f"{long}{i}.JPEG", noise_image(i)) for i in range(3)], format=layout
    )
    assert index_shards(str(path)).samples == 3
    report = check_shards(str(path), workers=1)
    assert report.clean
    assert report.delivered == 3
