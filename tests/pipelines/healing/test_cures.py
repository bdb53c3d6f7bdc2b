"""Every cure that a message about shards names: the fault is made, the command is taken from the
message itself, it is done, and the set is again the one that a run began with: the same samples in
the same order, but for those in the list."""

from __future__ import annotations

import re
import shlex
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastmoco_pipelines.errors import ShardError, TooManyBadSamplesError
from fastmoco_pipelines.formats.index import index_path, read_index
from fastmoco_pipelines.formats.manifest import read_sets, write_sets
from fastmoco_pipelines.formats.quarantine import Quarantine, quarantine_path
from fastmoco_pipelines.healing import healer
from fastmoco_pipelines.healing.bad_samples import BadSamples
from fastmoco_pipelines.healing.healer import Healer
from fastmoco_pipelines.inspecting import check as check_module
from fastmoco_pipelines.sets import local_files
from fastmoco_pipelines.sets.shard_set import ShardSet
from fastmoco_pipelines.spec import CacheSpec
from tests.command_line import main
from tests.pipelines.http_fault_server import FaultServer
from tests.pipelines.quick_pool import QuickPool
from tests.pipelines.stores.test_http_faults import QUICK

FIRST, SECOND = "train-000000.tar", "train-000001.tar"
CHECK = (
    r"[Rr]un `(fastmoco data check)` on the shards.*the same command (?:then continues|goes on) "
    "without it"
)
CHANGED = r"`(fastmoco data check)` lists what is lost, and the same command then continues without"
INDEX = r"run `(fastmoco data index)` on the shards"
COPY = r"[Cc]opy the (?:tar|shards that cannot be read) again from (?:its|their) source"
THERE = r"copy it there too"
LIST = r"`(fastmoco data check)` on the shards writes the list again"


class Walk:
    """A set on its way from whole to damaged and back.

    Attributes:
        whole: folder of the set as it was; `folder`: of the set that is damaged.
    """

    def __init__(self, whole: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.whole = whole
        self.folder = folder
        self.pattern = f"{folder}/*.tar"
        self.index = read_index(folder / FIRST)
        self.capsys = capsys

    def tar(self, name: str = FIRST) -> Path:
        return self.folder / name

    def cut(self, at: int, name: str = FIRST) -> None:
        with open(self.tar(name), "r+b") as file:
            file.truncate(at)

    def copy(self) -> None:
        for name in (FIRST, SECOND):
            shutil.copy(self.whole / name, self.folder)

    def command(self, message: str, cure: str, *more: str) -> str:
        """Do the command that a message names in some words; returns what it prints."""
        found = re.search(cure, message)
        assert found is not None, (cure, message)
        assert main([*shlex.split(found[1])[1:], self.pattern, *more]) in (0, 1)
        printed = self.capsys.readouterr()
        return printed.out + printed.err

    def require_same(self) -> None:
        """The set is the one of before; every sample is its own, or listed, and those that are
        listed are really lost."""
        with ShardSet.open(str(self.whole)) as before, ShardSet.open(self.pattern) as now:
            assert now.digest == before.digest
            bad = BadSamples(now, max_bad_share=0)
            everything = np.arange(len(before))
            for i, data in enumerate(now.read_each(everything)):
                if i in bad:
                    assert isinstance(data, Exception)
                else:
                    assert data.tobytes() == before.read(everything[i : i + 1])[0].tobytes()
            assert (bad.listed, bad.stale) == (
                len(Quarantine.read(quarantine_path(self.folder))),
                0,
            )


@pytest.fixture
def walk(packed, tmp_path, monkeypatch, capsys) -> Walk:
    monkeypatch.setattr(check_module, "DecodePool", QuickPool)
    monkeypatch.setattr(healer, "PATIENCE", ())
    monkeypatch.setattr(local_files, "_PAUSES", ())
    return Walk(packed, Path(shutil.copytree(packed, tmp_path / "set")), capsys)


def read_all(shards: ShardSet) -> None:
    """Read every sample as a loader does that may lose none."""
    bad = BadSamples(shards, max_bad_share=0)
    Healer(shards, bad, None, threading.Event()).read(np.arange(len(shards)))  # type: ignore[arg-type]


def replace(walk: Walk) -> None:
    """Other content under the same name, as a careless copy leaves it."""
    walk.tar().write_bytes((walk.whole / SECOND).read_bytes())


def two(walk: Walk) -> None:
    """One is cut; in the other one an image is other bytes, while size and ends are right."""
    walk.cut(walk.index.tar_bytes // 2)
    raw = bytearray(walk.tar(SECOND).read_bytes())
    index = read_index(walk.tar(SECOND))
    row = next(i for i, at in enumerate(index.columns["offset"]) if at > 8192)
    raw[index.columns["offset"][row]] ^= 0xFF
    walk.tar(SECOND).write_bytes(raw)


MID_RUN: dict[str, Callable[[Walk], None]] = {
    "cut within an image": lambda w: w.cut(w.index.columns["offset"][5] + 9),
    "cut at a member's boundary": lambda w: w.cut(w.index.columns["offset"][5] - 512),
    "cut within a header": lambda w: w.cut(w.index.columns["offset"][5] - 200),
    "emptied": lambda w: w.cut(0),
    "two at once": two,
}


@pytest.mark.parametrize("fault", MID_RUN)
def test_a_shard_that_is_damaged_in_mid_run(fault, walk):
    """The message that ends the run, and that of the next start, lead to `data check`."""
    with ShardSet.open(walk.pattern) as shards:
        MID_RUN[fault](walk)
        with pytest.raises(TooManyBadSamplesError) as ended:
            read_all(shards)
    with pytest.raises(ShardError) as refused:
        ShardSet.open(walk.pattern)
    assert re.search(CHECK, str(refused.value)), refused.value
    said = walk.command(str(ended.value), CHECK)
    assert "that a loader refuses" not in said
    walk.require_same()
    assert main(["data", "check", walk.pattern, "--no-quarantine"]) == 1
    assert "1 shard that a loader refuses" in walk.capsys.readouterr().out

    # The other way, which both messages name: then nothing is listed any more.
    assert re.search(COPY, str(refused.value)), refused.value
    walk.copy()
    assert main(["data", "check", walk.pattern]) == 0
    assert quarantine_path(walk.folder).read_bytes() == b""
    walk.require_same()


@pytest.mark.parametrize("what", ["its end", "more images"])
def test_a_shard_without_its_end_and_one_that_has_grown(what, walk):
    """No sample is lost: nothing is listed but the tar's own state."""
    if what == "its end":
        walk.cut(walk.index.tar_bytes - 512)
    else:
        with open(walk.tar(), "r+b") as file:
            file.seek(-1024, 2)
            file.write((walk.whole / SECOND).read_bytes())
    with pytest.raises(ShardError) as refused:
        ShardSet.open(walk.pattern)
    walk.command(str(refused.value), CHECK)
    walk.require_same()
    with open(walk.tar(), "ab") as file:  # a state that was not checked
        file.write(bytes(1536))
    with pytest.raises(ShardError, match=CHECK):
        ShardSet.open(walk.pattern)


def test_a_shard_that_was_replaced(walk):
    """`data check` finds that it is another tar, and says what to do: nothing is listed."""
    with ShardSet.open(walk.pattern) as shards:
        replace(walk)
        with pytest.raises(TooManyBadSamplesError) as ended:
            read_all(shards)
    said = walk.command(str(ended.value), CHECK)
    assert "A tar that it calls another one must be copied again" in str(ended.value)
    assert "made for another tar" in said
    assert "1 shard that a loader refuses" in said
    with pytest.raises(ShardError, match="another state"):
        ShardSet.open(walk.pattern)
    assert re.search(COPY, said), said
    walk.copy()
    walk.require_same()


def test_a_shard_that_was_removed(walk):
    with ShardSet.open(walk.pattern) as shards:
        walk.tar().unlink()
        with pytest.raises(TooManyBadSamplesError) as ended:
            read_all(shards)
    with pytest.raises(ShardError, match=THERE):
        ShardSet.open(walk.pattern)
    assert re.search(COPY, str(ended.value)), ended.value
    assert not re.search(CHECK, str(ended.value))
    walk.copy()
    walk.require_same()


@pytest.mark.parametrize("fault", ["removed", "broken", "of another tar", "a folder"])
def test_an_index(fault, walk):
    """Made again, it is the one of before, so a run goes on with it."""
    index = index_path(walk.tar())
    before = index.read_bytes()
    index.unlink()
    if fault == "broken":
        index.write_bytes(before[:300] + bytes(100) + before[400:])
    elif fault == "of another tar":
        index.write_bytes(index_path(walk.tar(SECOND)).read_bytes())
    elif fault == "a folder":
        index.mkdir()
    with pytest.raises(ShardError) as refused:
        ShardSet.open(walk.pattern)
    if fault == "a folder":
        assert "Move this folder away" in str(refused.value)
        index.rmdir()
    walk.command(str(refused.value), INDEX)
    assert index.read_bytes() == before
    walk.require_same()


def test_a_manifest_that_counts_other_samples(walk):
    sets = read_sets(walk.folder)
    sets["train"]["shards"][0]["samples"] += 3
    write_sets(walk.folder, sets)
    with pytest.raises(ShardError) as refused:
        ShardSet.open(walk.pattern)
    walk.command(str(refused.value), INDEX)
    assert read_sets(walk.folder) == read_sets(walk.whole)
    walk.require_same()


def test_a_manifest_is_corrected_when_a_grown_shard_is_indexed(walk):
    """For new runs, as the message says."""
    with open(walk.tar(), "r+b") as file:
        file.seek(-1024, 2)
        file.write((walk.whole / SECOND).read_bytes())
    with pytest.raises(ShardError) as refused:
        ShardSet.open(walk.pattern)
    walk.command(str(refused.value), f"{INDEX}, for new runs")
    with ShardSet.open(walk.pattern) as shards, ShardSet.open(str(walk.whole)) as before:
        assert len(shards) > len(before)


def test_a_list_with_broken_lines(walk):
    """The line of the tar itself is lost: it is refused until the list is written again. Then that
    of an image: the set is opened, and says so."""
    two(walk)
    assert main(["data", "check", walk.pattern]) == 1
    path = quarantine_path(walk.folder)
    whole = path.read_bytes()
    *lines, last = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines) + last[:50])
    with pytest.raises(ShardError) as refused:
        ShardSet.open(walk.pattern)
    walk.command(str(refused.value), CHECK)
    walk.require_same()

    path.write_bytes(lines[0][:50] + b"\n" + b"".join(lines[1:]) + last)
    with ShardSet.open(walk.pattern) as shards:
        with pytest.raises(TooManyBadSamplesError, match="1 of 45 images cannot be used"):
            read_all(shards)
        said = "; ".join(BadSamples(shards, max_bad_share=0).news())
    assert "1 lines are not entries of a list" in said
    walk.command(said, LIST)
    assert len(Quarantine.read(path)) == len(lines)
    walk.require_same()


@pytest.mark.parametrize("fault", ["cut", "same size", "emptied"])
def test_a_shard_that_changed_on_its_server(fault, walk, tmp_path):
    """The copy in the cache is gone, and the server has another state: what the message says, and
    what `data check` then says, leads back; and again when the server has the old one."""
    cache = CacheSpec(cache_dir=str(tmp_path / "cache"), cache_size_gb=0.01)
    tar = walk.tar()
    whole = tar.read_bytes()
    with FaultServer(walk.folder) as server:
        walk.pattern = f"{server.url}/"

        def opened() -> ShardSet:
            return ShardSet.open(walk.pattern, cache=cache, limits=QUICK)

        with opened() as shards:
            digest = shards.digest
            at = walk.index.columns["offset"][5] if fault != "emptied" else 0
            tar.write_bytes(whole[:at] + bytes((len(whole) - at) * (fault == "same size")))
            with pytest.raises(TooManyBadSamplesError) as ended:
                read_all(shards)
        options = ["--cache-dir", cache.cache_dir, "--quarantine-out", str(tmp_path)]
        said = walk.command(str(ended.value), CHANGED, *options)
        found = re.search(r"copy (\S+) to (\S+): loaders look there", said)
        assert found is not None, said
        shutil.copy(found[1], walk.folder / found[2].removeprefix(f"{server.url}/"))

        lost = len(walk.index) - 5 * (fault != "emptied")
        for content, left_out in ((tar.read_bytes(), lost), (whole, lost)):
            tar.write_bytes(content)
            with opened() as shards:
                assert shards.digest == digest
                assert BadSamples(shards, max_bad_share=0).listed == left_out
                read_all(shards)
