"""Files beside shards, and shards, that are no files: a pipe, a folder, a device, a socket, a hole of
terabytes, deep nesting. Each is named, and nobody waits for it."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from fastmoco_pipelines.errors import ShardError
from fastmoco_pipelines.files.small import UnfitFileError, open_regular, read_small
from fastmoco_pipelines.formats.index import index_path, json_path, tar_hash
from fastmoco_pipelines.formats.manifest import MOVING, NAME, read_moving, read_sets
from fastmoco_pipelines.formats.quarantine import quarantine_path, read_list
from fastmoco_pipelines.formats.tar import walk_damaged
from fastmoco_pipelines.inspecting.check import check_shards
from fastmoco_pipelines.making.indexing import index_shards
from fastmoco_pipelines.making.one_writer import LOCK, one_writer
from fastmoco_pipelines.sets.shard_set import ShardSet


def pipe(path: Path) -> None:
    os.mkfifo(path)


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def bound_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(path))


def hole(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 41)


def deep(path: Path) -> None:
    path.write_bytes(b'{"a":' * 200_000)


ODD: dict[str, tuple[Callable[[Path], None], str]] = {
    "pipe": (pipe, "is a named pipe where a file is due"),
    "zeros": (zeros, "is a device where a file is due"),
    "socket": (bound_socket, "is a socket where a file is due"),
    "folder": (Path.mkdir, "is a folder where a file is due|Is a directory"),
    "hole": (hole, "2,199,023,255,552 bytes"),
}
KINDS = {kind: ODD[kind] for kind in ("pipe", "zeros", "socket")}


@pytest.fixture
def folder(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "set"))


def put(path: Path, make: Callable[[Path], None]) -> None:
    path.unlink(missing_ok=True)
    make(path)


@pytest.mark.parametrize("kind", ODD)
def test_an_index_that_is_no_file(folder, kind, monkeypatch):
    make, words = ODD[kind]
    monkeypatch.setattr("fastmoco_pipelines.sets.local_files._PAUSES", (0.0,))
    tar = folder / "train-000001.tar"
    put(index_path(tar), make)
    if kind == "hole":
        words = "is not an index of fastmoco"
    with pytest.raises(ShardError, match=rf"{index_path(tar).name}: .*({words}).*data index"):
        ShardSet.open(str(folder))
    if kind == "pipe":
        report = check_shards(str(folder), workers=1, quarantine=False)
        (fault,) = report.faults
        assert fault.kind == "broken index"
        assert words in fault.reason


@pytest.mark.parametrize("kind", [*ODD, "deep"])
def test_an_index_in_json_that_is_no_file(folder, kind, monkeypatch):
    make, words = (ODD | {"deep": (deep, "nested deeper than")})[kind]
    monkeypatch.setattr("fastmoco_pipelines.sets.local_files._PAUSES", (0.0,))
    monkeypatch.setattr("fastmoco_pipelines.sets.local_set.MAX_JSON_BYTES", 1 << 21)
    tar = folder / "train-000001.tar"
    index_path(tar).unlink()
    put(json_path(tar), make)
    if kind == "hole":  # zeros are no JSON, and no more of them are read than an index may have
        words = "is not an index of fastmoco"
    with pytest.raises(ShardError, match=rf"{json_path(tar).name}: .*({words}).*data index"):
        ShardSet.open(str(folder))


@pytest.mark.parametrize("kind", ODD)
def test_a_manifest_that_is_no_file(folder, kind):
    make, words = ODD[kind]
    put(folder / NAME, make)
    for use in (
        lambda: ShardSet.open(str(folder)),
        lambda: read_sets(folder),
        lambda: index_shards(str(folder)),
        lambda: check_shards(str(folder), workers=1, quarantine=False),
    ):
        with pytest.raises(ShardError, match=rf"{NAME}: .*({words}).*move"):
            use()


@pytest.mark.parametrize("name", [NAME, "quarantine.jsonl"])
def test_a_file_that_may_not_be_read_is_named(folder, name, monkeypatch):
    def refused(path, *_, **__):
        if Path(path).name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return read_small(path)

    for module in ("manifest", "quarantine"):
        monkeypatch.setattr(f"fastmoco_pipelines.formats.{module}.read_small", refused)
    with pytest.raises(ShardError, match=rf"{name}: cannot be read .Permission.*make it readable"):
        check_shards(str(folder), workers=1)


@pytest.mark.parametrize("kind", ODD)
def test_a_list_that_is_no_file_is_said_and_ends_a_check_at_its_start(folder, kind):
    make, words = ODD[kind]
    put(quarantine_path(folder), make)
    with ShardSet.open(str(folder)) as shards:
        entries, (problem,) = shards.quarantine()
    assert len(entries) == 0
    assert words.partition("|")[0] in problem
    assert problem == read_list(quarantine_path(folder))[1]
    with pytest.raises(ShardError, match=rf"quarantine.jsonl: .*({words}).*writes a new one"):
        check_shards(str(folder), workers=1)


@pytest.mark.parametrize("kind", [*ODD, "deep"])
def test_a_list_of_moves_that_is_no_file_moves_nothing(folder, kind):
    put(folder / MOVING, (ODD | {"deep": (deep, "")})[kind][0])
    assert read_moving(folder) is None
    with one_writer(folder, "test") as finished:
        assert finished == {}


@pytest.mark.parametrize("kind", [*KINDS, "folder"])
def test_a_lock_that_is_no_file_is_named(folder, kind):
    make, words = ODD[kind]
    make(folder / LOCK)
    words = "is a symbolic link" if kind == "zeros" else words
    with pytest.raises(UnfitFileError, match=rf"{LOCK}: {words}"), one_writer(folder, "test"):
        pass


@pytest.mark.parametrize("name", ["train-000001.tar", "more.tar"])
@pytest.mark.parametrize("kind", [*KINDS, "nowhere", "itself"])
def test_a_shard_that_is_no_file(folder, kind, name):
    """Also one more than the manifest lists: left out unnoticed, its images would be missing."""
    nowhere = (lambda path: path.symlink_to("/nowhere.tar"), "is a link to nothing")
    itself = (lambda path: path.symlink_to(path.name), r"cannot be read \(Too many levels")
    make, words = (KINDS | {"nowhere": nowhere, "itself": itself})[kind]
    put(folder / name, make)
    for pattern in (str(folder), f"{folder}/*.tar", f"{folder}/{name}"):
        for use in (ShardSet.open, index_shards):
            with pytest.raises(ValueError, match=f"{name}: {words}"):
                use(pattern)


@pytest.mark.parametrize("kind", [*KINDS, "folder"])
def test_a_shard_that_becomes_none_is_not_waited_for(folder, kind, monkeypatch):
    monkeypatch.setattr("fastmoco_pipelines.sets.local_files._PAUSES", (0.0,))
    make, words = ODD[kind]
    tar = folder / "train-000000.tar"
    with ShardSet.open(str(folder)) as shards:
        put(tar, make)
        found = shards.read_each([0])
    assert isinstance(found[0], ShardError)
    assert words.partition("|")[0] in str(found[0])
    for use in (tar_hash, open_regular):
        with pytest.raises(UnfitFileError, match=words):
            use(tar)
    members, (damage,) = walk_damaged(tar)
    assert members == []
    assert words.partition("|")[0] in str(damage)
