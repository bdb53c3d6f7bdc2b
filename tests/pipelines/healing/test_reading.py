"""Disks and shards that fail: what passes is not noticed, what stays is named, and nothing waits
for ever."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from fastmoco_pipelines.errors import LoaderTimeoutError, TooManyBadSamplesError
from fastmoco_pipelines.formats.quarantine import NAME, Quarantine, append_entry
from fastmoco_pipelines.healing import healer
from fastmoco_pipelines.healing.bad_samples import UNREADABLE, BadSamples
from fastmoco_pipelines.healing.culprit import Suspects
from fastmoco_pipelines.loading import loader
from fastmoco_pipelines.loading.loader import Loader, build_loader
from fastmoco_pipelines.sampling.order import epoch_order
from fastmoco_pipelines.sets import local_files
from fastmoco_pipelines.sets.shard_set import ShardError, ShardSet
from tests.pipelines.damage import damaged_copy, place_of
from tests.pipelines.healing.test_healer import assert_same, spec_of, take
from tests.pipelines.loading.test_loader import GUARD_SECONDS, wait_until

FIRST = epoch_order(7, 0, 45)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(healer, "PATIENCE", (0.02, 0.05))
    monkeypatch.setattr(local_files, "_PAUSES", (0.01, 0.02))


@pytest.fixture(scope="module")
def clean(packed):
    return take(packed, 6)


@pytest.fixture(scope="module")
def place(packed) -> int:
    """The place, in the second batch of the order, of a sample at whose offset no other tar has
    one."""
    offsets = [place_of(packed, sample_id)[2] for sample_id in range(45)]
    return next(at for at in range(12, 24) if offsets.count(offsets[int(FIRST[at])]) == 1)


class Disk:
    """os.pread that fails at one place: ``times`` times, or for ever."""

    def __init__(self, offset: int, number: int, times: float) -> None:
        self.offset, self.number, self.times, self.failed = offset, number, times, 0
        self.pread = os.pread

    def __call__(self, descriptor: int, size: int, offset: int) -> bytes:
        if offset == self.offset and self.failed < self.times:
            self.failed += 1
            raise OSError(self.number, os.strerror(self.number))
        return self.pread(descriptor, size, offset)


@pytest.fixture
def prepared(monkeypatch) -> list[int]:
    """Steps whose bytes the loader's thread has read."""
    prepare, steps = loader.Source.prepare, []

    def counted(self, places, following):
        found = prepare(self, places, following)
        steps.append(places.step)
        return found

    monkeypatch.setattr(loader.Source, "prepare", counted)
    return steps


def vanish(source: Loader, prepared: list[int], shard: Path, to: Path) -> None:
    """Move a shard away and close its file, as a network's file system does that loses its
    handles, behind the first of the batches, of which one may be ready.

    The loader's thread must not read meanwhile: it would find a closed file, or open one that is
    there for a moment longer. It reads no more when one batch is ready, one is held by the thread
    that made it, one waits for that thread, and the next one waits for its place.
    """
    wait_until(lambda: prepared == [0, 1, 2, 3, 4])
    shard.rename(to)
    source._shards.close()


@pytest.mark.parametrize(
    "times", [2, 4]
)  # within the tries of the files; beyond them, within those of the loader
def test_a_read_error_that_passes_is_not_noticed(packed, clean, place, monkeypatch, times):
    disk = Disk(place_of(packed, int(FIRST[place]))[2], errno.EIO, times)
    monkeypatch.setattr(os, "pread", disk)
    with build_loader(spec_of(packed)) as source:
        for wanted in clean:
            assert_same(source.next(), wanted)
        assert source.figures().left_out == 0
    assert disk.failed == times


def test_wrong_bytes_that_pass_are_not_noticed(packed, clean, place, monkeypatch):
    """Bytes are read twice before a sample is condemned for them."""
    offset, pread, wrong = place_of(packed, int(FIRST[place]))[2], os.pread, []

    def stale(descriptor: int, size: int, at: int) -> bytes:
        if at == offset and not wrong:
            wrong.append(descriptor)
            return bytes(size)
        return pread(descriptor, size, at)

    monkeypatch.setattr(os, "pread", stale)
    with build_loader(spec_of(packed)) as source:
        for wanted in clean:
            assert_same(source.next(), wanted)
        assert source.figures().left_out == 0
    assert wrong


def test_a_damaged_spot_costs_its_sample_until_a_restart(
    packed, clean, place, monkeypatch, tmp_path
):
    victim, row = int(FIRST[place]), place - 12
    monkeypatch.setattr(os, "pread", Disk(place_of(packed, victim)[2], errno.EIO, float("inf")))
    run_list = tmp_path / NAME
    got = take(packed, 6, quarantine_list=run_list)
    assert got[1].sample_ids[row] != victim
    keep = torch.arange(12) != row
    assert torch.equal(got[1].views[0][keep], clean[1].views[0][keep])
    entry = next(iter(Quarantine.read(run_list)))
    assert entry.reason.startswith(f"{UNREADABLE}train-00000")
    assert "Input/output error" in entry.reason
    monkeypatch.undo()  # the disk is mended: the next process reads it, whatever the list says
    for batch, wanted in zip(take(packed, 6, quarantine_list=run_list), clean, strict=True):
        assert_same(batch, wanted)


def test_a_vanished_shard_ends_the_run_by_name(packed, tmp_path, prepared):
    folder = damaged_copy(packed, tmp_path / "set", {})
    with build_loader(spec_of(folder, prefetch=1)) as source:
        source.next()
        vanish(source, prepared, folder / "train-000001.tar", tmp_path / "gone")
        with pytest.raises(TooManyBadSamplesError) as raised:
            list(source)  # it has no other end
    assert "16 of 45 images cannot be used, 10 are allowed" in str(raised.value)
    assert (
        "train-000001.tar: all of it (unreadable: train-000001.tar: cannot be opened any more"
        in str(raised.value)
    )


def test_a_vanished_shard_that_is_bearable_is_left_out_as_a_whole(packed, tmp_path, prepared):
    folder = damaged_copy(packed, tmp_path / "set", {})
    run_list = tmp_path / NAME
    with build_loader(
        spec_of(folder, prefetch=1, max_bad_share=0.5), quarantine_list=run_list
    ) as source:
        source.next()
        vanish(source, prepared, folder / "train-000001.tar", tmp_path / "gone")
        batches = [source.next() for _ in range(8)]
        assert source.figures().left_out == 16
    assert all(
        not ((batch.sample_ids >= 16) & (batch.sample_ids < 32)).any() for batch in batches[4:]
    )
    assert len(Quarantine.read(run_list)) == 16
    (tmp_path / "gone").rename(folder / "train-000001.tar")
    assert (
        take(folder, 1, quarantine_list=run_list)[0].step == 0
    )  # it is back: nothing is held against it


def test_a_window_that_is_lost_as_a_whole_is_filled_from_the_others(packed, tmp_path):
    """With a window of one shard, nobody in a vanished shard's window can stand in."""
    folder = damaged_copy(packed, tmp_path / "set", {})
    options = {"prefetch": 1, "max_bad_share": 0.5, "shuffle_window": 1}
    with build_loader(spec_of(folder, **options), begin=False) as source:
        (folder / "train-000001.tar").rename(tmp_path / "gone")
        told: list[str] = []
        source.report = told.append
        batches = [source.next() for _ in range(9)]
        assert source.figures().left_out == 16
    assert len(told) == 1
    assert "train-000001.tar: all of it, 16 images: " in told[0]
    assert all(
        not ((batch.sample_ids >= 16) & (batch.sample_ids < 32)).any() for batch in batches[3:]
    )
    (tmp_path / "gone").rename(folder / "train-000001.tar")
    with ShardSet.open(
        str(folder)
    ) as shards:  # the same stand-ins where all of it is known to be bad, on all ranks
        for sample_id in range(16, 32):
            append_entry(folder / NAME, Quarantine().add(**shards.entry(sample_id), reason="bad"))
    parts = [
        take(folder, 3, changes=options, rank=rank, world_size=2, start_step=6) for rank in range(2)
    ]
    for wanted, low, high in zip(batches[6:], *parts, strict=True):
        assert np.array_equal(np.concatenate([low.sample_ids, high.sample_ids]), wanted.sample_ids)
        assert torch.equal(torch.cat([low.views[0], high.views[0]]), wanted.views[0])


def test_a_file_system_may_hand_out_less_than_was_asked_for(packed, clean, monkeypatch):
    pread = os.pread
    monkeypatch.setattr(
        os, "pread", lambda descriptor, size, offset: pread(descriptor, min(size, 100), offset)
    )
    for got, wanted in zip(take(packed, 3), clean, strict=False):
        assert_same(got, wanted)


def test_too_many_open_files_are_no_fault_of_the_data(packed, monkeypatch):
    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    paused: list[float] = []
    monkeypatch.setattr(local_files.time, "sleep", paused.append)
    with ShardSet.open(str(packed)) as shards:
        suspects = Suspects(device="cpu", device_id=None, threads=1)
        reader = healer.Healer(
            shards, BadSamples(shards, max_bad_share=0), suspects, threading.Event()
        )
        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(ShardError, match="ulimit -n"):
            reader.read(np.arange(len(shards)))
        assert paused == [0.01, 0.02]  # at the first sample: nothing else can be opened either


def test_a_lost_shard_is_waited_for_once_however_many_samples_it_has(packed, monkeypatch, tmp_path):
    """With the waits of a real run, which are counted instead of slept."""
    monkeypatch.setattr(healer, "PATIENCE", (1.0, 3.0, 10.0))
    monkeypatch.setattr(local_files, "_PAUSES", (0.05, 0.45))
    folder = tmp_path / "copy"
    shutil.copytree(packed, folder)
    slept: list[float] = []
    monkeypatch.setattr(local_files.time, "sleep", slept.append)
    stop = mock.Mock(wait=lambda seconds: slept.append(seconds))
    with ShardSet.open(str(folder)) as shards:
        first = shards.shard_of(0)[0]
        count = sum(shards.shard_of(i)[0] == first for i in range(len(shards)))
        assert count > 5
        (folder / first).unlink()
        suspects = Suspects(device="cpu", device_id=None, threads=1)
        found = healer.Healer(shards, BadSamples(shards, max_bad_share=1), suspects, stop).read(
            np.arange(len(shards))
        )
    assert [data is None for data in found] == [i < count for i in range(len(found))]
    assert sum(slept) == pytest.approx(14.5)


def test_a_read_that_hangs_is_told_and_ends(packed, place, monkeypatch, own_threads):
    victim = int(FIRST[place])
    tar, _, offset, _ = place_of(packed, victim)
    hanging, released, pread = threading.Event(), threading.Event(), os.pread

    def hang(descriptor: int, size: int, at: int) -> bytes:
        if at == offset:
            hanging.set()
            released.wait(GUARD_SECONDS)
        return pread(descriptor, size, at)

    monkeypatch.setattr(os, "pread", hang)
    monkeypatch.setattr(loader, "_REPORT_SECONDS", 0.4)
    told: list[str] = []
    source = build_loader(spec_of(packed, timeout_s=2.0))
    source.report = told.append
    assert hanging.wait(GUARD_SECONDS)
    wait_until(lambda: not source._results.empty())  # of the two seconds none goes to its making
    source.next()
    began, errors = time.monotonic(), []
    for _ in range(2):
        with pytest.raises(LoaderTimeoutError) as raised:
            source.next()
        errors.append(raised.value)
    assert time.monotonic() - began > 1.9
    assert errors[0] is errors[1]  # the second call waits for nothing
    where = f"reading the shards for step 1 ({tar.name} at byte {offset})"
    assert where in str(raised.value)
    assert "--data.timeout-s" in str(raised.value)
    assert any(
        text.startswith("waiting for the data of step 1 for") and where in text for text in told
    )
    source.close()
    assert "fastmoco-read" in own_threads()  # it hangs still: nobody has waited for its end
    released.set()
    wait_until(lambda: not own_threads())


def test_closing_does_not_wait_for_a_hanging_read(packed, monkeypatch, own_threads):
    monkeypatch.setattr(loader, "_CLOSE_SECONDS", 1.0)
    reading, released = threading.Event(), threading.Event()

    def hang(*_: object) -> bytes:
        reading.set()
        released.wait(GUARD_SECONDS)
        return b""

    monkeypatch.setattr(local_files, "read_at", hang)
    source = build_loader(spec_of(packed))
    assert reading.wait(GUARD_SECONDS)
    source.close()
    assert "fastmoco-read" in own_threads()  # it hangs still: nobody has waited for its end
    released.set()
    wait_until(lambda: not own_threads())
