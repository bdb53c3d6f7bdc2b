"""Shards in unusual places: brackets, braces, `~`, parts of several sets, and the shortest pattern
of given files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from fastmoco_pipelines.errors import ShardError
from fastmoco_pipelines.making.pack import pack_folder
from fastmoco_pipelines.sets.folder_sets import is_part, pattern_of, sets_of_folder
from fastmoco_pipelines.sets.patterns import expand_shards, local_names, sets_of, spells_out
from fastmoco_pipelines.sets.shard_set import ShardSet

PLACES = [
    "My Set [v1]",
    "{a}",
    "{a,b} c",
    "a,b",
    "what?*",
    "[!x]/[a-z]{0..3}",
    "~name",
    "-rf",
    " spaced ",
    "odd:name",
    "\u732b\u202e",
    os.fsdecode(b"na\xefve"),
    "$HOME",
]


def tars(folder: Path, *names: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return [folder / name for name in names]


@pytest.mark.parametrize("place", PLACES)
def test_parts_of_a_path_that_exist_are_taken_as_they_are(tmp_path, monkeypatch, place):
    two = tars(tmp_path / place, "train-000000.tar", "train-000001.tar")
    tars(tmp_path / "a", "train-000000.tar")  # what a glob or braces would name
    monkeypatch.chdir(tmp_path)
    for start in (place, str(tmp_path / place), f"./{place}", f"a/../{place}"):
        for pattern in ("train-*.tar", "train-{000000..000001}.tar", "", "./train-00000[01].tar"):
            found = [path.resolve() for path in expand_shards(f"{start}/{pattern}")]
            assert found == two, (start, pattern)
    assert spells_out(f"{place}/train-{{000000..000001}}.tar")
    assert not spells_out(f"{place}/train-*.tar")


def test_brackets_may_follow_a_glob_and_braces(tmp_path):
    one, two = (
        tars(tmp_path / name / "set [v1]" / "{x}", "train-000000.tar")[0] for name in ("a", "b")
    )
    tars(tmp_path / "c", "train-000000.tar")
    for pattern in ("*/set [v1]/{x}/train-*.tar", "{a,b}/set [v1]/{x}/*.tar", "[ab]/*/{x}/t*"):
        assert expand_shards(f"{tmp_path}/{pattern}") == [one, two]


def test_the_pattern_of_a_pack_is_understood_by_a_loader(image_folder, tmp_path):
    report = pack_folder(image_folder, tmp_path / "out [v1] {b,c}*", shard_samples=40)
    with ShardSet.open(report.pattern) as shards:
        assert len(shards) == 45


def test_home_is_found_unless_the_name_exists(tmp_path, monkeypatch):
    home = tars(tmp_path / "home" / "data", "train-000000.tar")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for pattern in ("~/data/train-*.tar", "~/data", "{~/data,~/data}/train-000000.tar"):
        assert expand_shards(pattern) == home
    here = tars(tmp_path / "~" / "data", "train-000001.tar")
    assert [path.resolve() for path in expand_shards("~/data/train-*.tar")] == here
    with pytest.raises(ValueError, match="'~nobody_here' is the home folder of no user"):
        expand_shards("~nobody_here/train-*.tar")


@pytest.mark.parametrize("name", ["$HOME", "${DATA_ROOT}"])
def test_a_variable_in_single_quotes_is_named(tmp_path, name):
    with pytest.raises(ValueError, match=r"does not replace \$.* in single quotes"):
        expand_shards(f"{tmp_path}/{name}/train-*.tar")
    with pytest.raises(ValueError, match="in double quotes"):
        expand_shards(f"{name}/train-000000.tar")


@pytest.mark.parametrize(
    ("names", "others", "pattern"),
    [
        (["train-000000.tar", "train-000001.tar"], ["test-000000.tar"], "train-*.tar"),
        (["train-000000.tar", "test-000000.tar"], [], "*.tar"),
        (["a.tar", "b.tar"], ["c.tar"], "{a.tar,b.tar}"),
        ([f"x{i}.tar" for i in (7, 8, 9)], ["x5.tar"], "x{7..9}.tar"),
        (["s-01.tar", "s-04.tar"], ["s-02.tar"], "s-{01,04}.tar"),
        ([f"s-{i}.tar" for i in range(12)], ["t-0.tar"], "s-*.tar"),
        (["q[1]-0.tar", "q[1]-1.tar"], ["q1-0.tar"], "{q[1]-0.tar,q[1]-1.tar}"),
    ],
)
def test_the_pattern_of_files_names_these_and_no_others(tmp_path, names, others, pattern):
    paths = tars(tmp_path, *names)
    tars(tmp_path, *others)
    found = pattern_of([str(path) for path in paths])
    assert found == f"{tmp_path}/{pattern}"
    assert sorted(expand_shards(found)) == sorted(paths)


def test_the_pattern_of_files_in_several_folders(tmp_path):
    paths = [*tars(tmp_path / "a", "x-0.tar", "x-1.tar"), *tars(tmp_path / "b", "x-0.tar")]
    found = pattern_of([str(path) for path in paths])
    assert found == f"{{{tmp_path}/a/x-*.tar,{tmp_path}/b/x-*.tar}}"
    assert expand_shards(found) == paths
    odd = [*tars(tmp_path / "a", "x,0.tar"), *tars(tmp_path / "b", "y.tar")]
    with pytest.raises(ValueError, match="commas or braces cannot be one pattern"):
        pattern_of([str(path) for path in odd])


@pytest.mark.parametrize(
    ("names", "sets"),
    [
        (["train-0.tar", "test-0.tar"], {"test", "train"}),
        (["train2017-0.tar", "val2017-0.tar", "val2017-1.tar"], {"train2017", "val2017"}),
        (["shards-0.tar", "validation_set-0.tar"], {"shards", "validation_set"}),
        (["a.tar", "b.tar", "test-0.tar"], {"other", "test"}),
        (["n01440764.tar", "n01443537.tar"], {""}),
        (["cats.tar", "dogs.tar"], {""}),
        (["000000.tar", "000001.tar"], {""}),
        (["train-0.tar", "train-1.tar"], {"train"}),
    ],
)
def test_sets_of_a_folder_without_a_manifest_are_known_by_their_names(tmp_path, names, sets):
    paths = tars(tmp_path, *names)
    found = sets_of_folder(str(tmp_path))
    assert set(found) == sets
    assert sorted(path for group in found.values() for path in group) == sorted(map(str, paths))
    if len(sets) == 1:
        assert sets_of(str(tmp_path)) == [("", str(tmp_path))]
        assert expand_shards(str(tmp_path)) == sorted(paths)
    else:
        assert {name for name, _ in sets_of(str(tmp_path))} == sets
        with pytest.raises(ValueError, match="holds several sets: name one"):
            expand_shards(str(tmp_path))
        assert expand_shards(str(tmp_path), several=True) == sorted(paths)


def test_tars_that_the_manifest_does_not_list_are_no_part_of_its_set(packed, tmp_path):
    out = Path(shutil.copytree(packed, tmp_path / "out"))
    assert sets_of(str(out)) == [("", str(out))]
    shutil.copy(out / "train-000000.tar", out / "heldout-000000.tar")
    assert sets_of(str(out)) == [
        ("heldout", f"{out}/heldout-*.tar"),
        ("train", f"{out}/train-*.tar"),
    ]


def test_names_of_parts():
    names = "train Val test_images TRAIN2017 valid held-out unlabeled eval dev test.set trainval"
    assert all(map(is_part, names.split()))
    others = "cat trains testament tester device evaluate deva 0 n1"
    assert not any(map(is_part, others.split()))


def test_braces_that_are_never_closed_are_part_of_a_name():
    for pattern in ("{s3://b/a.tar", "{https://user:s3cr3t@h/a.tar", "{file:///a", "{a://b,c"):
        with pytest.raises((ValueError, ShardError)) as refused:
            local_names(pattern)
        assert "s3cr3t" not in str(refused.value)
