"""The original files of packed images: in the index and its JSON form, again after the indexes were
lost, and wherever a sample is named."""

from __future__ import annotations

import io
import json
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmoco_pipelines import index_shards, pack_folder
from fastmoco_pipelines.errors import ShardError
from fastmoco_pipelines.formats.index import index_path, json_path, read_index, write_index
from fastmoco_pipelines.formats.index_file import IndexFile
from fastmoco_pipelines.formats.index_json import parse_json
from fastmoco_pipelines.formats.paths import MEMBER, parse_list, to_list, to_path
from fastmoco_pipelines.healing.bad_samples import BadSamples
from fastmoco_pipelines.sets.shard_set import ShardSet

NAMES = (
    b"cat/IMG 1.jpg",
    b"cat/Gr\xfc\xdfe.jpg",  # Latin-1
    b"cat/a\xcc\x88rmel.jpg",  # decomposed
    b"cat/\x1b[2Jall is well\n.jpg",
    b"dog\xff/a\tb\\udce9.jpg",
    b"dog\xff/\xed\xb3\xa9.jpg",  # an encoded surrogate
    b"dog\xff/deep/er/" + b"x" * 200 + b".jpg",
)
"""Paths as bytes, each of another kind."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an image of another color for each of the names."""
    for number, name in enumerate(NAMES):
        path = os.path.join(os.fsencode(tmp_path / "photos"), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            Image.new("RGB", (16, 16), (30 * number, 0, 0)).save(file, "JPEG")
    return tmp_path / "photos"


@pytest.fixture
def packed(folder: Path, tmp_path: Path) -> Path:
    """The folder as two shards."""
    pack_folder(folder, tmp_path / "out", shard_samples=4)
    return tmp_path / "out"


def wanted(packed: Path, folder: Path) -> list[str]:
    """The path of every sample, found by its bytes."""
    by_bytes = {}
    for name in NAMES:
        with open(os.path.join(os.fsencode(folder), name), "rb") as file:
            by_bytes[file.read()] = to_path(os.fsdecode(name))
    with ShardSet.open(str(packed)) as shards:
        return [by_bytes[data.tobytes()] for data in shards.read(np.arange(len(shards)))]


def paths_of(packed: Path) -> list[str]:
    with ShardSet.open(str(packed)) as shards:
        return shards.paths_of(np.arange(len(shards)))


def test_a_set_knows_the_file_of_every_sample(packed, folder):
    paths = paths_of(packed)
    assert paths == wanted(packed, folder)
    assert sorted(path.encode("utf-8", "surrogateescape") for path in paths) == sorted(NAMES)
    with ShardSet.open(str(packed)) as shards:
        assert shards.paths_of(np.array([5, 0, 5])) == [paths[5], paths[0], paths[5]]
        assert shards.path_of(6) == paths[6]
        # what is shown cannot move the cursor, and can be encoded
        shown = [shards.describe(i) for i in range(7)]
        assert all(text.isprintable() for text in shown)
        where = paths.index("cat/IMG 1.jpg")
        assert shown[where].endswith(f"{where:09d}.jpg (cat/IMG 1.jpg)")


@pytest.mark.parametrize("lost", ["indexes", "manifest too"])
def test_paths_survive_the_loss_of_the_indexes(packed, folder, lost):
    before = paths_of(packed)
    for path in packed.glob("*.index" if lost == "indexes" else "*[!r]"):
        if path.suffix != ".tar":
            path.unlink()
    report = index_shards(str(packed))
    assert report.skipped == ()
    assert paths_of(packed) == before == wanted(packed, folder)


def test_a_salvaged_tar_takes_paths_from_its_older_index(packed):
    before = paths_of(packed)
    tar = packed / "train-000000.tar"
    index = read_index(tar)
    # Cut inside the fourth image: the list, at the end, is gone.
    os.truncate(tar, index.columns["offset"][3] + 8)
    index_shards(str(tar), salvage=True)
    assert read_index(tar).paths == before[:3]


def test_a_damaged_list_costs_the_names_alone_and_is_reported(packed):
    tar = packed / "train-000000.tar"
    index_path(tar).unlink()
    raw = tar.read_bytes()
    with tarfile.open(tar) as opened:
        offset = opened.getmember(MEMBER).offset_data
    tar.write_bytes(raw[: offset + 100] + bytes([raw[offset + 100] ^ 1]) + raw[offset + 101 :])
    report = index_shards(str(tar))
    assert [member for _, member, _ in report.skipped] == [MEMBER]
    assert read_index(tar).paths is None
    assert len(read_index(tar)) == 4


def test_the_json_form_carries_any_path(packed):
    index_shards(str(packed), json=True)
    for tar in sorted(packed.glob("*.tar")):
        text = json_path(tar).read_bytes()
        assert parse_json("x", text).paths == read_index(tar).paths
        # for programs that refuse halves of surrogate pairs
        values = json.loads(text)["path"]
        plain = [value for value in values if isinstance(value, str)]
        assert all(value.encode() for value in plain)
        assert any(isinstance(value, dict) for value in values)


def test_the_same_folder_gives_the_same_bytes_and_the_digest_knows_no_names(
    packed, folder, tmp_path
):
    pack_folder(folder, tmp_path / "again", shard_samples=4)
    for path in sorted(packed.iterdir()):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    with ShardSet.open(str(packed)) as shards:
        digests = shards.digest, shards.digest_1
    # Indexes of earlier versions have no paths, and are read as ever.
    for tar in packed.glob("*.tar"):
        write_index(tar, replace(read_index(tar), paths=None))
    with ShardSet.open(str(packed)) as shards:
        assert (shards.digest, shards.digest_1) == digests
        assert shards.path_of(2) == "000000002.jpg"
        assert shards.describe(2) == "train-000000.tar: 000000002.jpg"


def test_opening_reads_no_paths(packed):
    for tar in packed.glob("*.tar"):
        path = index_path(tar)
        data = bytearray(path.read_bytes())
        data[IndexFile("x", bytes(data)).header.sections["paths"].start + 40] ^= 1
        path.write_bytes(data)
    with ShardSet.open(str(packed)) as shards:
        assert len(shards.read(np.arange(7))) == 7
        with pytest.raises(
            ShardError, match=r"changed or damaged .*\(paths\).*fastmoco data index"
        ):
            shards.path_of(0)
        assert shards.describe(0) == "train-000000.tar: 000000000.jpg"


def test_tars_of_other_programs_keep_the_names_of_their_members(tmp_path):
    names = ["a/b/one.jpg", "two.rgb.PNG"]
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number, name in enumerate(names):
            image = io.BytesIO()
            Image.new("RGB", (16, 16), (number, 0, 0)).save(image, "PNG")
            info = tarfile.TarInfo(name)
            info.size = len(image.getvalue())
            tar.addfile(info, io.BytesIO(image.getvalue()))
        # a file of theirs by the name of the list
        info = tarfile.TarInfo(MEMBER)
        info.size = 5
        tar.addfile(info, io.BytesIO(b"hello"))
    index_shards(str(tmp_path))
    assert paths_of(tmp_path) == names
    assert read_index(tmp_path / "x.tar").paths is None


def test_bad_samples_are_named_with_their_files(packed, folder, tmp_path):
    run_list = tmp_path / "quarantine.jsonl"
    number = wanted(packed, folder).index(to_path(os.fsdecode(NAMES[3])))
    with ShardSet.open(str(packed)) as shards:
        bad = BadSamples(shards, max_bad_share=1.0, run_list=run_list)
        bad.add(number, "it cannot be decoded")
        (line,) = bad.news()
    escaped = r"cat/\x1b[2Jall is well\n.jpg"
    assert f"({escaped}): it cannot be decoded" in line
    assert json.loads(run_list.read_text())["file"] == escaped


def test_a_list_is_lossless():
    entries = {f"{i}": to_path(os.fsdecode(name)) for i, name in enumerate(NAMES)}
    data = to_list(entries.items())
    assert parse_list(data) == entries
    assert parse_list(data[:-1]) is None
    assert parse_list(to_list([])) == {}
