"""The list beside shards on a server: honoured as a local one is, asked for anew by every run, and
bounded."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest

from fastmoco_pipelines.errors import RemoteError
from fastmoco_pipelines.formats.quarantine import CURE, CheckedTar, Quarantine, quarantine_path
from fastmoco_pipelines.healing.bad_samples import BadSamples
from fastmoco_pipelines.sets import remote_set
from fastmoco_pipelines.sets.shard_set import ShardSet
from fastmoco_pipelines.spec import CacheSpec
from fastmoco_pipelines.stores import object_store
from fastmoco_pipelines.stores.transfer import Head, RemoteShard
from tests.pipelines.healing.test_healer import assert_same, take
from tests.pipelines.http_fault_server import FaultServer, html, plain, status
from tests.pipelines.stores.test_http_faults import QUICK

NAME = "quarantine.jsonl"


@pytest.fixture
def spec(tmp_path):
    return CacheSpec(cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def folder(packed, tmp_path):
    return Path(shutil.copytree(packed, tmp_path / "set"))


def write_list(folder: Path, *sample_ids: int) -> Path:
    """A list of some samples of a set; the reason is made up, for the bytes are good: only the list
    can tell."""
    entries = Quarantine()
    with ShardSet.open(str(folder)) as shards:
        for sample_id in sample_ids:
            entries.add(**shards.entry(sample_id), reason="somebody has seen it")
    return entries.write(quarantine_path(folder))


def known(pattern: str, spec: CacheSpec) -> tuple[list[int], list[str], int]:
    """Samples that a run begins without, what it says of that, and how many lines match nothing."""
    with ShardSet.open(pattern, cache=spec, limits=QUICK) as shards:
        bad = BadSamples(shards, max_bad_share=0)
        left_out = np.flatnonzero(bad.contains(np.arange(len(shards)))).tolist()
        assert bad.listed == len(left_out)
        return left_out, bad.news(), bad.stale


def test_a_run_over_http_delivers_what_a_local_one_does(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("fastmoco_pipelines.sets.shard_set.Limits", lambda: QUICK)
    first = take(folder, 1)[0].sample_ids
    write_list(folder, int(first[3]))
    expected = take(folder, 3)
    assert int(first[3]) not in np.concatenate([batch.sample_ids for batch in expected])
    with FaultServer(folder) as server:
        got = take(
            f"{server.url}/", 3, changes={"cache_dir": str(tmp_path / "cache"), "shuffle_window": 0}
        )
    for one, other in zip(got, expected, strict=True):
        assert_same(one, other)


def test_every_run_asks_anew(folder, spec):
    with FaultServer(folder) as server:
        for wanted in ([], [7], [7, 20], [44], []):
            if wanted:
                write_list(folder, *wanted)
            else:
                quarantine_path(folder).unlink(missing_ok=True)
            bad, news, stale = known(f"{server.url}/", spec)
            assert (bad, stale) == (wanted, 0)
            assert news == (
                [f"{len(wanted)} of 45 images are left out: listed in {NAME}"] if wanted else []
            )
        assert server.count(NAME) == 5
        # An answer "still the same" cannot be asked for: no copy is kept.
        texts = [path.read_bytes() for path in Path(spec.cache_dir).glob("*.doc")]
        assert texts
        assert not [text for text in texts if b"somebody has seen it" in text]


def test_lines_that_match_nothing_and_lines_that_are_none_are_counted(folder, spec):
    path = write_list(folder, 1, 40)
    lines = path.read_text().splitlines()
    stale = json.dumps(json.loads(lines[0]) | {"crc32": 5})
    path.write_text("\n".join([*lines, stale, "<html>", '{"shard": 1}', lines[0][:50]]))
    with FaultServer(folder) as server:
        bad, news, count = known(f"{server.url}/", spec)
        local, local_news, local_count = known(str(folder), spec)
        assert (bad, count) == (local, local_count) == ([1, 40], 1)
        skipped = f"3 lines are not entries of a list and were skipped{CURE}"
        assert news[0] == f"{server.url}/{NAME}: {skipped}"
        assert news[1:] == local_news[1:]
        assert "1 of its lines match no sample any more" in news[1]
        server.always[NAME] = html()
        bad, news, count = known(f"{server.url}/", spec)
        assert (bad, count) == ([], 0)
        assert "1 lines are not entries" in news[0]


def test_a_list_that_cannot_be_had_is_an_error_and_never_passed_over(folder, spec, monkeypatch):
    write_list(folder, 1)
    with FaultServer(folder) as server:
        server.script[NAME] = [status(503), status(503)]
        assert known(f"{server.url}/", spec)[0] == [1]
        server.always[NAME] = status(500)
        with pytest.raises(
            RemoteError, match=rf"{server.url}/{NAME}: HTTP 500; given up after \d tries"
        ):
            known(f"{server.url}/", spec)
        server.always[NAME] = status(403)  # so a store answers for files that do not exist
        bad, news, _ = known(f"{server.url}/", spec)
        assert bad == []
        assert "access is refused (HTTP 403)" in news[0]
        assert "treated as absent" in news[0]
        del server.always[NAME]
        monkeypatch.setattr(remote_set, "MAX_LIST_BYTES", 100)
        with pytest.raises(RemoteError, match=rf"{NAME}: is larger than 100 bytes"):
            known(f"{server.url}/", spec)
        server.always[NAME] = plain(other=lambda data: data[:90])
        assert "1 lines are not entries" in known(f"{server.url}/", spec)[1][0]


def test_shards_of_several_places_have_a_list_each(folder, packed, tmp_path, spec):
    other = Path(shutil.copytree(packed, tmp_path / "other"))
    write_list(folder, 3, 44)  # train-000002 is not read from here
    write_list(other, 20)
    with FaultServer(folder) as one, FaultServer(other) as two:
        urls = sorted([f"{one.url}/train-000000.tar", f"{two.url}/train-000001.tar"])
        pattern = f"{{{','.join(urls)}}}"
        with ShardSet.open(pattern, cache=spec, limits=QUICK) as shards:
            keys = shards.keys
            names = [shards.describe(i) for i in known(pattern, spec)[0]]
        assert len(keys) == 32
        assert sorted(names) == [describe(folder, 3), describe(other, 20)]
        assert (one.count(NAME), two.count(NAME)) == (1, 1)


def describe(folder: Path, sample_id: int) -> str:
    with ShardSet.open(str(folder)) as shards:
        return shards.describe(sample_id)


def test_a_store_has_lists_too(folder, spec, monkeypatch):
    memory = fsspec.filesystem("memory")
    write_list(folder, 9)
    for path in folder.iterdir():
        memory.pipe_file(f"/listed/set/{path.name}", path.read_bytes())
    monkeypatch.setattr(object_store, "file_system", lambda scheme: memory)
    assert known("s3://listed/set/train-*.tar", spec)[0] == [9]
    memory.rm_file(f"/listed/set/{NAME}")
    assert known("gs://listed/set/train-*.tar", spec) == ([], [], 0)


def test_what_a_run_finds_is_told_apart_from_what_the_list_says(folder, tmp_path, spec):
    write_list(folder, 2)
    with (
        FaultServer(folder) as server,
        ShardSet.open(f"{server.url}/", cache=spec, limits=QUICK) as shards,
    ):
        bad = BadSamples(shards, max_bad_share=0.5, run_list=tmp_path / "run.jsonl")
        bad.add(5, "found now")
        again = BadSamples(shards, max_bad_share=0.5, run_list=tmp_path / "run.jsonl")
        assert (bad.listed, bad.found, again.listed, again.found) == (1, 1, 1, 1)


def remote_shard(number: int) -> RemoteShard:
    name = f"http://x/{number:02d}.tar"
    return RemoteShard(
        url=name, size=1, tar_hash="", sha256=None, rows=tuple, key=name, records="r"
    )


def checked_tar(number: int) -> CheckedTar:
    tar_hash = hashlib.sha256(b"endsends").hexdigest()
    return CheckedTar(
        shard=f"{number:02d}.tar", tar_bytes=7, tar_hash=tar_hash, records="r", when=""
    )


def test_changed_shards_are_asked_for_at_once_and_keep_their_order(monkeypatch):
    together = threading.Barrier(remote_set.THREADS)
    asked = []

    def head(url, limits, stop):
        asked.append(url)
        together.wait(30)  # breaks if they come one after another
        return Head(7, "")

    monkeypatch.setattr(remote_set, "file_head", head)
    monkeypatch.setattr(remote_set, "read_range", lambda *_, **__: b"ends")
    shards = [remote_shard(number) for number in range(2 * remote_set.THREADS)]
    listed = [checked_tar(number) for number in range(0, len(shards), 2)]
    found = remote_set.as_checked(shards, listed, QUICK)
    assert [each.url for each in found] == [each.url for each in shards]
    changed = [number for number, each in enumerate(found) if each is not shards[number]]
    assert changed == list(range(0, len(shards), 2))
    assert sorted(asked) == [shards[number].url for number in changed]
    assert {found[number].size for number in changed} == {7}
    assert remote_set.as_checked(shards, [], QUICK) == shards


def test_of_many_shards_that_fail_the_first_one_is_named(monkeypatch):
    def head(url, limits, stop):
        if url.endswith(("03.tar", "09.tar")):
            raise RemoteError(f"{url}: no answer")
        return Head(7, "")

    monkeypatch.setattr(remote_set, "file_head", head)
    monkeypatch.setattr(remote_set, "read_range", lambda *_, **__: b"ends")
    shards = [remote_shard(number) for number in range(40)]
    with pytest.raises(RemoteError, match=r"03\.tar: no answer"):
        remote_set.as_checked(shards, [checked_tar(number) for number in range(40)], QUICK)
