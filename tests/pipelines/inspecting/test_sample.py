"""`data check --sample N`: what the full check says of the drawn images, at the cost of these."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fastmoco_pipelines.errors import RemoteError, ShardError
from fastmoco_pipelines.formats.index import (
    build_index,
    index_path,
    read_index,
    write_index,
    write_json_index,
)
from fastmoco_pipelines.formats.quarantine import Quarantine, quarantine_path
from fastmoco_pipelines.inspecting import check as check_module
from fastmoco_pipelines.inspecting import sample_check as sample_module
from fastmoco_pipelines.inspecting.check import check_shards
from fastmoco_pipelines.inspecting.draw import draw_sample, share_bound
from fastmoco_pipelines.inspecting.sample_check import check_sample
from fastmoco_pipelines.sets.shard_set import ShardSet
from fastmoco_pipelines.spec import CacheSpec
from tests.pipelines.damage import damaged_copy, listed
from tests.pipelines.http_fault_server import FaultServer, drop, plain, status
from tests.pipelines.quick_pool import QuickPool
from tests.pipelines.stores.test_http_faults import QUICK

BAD = {3: "changed", 8: "empty", 17: "garbage", 20: "empty", 31: "changed", 40: "changed"}
SECRET = "Geheim123"


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(check_module, "DecodePool", QuickPool)
    monkeypatch.setattr(sample_module, "DecodePool", QuickPool)


@pytest.fixture
def bad_set(packed, tmp_path) -> Path:
    return damaged_copy(packed, tmp_path / "set", BAD)


@pytest.fixture
def remote(tmp_path):
    cache = CacheSpec(cache_dir=str(tmp_path / "cache"), cache_size_gb=0.01)
    return {"cache": cache, "transfers": QUICK, "remote_lists": tmp_path / "lists"}


def names_of(folder: Path, sample_ids) -> set[tuple[str, str]]:
    """Tar and member of some samples."""
    with ShardSet.open(str(folder)) as shards:
        entries = [shards.entry(int(i)) for i in sample_ids]
    return {(one["shard"], f"{one['key']}.{one['extension']}") for one in entries}


def alike(report) -> dict:
    """A report without what has to differ between a local set and the same one on a server."""
    different = ("pattern", "seconds", "quarantine_files", "uploads")
    return {key: value for key, value in asdict(report).items() if key not in different}


@pytest.mark.parametrize("seed", range(3))
def test_faults_are_those_of_the_full_check_for_the_same_images(bad_set, seed):
    """By the decoding processes that are always used."""
    whole = check_shards(str(bad_set), workers=1, quarantine=False)
    drawn = draw_sample(45, 20, seed)
    names = names_of(bad_set, drawn)
    report = check_sample(str(bad_set), 20, seed=seed, workers=1)
    assert report.faults == [f for f in whole.faults if (f.shard, f.member) in names]
    bad = len(set(BAD) & set(drawn.tolist()))
    assert bad > 0
    assert (report.sample, report.population, report.bad) == (20, 45, bad)
    assert (report.promised, report.delivered, report.quarantined) == (20, 20 - bad, bad)
    assert report.bad_share_bound == share_bound(bad, 20)
    entries = Quarantine.read(quarantine_path(bad_set))
    assert {(e.shard, f"{e.key}.{e.extension}") for e in entries} == {
        (f.shard, f.member) for f in report.faults
    }
    assert not report.clean


@pytest.mark.usefixtures("quick")
def test_more_than_all_is_all(bad_set):
    report = check_sample(str(bad_set), 1000, workers=1)
    assert (report.sample, report.population, report.sampled_shards) == (45, 45, 3)
    assert report.faults == check_shards(str(bad_set), workers=1).faults
    assert report.bad_share_bound == len(BAD) / 45


@pytest.mark.usefixtures("quick")
def test_groups_change_nothing(bad_set, monkeypatch):
    whole = check_sample(str(bad_set), 30, workers=1)
    for images, size in ((4, 1 << 30), (1 << 30, 700)):
        monkeypatch.setattr(sample_module, "_GROUP_IMAGES", images)
        monkeypatch.setattr(sample_module, "_GROUP_BYTES", size)
        assert alike(check_sample(str(bad_set), 30, workers=1)) == alike(whole)


@pytest.mark.usefixtures("quick")
def test_lines_about_images_that_were_not_drawn_stay(bad_set):
    check_shards(str(bad_set), workers=1)
    old = [
        replace(e, when="2020-01-01T00:00:00Z") for e in Quarantine.read(quarantine_path(bad_set))
    ]
    seed = seed_that_draws({3, 17}, 9)
    drawn = draw_sample(45, 9, seed).tolist()
    assert len(set(BAD) - set(drawn)) >= 3
    with ShardSet.open(str(bad_set)) as shards:
        unknown = shards.entry(3)["offset"]
    known = Quarantine(e for e in old if (e.shard, e.offset) != ("train-000000.tar", unknown))
    assert len(known) == len(BAD) - 1
    known.update(listed(val_000000="r", train_000001="stale"))
    known.write(quarantine_path(bad_set))
    report = check_sample(str(bad_set), 9, seed=seed, workers=1)
    assert report.bad == len(set(BAD) & set(drawn))
    after = [*Quarantine.read(quarantine_path(bad_set))]
    assert all(entry in after for entry in known)  # with their dates, drawn or not
    (new,) = [entry for entry in after if entry not in [*known]]
    assert (new.shard, new.offset) == ("train-000000.tar", unknown)


@pytest.mark.usefixtures("quick")
def test_a_folder_in_the_place_of_an_index_is_one_tars_fault(packed, tmp_path):
    folder = Path(shutil.copytree(packed, tmp_path / "set"))
    path = index_path(folder / "train-000001.tar")
    path.unlink()
    path.mkdir()
    for report in (
        check_sample(str(folder), 100, workers=1),
        check_shards(str(folder), workers=1),
    ):
        (fault,) = [fault for fault in report.faults if fault.kind == "broken index"]
        assert fault.shard == "train-000001.tar"
        assert f"{path.name}: cannot be read (Is a directory): move this folder" in fault.reason
    assert check_sample(str(folder), 100, workers=1).sample == 29


@pytest.mark.usefixtures("quick")
def test_the_form_of_an_index_that_is_read_is_named(packed, tmp_path):
    folder = Path(shutil.copytree(packed, tmp_path / "set"))
    tar, other = folder / "train-000001.tar", folder / "train-000002.tar"
    text = write_json_index(tar, read_index(tar))

    # A stale JSON form alone.
    index_path(tar).unlink()
    good = text.read_bytes()
    text.write_bytes(write_json_index(other, read_index(other)).read_bytes())
    for report in (
        check_sample(str(folder), 100, workers=1),
        check_shards(str(folder), workers=1),
    ):
        (fault,) = [fault for fault in report.faults if fault.kind == "stale index"]
        assert fault.reason.startswith("train-000001.tar.index.json was made for another")
    with pytest.raises(ShardError, match=r"^train-000001\.tar\.index\.json: was made for"):
        read_index(tar)

    # A stale binary one beside a JSON form that fits.
    text.write_bytes(good)
    shutil.copy(index_path(other), index_path(tar))
    assert read_index(tar).tar == tar.name
    assert check_sample(str(folder), 100, workers=1).sample == 45
    assert check_shards(str(folder), workers=1).faults == []


def seed_that_draws(images: set[int], count: int) -> int:
    return next(s for s in range(10_000) if images <= set(draw_sample(45, count, s).tolist()))


@pytest.mark.usefixtures("quick")
def test_a_line_about_a_drawn_image_that_is_good_goes(packed, tmp_path):
    folder = Path(shutil.copytree(packed, tmp_path / "set"))
    drawn = draw_sample(45, 10, 0).tolist()
    rest = sorted(set(range(45)) - set(drawn))
    quarantine = Quarantine()
    with ShardSet.open(str(folder)) as shards:
        for i in (drawn[0], rest[0]):
            quarantine.add(**shards.entry(i), reason="a hang of a busy machine")
    _, undrawn = quarantine
    quarantine.write(quarantine_path(folder))
    assert check_sample(str(folder), 10, workers=1).faults == []
    assert [*Quarantine.read(quarantine_path(folder))] == [undrawn]


@pytest.mark.usefixtures("quick")
def test_no_list_appears_without_a_fault_or_without_leave(packed, bad_set, tmp_path):
    folder = Path(shutil.copytree(packed, tmp_path / "good"))
    before = sorted(os.listdir(folder))
    assert check_sample(str(folder), 10, workers=1).faults == []
    assert check_sample(str(bad_set), 45, workers=1, quarantine=False).faults
    assert sorted(os.listdir(folder)) == before
    assert not quarantine_path(bad_set).exists()


@pytest.mark.usefixtures("quick")
def test_tars_that_cannot_be_drawn_from_are_faults(packed, tmp_path, remote):
    folder = Path(shutil.copytree(packed, tmp_path / "set"))
    for number, source in ((3, 0), (4, 0), (5, 1)):
        shutil.copy(folder / f"train-00000{source}.tar", folder / f"x-00000{number}.tar")
    index_path(folder / "x-000004.tar").write_text("{")
    write_index(folder / "x-000005.tar", build_index(folder / "train-000000.tar"))
    (folder / "train-000002.tar").unlink()
    local = check_sample(f"{folder}/*.tar", 10, workers=1)
    assert local.counts() == {
        "not indexed": 1,
        "broken index": 1,
        "stale index": 1,
        "missing shard": 1,
    }
    assert (local.population, local.sample, local.bad) == (32, 10, 0)
    assert (local.promised, local.delivered, local.quarantined) == (10, 10, 0)
    assert (local.refused_shards, local.unindexed) == (4, 1)
    assert not quarantine_path(folder).exists()
    manifest = json.loads((folder / "manifest.json").read_text())
    names = [f"x-00000{number}.tar" for number in (3, 4, 5)]
    manifest["sets"]["x"] = {"shards": [{"name": name} for name in names], "classes": []}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with FaultServer(folder) as server:
        there = check_sample(f"{server.url}/*.tar", 10, workers=1, **remote)
    text = json.dumps(alike(there)["faults"]).replace(f"{server.url}/", "")
    assert text == json.dumps(alike(local)["faults"])


@pytest.mark.usefixtures("quick")
def test_a_set_without_indexes_is_refused(packed, tmp_path):
    folder = Path(shutil.copytree(packed, tmp_path / "set"))
    for path in folder.glob("*.index"):
        path.unlink()
    with pytest.raises(ValueError, match=r"no tar has an index.*data index.*without --sample"):
        check_sample(str(folder), 10, workers=1)
    with pytest.raises(ValueError, match="sample=0: must be at least 1"):
        check_sample(str(packed), 0)


@pytest.mark.usefixtures("quick")
def test_a_manifest_that_promises_more_is_a_fault_and_no_part_of_the_account(packed, tmp_path):
    folder = Path(shutil.copytree(packed, tmp_path / "set"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sets"]["train"]["shards"][1]["samples"] += 4
    (folder / "manifest.json").write_text(json.dumps(manifest))
    report = check_sample(str(folder), 10, workers=1)
    (fault,) = report.faults
    (expected,) = check_shards(str(folder), workers=1).faults
    assert fault == expected
    assert (report.promised, report.delivered, report.bad) == (10, 10, 0)


def read_bytes() -> int:
    """Bytes that this process has read so far, from files of any kind."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@pytest.mark.usefixtures("quick")
def test_the_cost_does_not_grow_with_the_set(tmp_path, write_tar, noise_image):
    """Bytes read: but for the indexes, the same for 30 images and for 3000."""
    data = noise_image(0, 60, 80)
    costs = {}
    for count in (10, 1000):
        folder = tmp_path / str(count)
        folder.mkdir()
        for tar in range(3):
            path = write_tar(folder / f"t{tar}.tar", [(f"{i}.jpg", data) for i in range(count)])
            write_index(path, build_index(path))
        check_sample(str(folder), 5, workers=1)  # what is imported, is imported now
        before = read_bytes()
        assert check_sample(str(folder), 12, seed=1, workers=1).sample == 12
        costs[count] = read_bytes() - before
    tars = sum(path.stat().st_size for path in folder.glob("*.tar"))
    indexes = sum(path.stat().st_size for path in folder.glob("*.index"))
    assert indexes < 0.1 * tars
    # An index is read to count its images, and again if one of them was drawn.
    assert costs[1000] - costs[10] < 2 * indexes + 0.01 * tars, (costs, indexes, tars)


@pytest.mark.usefixtures("quick")
def test_a_server_is_asked_for_ends_and_drawn_images_alone(bad_set, remote):
    seed = seed_that_draws({3, 17}, 12)
    local = check_sample(str(bad_set), 12, seed=seed, workers=1)
    entries = {entry.identity for entry in Quarantine.read(quarantine_path(bad_set))}
    quarantine_path(bad_set).unlink()
    with FaultServer(bad_set) as server:
        url = server.url.replace("://", f"://user:{SECRET}@")
        report = check_sample(f"{url}/", 12, seed=seed, workers=1, **remote)
        assert alike(report) == alike(local)
        assert report.bad > 0
        (path,) = remote["remote_lists"].iterdir()
        assert report.quarantine_files == [path]
        assert report.uploads == [f"{server.url}/quarantine.jsonl"]
        assert {entry.identity for entry in Quarantine.read(path)} == entries
        assert SECRET not in json.dumps(asdict(report), default=str)

        # Of each tar: its size, both ends, and the drawn images; a bad one twice.
        with ShardSet.open(str(bad_set)) as shards:
            places = [shards.entry(i) for i in draw_sample(45, 12, seed).tolist()]
        for tar in sorted(path.name for path in bad_set.glob("*.tar")):
            size = (bad_set / tar).stat().st_size
            wanted = {(0, 0), (0, 4095), (size - 4096, size - 1)}
            mine = [place for place in places if place["shard"] == tar]
            wanted |= {(place["offset"], place["offset"] + place["size"] - 1) for place in mine}
            asked = [r.removeprefix("bytes=") for name, r, _ in server.requests if name == tar]
            assert {tuple(map(int, text.split("-"))) for text in asked} == wanted
            bad = sum(
                fault.shard == tar and fault.kind == "changed bytes" for fault in local.faults
            )
            assert len(asked) == 3 + len(mine) + bad
            assert server.count(index_path(Path(tar)).name) == (2 if mine else 1)
    assert not list(Path(remote["cache"].cache_dir).glob("*.tar"))


@pytest.mark.usefixtures("quick")
def test_failing_connections_are_no_faults_and_ranges_are_needed(packed, server, remote):
    damaged = plain(other=lambda data: data[:700] + bytes(9000) + data[9700:])
    server.script["train-000000.tar"] = [status(503), plain(), plain(), plain(), damaged, drop(5)]
    report = check_sample(f"{server.url}/train-000000.tar", 16, workers=1, **remote)
    assert report.faults == []
    assert report.sample == 16
    server.always["train-000001.tar"] = plain(ranges=False)
    with pytest.raises(RemoteError, match=r"train-000001\.tar: its server ignores Range.*--sample"):
        check_sample(f"{server.url}/", 16, workers=1, **remote)


@pytest.mark.usefixtures("quick")
def test_the_json_report_says_that_it_is_a_sample(bad_set, packed, tmp_path):
    report = check_sample(str(bad_set), 20, seed=1, workers=1, quarantine=False)
    content = json.loads(report.write(tmp_path / "report.json").read_text())
    assert {name: content[name] for name in ("sample", "population", "seed", "bad", "clean")} == {
        "sample": 20,
        "population": 45,
        "seed": 1,
        "bad": report.bad,
        "clean": False,
    }
    assert content["promised"] == content["delivered"] + content["quarantined"] == 20
    assert 0 < report.bad / 20 < content["bad_share_bound"] < 1
    good = check_sample(str(packed), 20, workers=1, quarantine=False)
    content = json.loads(good.write(tmp_path / "report.json").read_text())
    assert content["clean"] is None
    whole = check_shards(str(packed), workers=1, quarantine=False)
    content = json.loads(whole.write(tmp_path / "report.json").read_text())
    assert (content["clean"], content["sample"], content["population"]) == (True, None, None)


@pytest.mark.usefixtures("quick")
def test_progress_counts_the_images(packed):
    calls: list[tuple[int, int]] = []
    check_sample(
        str(packed), 20, workers=1, quarantine=False, progress=lambda *call: calls.append(call)
    )
    assert calls == [(i, 20) for i in range(1, 21)]
