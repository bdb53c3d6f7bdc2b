"""`data index` over tars of a server: the files that a local run writes, in a folder of this
machine."""

from __future__ import annotations

import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest

from fastmoco_pipelines.errors import RemoteError, ShardError
from fastmoco_pipelines.making.indexing import index_shards
from fastmoco_pipelines.sets.shard_set import ShardSet
from fastmoco_pipelines.spec import CacheSpec
from fastmoco_pipelines.stores import object_store
from tests.pipelines.http_fault_server import FaultServer, drop, status
from tests.pipelines.stores.test_http_faults import QUICK
from tests.pipelines.tar_faults import DAMAGES, good_members


@pytest.fixture
def foreign(tmp_path, write_tar, noise_image):
    """Three tars that somebody else packed, with class names."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    for number in range(3):
        members = good_members(noise_image, 20 * number)
        named = [
            (
                name.replace(".cls", ".txt"),
                [b"cat", b"dog", b"owl"][int(data)] if name.endswith("cls") else data,
            )
            for name, data in members
        ]
        write_tar(folder / f"set-{number:02d}.tar", named)
    return folder


@pytest.fixture
def options(tmp_path):
    return {
        "cache": CacheSpec(cache_dir=str(tmp_path / "cache"), cache_size_gb=0.01),
        "transfers": QUICK,
    }


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.suffix in (".json", ".index")
    }


def test_indexes_and_class_names_are_those_of_a_local_run(foreign, tmp_path, options):
    local = Path(shutil.copytree(foreign, tmp_path / "local"))
    expected = index_shards(str(local))
    before = sorted(path.name for path in foreign.iterdir())
    out = tmp_path / "out"
    with FaultServer(foreign) as server:
        server.script["set-01.tar"] = [status(503), drop(10), drop(9000), drop(20_000)]
        report = index_shards(f"{server.url}/set-{{00..02}}.tar", out=out, **options)
        assert content(out) == content(local)
        assert len(content(out)) == 4
        assert sorted(path.name for path in out.iterdir()) == sorted(
            content(out)
        )  # no tar, no link is left
        assert (report.samples, report.classes, report.uploads) == (
            60,
            expected.classes,
            {out: f"{server.url}/"},
        )
        assert sorted(path.name for path in foreign.iterdir()) == before
        assert not list(
            Path(options["cache"].cache_dir).glob("*.tar")
        )  # nothing but their size speaks for these copies
        for path in out.iterdir():
            shutil.copy(path, foreign)
        with ShardSet.open(f"{server.url}/", cache=options["cache"], limits=QUICK) as shards:
            assert (len(shards.read(np.arange(60))), shards.classes) == (60, ("cat", "dog", "owl"))


def test_nothing_is_written_to_a_server_and_the_cure_is_told(foreign, tmp_path, options):
    with FaultServer(foreign) as server:
        with pytest.raises(
            ValueError, match=r"nothing is written to a server: give a folder .*--out FOLDER"
        ):
            index_shards(f"{server.url}/set-00.tar", **options)
        with pytest.raises(RemoteError, match=r"none\.tar: does not exist"):
            index_shards(f"{server.url}/none.tar", out=tmp_path / "out", **options)
        with pytest.raises(ValueError, match=r"no manifest\.json that lists the shards"):
            index_shards(f"{server.url}/", out=tmp_path / "out", **options)
    with pytest.raises(ValueError, match="is for shards of a server"):
        index_shards(str(foreign), out=tmp_path / "out")


def test_classes_of_other_sets_of_the_place_keep_their_numbers(
    foreign, tmp_path, write_tar, noise_image, options
):
    labels = [(f"{i}.txt", b"owl" if i % 2 else b"dog") for i in range(4)]
    write_tar(foreign / "val-00.tar", [*((f"{i}.jpg", noise_image(i)) for i in range(4)), *labels])
    index_shards(f"{foreign}/set-*.tar")
    out = tmp_path / "out"
    with FaultServer(foreign) as server:
        report = index_shards(f"{server.url}/val-{{00..00}}.tar", out=out, **options)
    assert report.classes == ("cat", "dog", "owl")
    index_shards(f"{foreign}/val-00.tar")
    assert content(out) == {
        name: data for name, data in content(foreign).items() if not name.startswith("set-")
    }


def test_a_damaged_tar_of_a_server_can_be_salvaged(foreign, tmp_path, options):
    tar = foreign / "set-00.tar"
    tar.write_bytes(DAMAGES["cut inside a header"].make(tar.read_bytes()))
    local = Path(shutil.copytree(foreign, tmp_path / "local"))
    expected = index_shards(str(local), salvage=True)
    with FaultServer(foreign) as server:
        pattern = f"{server.url}/set-{{00..02}}.tar"
        with pytest.raises(ShardError, match=r"set-00\.tar: byte \d+: .*--salvage"):
            index_shards(pattern, out=tmp_path / "out", **options)
        report = index_shards(pattern, out=tmp_path / "out", salvage=True, **options)
    assert (report.samples, report.lost, report.gone) == (
        expected.samples,
        expected.lost,
        expected.gone,
    )
    assert content(tmp_path / "out") == content(local)


def test_several_places_and_stores(foreign, tmp_path, options, monkeypatch):
    memory = fsspec.filesystem("memory")
    for path in foreign.iterdir():
        place = "one" if path.name < "set-01" else "two"
        memory.pipe_file(f"/foreign/{place}/{path.name}", path.read_bytes())
    monkeypatch.setattr(object_store, "file_system", lambda scheme: memory)
    monkeypatch.setattr(object_store, "BLOCK_BYTES", 5000)
    out = tmp_path / "out"
    report = index_shards("s3://foreign/{one,two}/*.tar", out=out, **options)
    assert report.samples == 60
    assert report.uploads == {out / "0": "s3://foreign/one/", out / "1": "s3://foreign/two/"}
    assert sorted(content(out / "0")) == ["manifest.json", "set-00.tar.index"]
    assert sorted(content(out / "1")) == [
        "manifest.json",
        "set-01.tar.index",
        "set-02.tar.index",
    ]


def test_links_of_a_killed_run_do_not_stand_in_the_way(foreign, tmp_path, options):
    out = tmp_path / "out"
    out.mkdir()
    (out / "set-00.tar").symlink_to("/proc/1/fd/99")
    (out / "set-01.tar").write_bytes(b"a tar of the user's own")
    with FaultServer(foreign) as server:
        assert index_shards(f"{server.url}/set-00.tar", out=out, **options).samples == 20
        with pytest.raises(OSError, match=r"set-01\.tar"):
            index_shards(f"{server.url}/set-01.tar", out=out, **options)
    assert (out / "set-01.tar").read_bytes() == b"a tar of the user's own"
