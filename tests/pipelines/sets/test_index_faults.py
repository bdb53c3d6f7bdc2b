"""Indexes that are missing, stale, garbage, hostile or another tar's: named, and never the way to a
wrong sample."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from fastmoco_pipelines.errors import ShardError
from fastmoco_pipelines.files.whole import sealed_json
from fastmoco_pipelines.formats.index import build_index, read_index, write_index
from fastmoco_pipelines.inspecting.check import check_shards
from fastmoco_pipelines.sets.shard_set import ShardSet
from tests.pipelines.index_forms import json_of, put_json

COUNT = 6


@pytest.fixture(scope="module")
def pair(tmp_path_factory, write_tar, noise_image):
    """Two indexed tars of equally many samples."""
    folder = tmp_path_factory.mktemp("pair")
    for number, name in enumerate(("a.tar", "b.tar")):
        members = [(f"{i}.jpg", noise_image(10 * number + i, 40, 48)) for i in range(COUNT)]
        path = write_tar(folder / name, members)
        write_index(path, build_index(path))
    return folder


def unsealed(content: dict) -> dict:
    return {name: value for name, value in content.items() if name != "content_hash"}


def edited(content: dict, column: str, row: int, value: int) -> dict:
    return content | {column: [*content[column][:row], value, *content[column][row + 1 :]]}


FAULTS = {
    "missing": lambda own, other: None,
    "empty": lambda own, other: b"",
    "garbage": lambda own, other: b"\x00\xff" * 500,
    "cut": lambda own, other: json.dumps(own).encode()[:200],
    "of another tar": lambda own, other: sealed_json(unsealed(other)),
    "huge offset": lambda own, other: sealed_json(edited(unsealed(own), "offset", 2, 2**62)),
    "offset beyond its end": lambda own, other: sealed_json(
        edited(unsealed(own), "offset", 2, own["tar_bytes"] - 10)
    ),
    "an offset of another image": lambda own, other: sealed_json(
        edited(unsealed(own), "offset", 1, own["offset"][2])
    ),
    "a shifted offset": lambda own, other: sealed_json(
        edited(unsealed(own), "offset", 1, own["offset"][1] + 1)
    ),
    "negative size": lambda own, other: sealed_json(edited(unsealed(own), "size", 1, -5)),
    "size beyond its end": lambda own, other: sealed_json(
        edited(unsealed(own), "size", 5, 60 << 20)
    ),
    "too few rows": lambda own, other: sealed_json(unsealed(own) | {"key": own["key"][:-1]}),
    "too many rows": lambda own, other: sealed_json(unsealed(own) | {"crc32": own["crc32"] * 2}),
    "a label changed by hand": lambda own, other: json.dumps(edited(own, "label", 0, 3)).encode(),
    "without a hash": lambda own, other: json.dumps(unsealed(own)).encode(),
    "a flipped bit": lambda own, other: (
        json.dumps(own, separators=(",", ":")).encode().replace(b"48", b"58", 1)
    ),
}
# Faults of one row, which only its bytes give away: name of the reading that must not happen.
ROWS = {
    "a wrong size": lambda own: edited(unsealed(own), "size", 1, own["size"][1] - 1),
    "a wrong checksum": lambda own: edited(unsealed(own), "crc32", 1, own["crc32"][1] ^ 1),
    "a wrong height": lambda own: edited(unsealed(own), "height", 1, 41),
}


def with_index(pair, tar, content: bytes | None):
    """A copy of the first tar beside this index."""
    shutil.copy(pair / "a.tar", tar)
    if content is not None:
        put_json(tar, content)
    return tar


def faults_of(report, tar: str) -> set[str]:
    return {fault.kind for fault in report.faults if fault.shard == tar}


@pytest.fixture(scope="module")
def faulty(pair, tmp_path_factory):
    """(folder with one tar for each faulty index, report of its check)."""
    folder = tmp_path_factory.mktemp("faulty")
    own, other = (json.loads(sealed_json(json_of(pair / tar))) for tar in ("a.tar", "b.tar"))
    for name, fault in FAULTS.items():
        with_index(pair, folder / f"{name}.tar", fault(own, other))
    return folder, check_shards(str(folder), workers=1)


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_index_is_refused(faulty, name):
    tar = faulty[0] / f"{name}.tar"
    with pytest.raises(ShardError, match=rf"{name}\.tar.*fastmoco data index"):
        read_index(tar)
    with pytest.raises(ShardError, match=rf"{name}\.tar"):
        ShardSet.open(str(tar))
    if name == "missing":
        assert faults_of(faulty[1], tar.name) == set()
    else:
        wanted = "stale index" if name == "of another tar" else "broken index"
        assert faults_of(faulty[1], tar.name) == {wanted}


def test_the_check_reads_on_without_a_faulty_index(faulty):
    report = faulty[1]
    assert report.promised == report.delivered == COUNT * len(FAULTS)
    assert report.refused_shards == len(FAULTS)
    assert [note for note in report.notes if "missing.tar: has no index" in note]
    for name in FAULTS:
        tar = faulty[0] / f"{name}.tar"
        write_index(tar, build_index(tar))
        assert len(ShardSet.open(str(tar))) == COUNT


def test_rows_that_lie_cost_themselves_alone(pair, tmp_path):
    """An index with the right hash of its tar and a wrong row: that sample is quarantined, five are
    delivered."""
    own = json_of(pair / "a.tar") | {"content_hash": ""}
    for name, lie in ROWS.items():
        with_index(pair, tmp_path / f"{name}.tar", sealed_json(lie(own)))
    report = check_shards(str(tmp_path), workers=1)
    assert report.promised == COUNT * len(ROWS)
    assert report.quarantined == len(ROWS)
    for name in ROWS:
        found = faults_of(report, f"{name}.tar")
        assert found & {"changed bytes", "wrong index"}, name
        assert found <= {"changed bytes", "wrong index", "not indexed"}, name


def test_an_index_of_an_earlier_state_tells_what_is_gone(pair, tmp_path):
    tar = with_index(pair, tmp_path / "a.tar", sealed_json(json_of(pair / "a.tar")))
    raw = tar.read_bytes()
    tar.write_bytes(raw[: read_index(tar).columns["offset"][4] - 512])
    report = check_shards(str(tar), workers=1)
    assert (report.promised, report.delivered, report.quarantined) == (COUNT, 4, 2)
    assert [fault.member for fault in report.faults if fault.kind == "cut off"] == [
        "4.jpg",
        "5.jpg",
    ]


def test_labels_beyond_the_classes_of_the_manifest_are_refused_for_a_training_with_labels(
    packed, tmp_path
):
    folder = shutil.copytree(packed, tmp_path / "set")
    tar = folder / "train-000001.tar"
    index = read_index(tar)
    with ShardSet.open(str(folder)) as shards:
        shards.require_labels("set", classes=3)
    write_index(tar, replace(index, columns=index.columns | {"label": [7] * len(index)}))
    with (
        ShardSet.open(str(folder)) as shards,
        pytest.raises(
            ShardError, match=r"labels up to 7, its manifest\.json names 3 classes.*data"
        ),
    ):
        shards.require_labels("set", classes=3)
