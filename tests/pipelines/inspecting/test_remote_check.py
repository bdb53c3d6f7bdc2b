"""`data check` and `data stats` over servers: what a local check of the same files says, and
nothing written there."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import fsspec
import numpy as np
import pytest

from fastmoco_pipelines.errors import RemoteError, ShardError
from fastmoco_pipelines.formats.index import build_index, index_path, read_index, write_index
from fastmoco_pipelines.formats.quarantine import CURE, Quarantine, quarantine_path
from fastmoco_pipelines.healing.bad_samples import BadSamples
from fastmoco_pipelines.inspecting import check as check_module
from fastmoco_pipelines.inspecting.check import check_shards
from fastmoco_pipelines.inspecting.stats import measure_shards
from fastmoco_pipelines.sets.shard_set import ShardSet
from fastmoco_pipelines.spec import CacheSpec
from fastmoco_pipelines.stores import object_store
from tests.pipelines.damage import damaged_copy, listed
from tests.pipelines.http_fault_server import FaultServer, drop, plain, stall, status
from tests.pipelines.index_forms import json_of, put_json
from tests.pipelines.quick_pool import QuickPool
from tests.pipelines.stores.test_http_faults import AGAIN, QUICK
from tests.pipelines.tar_faults import DAMAGES, good_members

SECRET = "Geheim123"


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(check_module, "DecodePool", QuickPool)


@pytest.fixture
def options(tmp_path):
    cache = CacheSpec(cache_dir=str(tmp_path / "cache"), cache_size_gb=0.01)
    return {"cache": cache, "transfers": QUICK, "remote_lists": tmp_path / "lists", "workers": 1}


def the_list(options) -> Path:
    (path,) = options["remote_lists"].iterdir()
    return path


def alike(report) -> dict:
    """A report without what has to differ."""
    different = ("pattern", "seconds", "quarantine_files", "uploads")
    return {key: value for key, value in asdict(report).items() if key not in different}


def state(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("indexed", [True, False])
def test_damaged_tars_get_the_report_of_a_local_check(
    indexed, tmp_path, write_tar, noise_image, options
):
    """By the decoding processes that are always used: they read the copies too. Fourteen tars, each
    damaged otherwise."""
    whole = write_tar(tmp_path / "whole.tar", good_members(noise_image))
    write_index(whole, build_index(whole))
    folder = tmp_path / "set"
    folder.mkdir()
    content = json_of(whole)
    for number, fault in enumerate(DAMAGES.values()):
        tar = folder / f"{number:02d}.tar"
        tar.write_bytes(fault.make(whole.read_bytes()))
        if indexed:
            put_json(tar, content | {"tar": tar.name})
    local = check_shards(str(folder), workers=1)
    quarantine = quarantine_path(folder)
    expected = [entry.identity for entry in Quarantine.read(quarantine)]
    quarantine.unlink(missing_ok=True)
    before = state(folder)
    with FaultServer(folder) as server:
        remote = check_shards(f"{server.url}/{{00..{len(DAMAGES) - 1:02d}}}.tar", **options)
    assert alike(remote) == alike(local)
    assert remote.promised == remote.delivered + remote.quarantined
    found = Quarantine.read(the_list(options)) if expected else []
    assert [entry.identity for entry in found] == expected
    assert len(expected) == (local.quarantined if indexed else 0)
    assert state(folder) == before


def test_list_uploaded_by_hand_is_what_loaders_honour(packed, tmp_path, options, quick):
    folder = damaged_copy(packed, tmp_path / "set", {17: "changed", 30: "garbage"})
    local = check_shards(str(folder), workers=1)
    (entry, _) = Quarantine.read(quarantine_path(folder))
    quarantine_path(folder).unlink()
    before = state(folder)
    calls: list[tuple[int, int]] = []
    with FaultServer(folder) as server:
        report = check_shards(
            f"{server.url}/", progress=lambda *call: calls.append(call), **options
        )
        assert alike(report) == alike(local)
        assert (report.promised, report.delivered, report.quarantined) == (45, 43, 2)
        assert report.uploads == [f"{server.url}/quarantine.jsonl"]
        assert report.quarantine_files == [the_list(options)]
        assert calls[-1] == (report.total_bytes, report.total_bytes)
        assert state(folder) == before
        shutil.copy(the_list(options), quarantine_path(folder))
        with ShardSet.open(f"{server.url}/", cache=options["cache"], limits=QUICK) as shards:
            assert BadSamples(shards, max_bad_share=0).listed == 2
        again = check_shards(f"{server.url}/", **options)
        assert (again.quarantine_files, again.uploads) == ([], [])  # the server knows
        assert again.faults == report.faults
    assert next(iter(Quarantine.read(the_list(options)))).identity == entry.identity
    assert not [path.name for path in Path.cwd().glob("quarantine-*.jsonl")]


def test_lines_about_other_tars_stay_and_the_default_name_tells_the_place(
    packed, tmp_path, options, quick, monkeypatch
):
    folder = damaged_copy(packed, tmp_path / "set", {17: "changed"})
    theirs = listed(val_000000="r", train_000001="mended")
    theirs.write(quarantine_path(folder))
    with quarantine_path(folder).open("a") as file:
        file.write("garbage\n")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with FaultServer(tmp_path) as server:
        path = Path(f"quarantine-127.0.0.1-{server.url.rpartition(':')[2]}-set.jsonl")
        ours = listed(train_000002="another check")
        ours.write(path)
        del options["remote_lists"]
        report = check_shards(f"{server.url}/set/train-00000{{0,1}}.tar", **options)
        assert report.quarantine_files == [path]
        assert [(e.shard, e.offset > 0) for e in Quarantine.read(path)] == [
            ("val-000000.tar", False),
            ("train-000002.tar", False),
            ("train-000001.tar", True),
        ]
        assert report.notes == [
            f"{server.url}/set/quarantine.jsonl: 1 lines are not entries of a list and were skipped"
            f"{CURE}"
        ]
        path.unlink()
        assert not check_shards(f"{server.url}/set/", quarantine=False, **options).clean
        assert not list(Path().iterdir())


def test_failing_connections_and_damaged_copies_are_no_faults_of_the_set(
    packed, server, options, quick
):
    """What breaks on the way is fetched again; what broke in the cache too."""
    server.script["train-000000.tar"] = [status(503), drop(20), drop(9000)]
    server.script["train-000001.tar"] = [
        plain(),
        plain(other=lambda data: data[:700] + bytes(300) + data[1000:]),
    ]
    server.script["train-000002.tar.index"] = [stall(100)]
    assert check_shards(f"{server.url}/", **options | {"transfers": AGAIN}).clean
    folder = Path(options["cache"].cache_dir)
    for path in folder.glob("*.tar"):
        raw = bytearray(path.read_bytes())
        raw[2000] ^= 1
        path.chmod(0o600)
        path.write_bytes(raw)
    fetched = server.count("train-000000.tar")
    assert check_shards(f"{server.url}/", **options).clean
    assert server.count("train-000000.tar") == fetched + 2  # its size, and the tar anew
    assert check_shards(f"{server.url}/", **options).clean
    assert (
        server.count("train-000000.tar") == fetched + 3
    )  # its size alone: the same copies serve training and check
    assert {path.suffix for path in folder.iterdir()} <= {".tar", ".doc", ""}


def test_the_cache_stays_within_its_size(packed, server, options, quick, monkeypatch):
    largest = max(path.stat().st_size for path in packed.glob("*.tar"))
    options["cache"] = CacheSpec(
        cache_dir=options["cache"].cache_dir, cache_size_gb=1.2 * largest / 1e9
    )
    run = QuickPool.run
    monkeypatch.setattr(
        QuickPool, "run", lambda *arguments: (time.sleep(0.3), run(*arguments))[1]
    )  # fetched meanwhile
    assert check_shards(f"{server.url}/", **options).clean  # one at a time
    assert (
        sum(path.stat().st_size for path in Path(options["cache"].cache_dir).glob("*.tar"))
        <= 1.2 * largest
    )
    options["cache"] = CacheSpec(
        cache_dir=options["cache"].cache_dir, cache_size_gb=0.5 * largest / 1e9
    )
    with pytest.raises(
        RemoteError, match=r"train-00000\d\.tar: its \d+ bytes do not fit .*--cache-size-gb"
    ):
        check_shards(f"{server.url}/", **options)


def test_vanished_shards_are_lost_samples_or_refused_where_they_were_spelled_out(
    packed, server, options, quick
):
    server.always["train-000002.tar"] = status(404)
    report = check_shards(f"{server.url}/", **options)
    assert (report.promised, report.delivered, report.quarantined) == (45, 32, 13)
    assert report.counts() == {"missing shard": 1}
    with pytest.raises(RemoteError, match=r"train-000002\.tar: does not exist"):
        check_shards(f"{server.url}/train-{{000000..000002}}.tar", **options)
    assert check_shards(f"{server.url}/train-00000{{0,1}}.tar", **options).clean
    server.always["train-000001.tar"] = status(500)
    with pytest.raises(RemoteError, match=rf"{server.url}/train-000001\.tar: HTTP 500; given up"):
        check_shards(f"{server.url}/", **options)


def test_several_places_with_the_same_names_are_checked_apart(packed, tmp_path, options, quick):
    one = damaged_copy(packed, tmp_path / "one", {3: "changed"})
    two = damaged_copy(packed, tmp_path / "two", {20: "garbage", 5: "changed"})
    with FaultServer(one) as a, FaultServer(two) as b:
        host, other = (server.url.replace("://", f"://user:{SECRET}@") for server in (a, b))
        pattern = f"{{{host},{other}}}/train-00000{{0..2}}.tar?token={SECRET}"
        report = check_shards(pattern, **options)
        assert (report.promised, report.delivered, report.quarantined) == (90, 87, 3)
        assert sorted(report.uploads) == sorted(
            f"{server.url}/quarantine.jsonl" for server in (a, b)
        )
        text = json.dumps(asdict(report), default=str)
        assert SECRET not in text
        assert report.pattern.startswith("{http://127.0.0.1")
        written = dict(zip(report.uploads, report.quarantine_files, strict=True))
        for folder, server, count in ((one, a, 1), (two, b, 2)):
            shutil.copy(written[f"{server.url}/quarantine.jsonl"], quarantine_path(folder))
            with ShardSet.open(f"{server.url}/", cache=options["cache"], limits=QUICK) as shards:
                assert BadSamples(shards, max_bad_share=0).listed == count


def test_indexes_that_do_not_fit_or_cannot_be_read_are_faults_as_they_are_locally(
    packed, tmp_path, options, quick
):
    folder = Path(shutil.copytree(packed, tmp_path / "set"))
    index_path(folder / "train-000000.tar").write_text("{")
    tar = folder / "train-000001.tar"
    raw = bytearray(tar.read_bytes())
    raw[-1500] ^= 1  # of the same size, but with another end
    tar.write_bytes(raw)
    local = check_shards(str(folder), workers=1)
    quarantine_path(folder).unlink(missing_ok=True)
    with FaultServer(folder) as server:
        assert alike(check_shards(f"{server.url}/", **options)) == alike(local)
    assert {"broken index", "stale index"} <= set(local.counts())


def test_tars_of_one_name_on_a_server_are_told_by_url(packed, tmp_path, options, quick):
    for place in ("a", "b"):
        damaged_copy(packed, tmp_path / "sets" / place, {17: "changed"})
    with FaultServer(tmp_path / "sets") as server:
        url = server.url.replace("://", f"://user:{SECRET}@")
        report = check_shards(f"{url}/{{a,b}}/train-000001.tar?token={SECRET}", **options)
        assert [fault.path for fault in report.faults] == [
            f"{server.url}/{place}/train-000001.tar" for place in "ab"
        ]


def test_a_server_cannot_choose_where_files_appear(packed, tmp_path, options, quick):
    folder = Path(shutil.copytree(packed, tmp_path / "set"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sets"]["train"]["shards"][0]["name"] = "..%2fevil.tar"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with FaultServer(folder) as server:
        (folder / "sub").mkdir()
        (folder / "a\nb.tar").write_bytes(b"")
        shutil.copy(folder / "train-000000.tar", folder / "sub")
        for pattern in ("sub%2Ftrain-000000.tar", "a%0ab.tar"):
            with pytest.raises(ValueError, match="is not a file name of a shard"):
                check_shards(f"{server.url}/{pattern}", **options)
        check_shards(f"{server.url}/", **options)
    assert not list(tmp_path.rglob("evil*"))
    with pytest.raises(ValueError, match="is for shards of a server"):
        check_shards(str(packed), workers=1, remote_lists=tmp_path)


def test_stats_are_those_of_the_local_set(packed, server, options):
    local = measure_shards(str(packed))
    remote = measure_shards(f"{server.url}/", cache=options["cache"], transfers=QUICK)
    for name in ("heights", "widths", "sizes", "labels"):
        assert np.array_equal(getattr(local, name), getattr(remote, name))
    for name in ("shards", "tar_bytes", "kinds", "classes", "skipped"):
        assert getattr(local, name) == getattr(remote, name)
    assert server.count("train-000000.tar") == 0  # from the indexes alone
    url = server.url.replace("://", f"://user:{SECRET}@")
    assert SECRET not in measure_shards(f"{url}/", cache=options["cache"], transfers=QUICK).pattern


def test_a_store_is_checked_too(packed, tmp_path, options, quick, monkeypatch):
    memory = fsspec.filesystem("memory")
    folder = damaged_copy(packed, tmp_path / "set", {17: "changed"})
    index = read_index(folder / "train-000002.tar")
    index_path(folder / "train-000002.tar").unlink()
    for path in folder.iterdir():
        memory.pipe_file(f"/checked/set/{path.name}", path.read_bytes())
    memory.pipe_file("/checked/set/empty.tar", b"")
    monkeypatch.setattr(object_store, "BLOCK_BYTES", 5000)
    monkeypatch.setattr(object_store, "file_system", lambda scheme: memory)
    local = check_shards(str(folder), workers=1)
    report = check_shards("s3://checked/set/train-*.tar", **options)
    assert alike(report) == alike(local)
    assert report.uploads == ["s3://checked/set/quarantine.jsonl"]
    assert len(report.notes) == 1  # no index
    assert report.delivered == 44
    assert len(index) == 13
    assert check_shards("gs://checked/set/empty.tar", **options).counts() == {"damaged tar": 1}
    with pytest.raises(ShardError, match=r"none\.tar\.index: does not exist"):
        measure_shards("gs://checked/set/none.tar", cache=options["cache"], transfers=QUICK)
