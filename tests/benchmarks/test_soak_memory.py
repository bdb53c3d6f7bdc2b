"""What counts as flat, and that what a process holds is seen."""

from __future__ import annotations

import mmap
import os
import threading

import numpy as np
import pytest

from benchmarks.soak_memory import MARKS, MemoryLog, MemorySample, at_marks, rises, sample_memory

HOUR = 3600.0


def _run(anon, files=None, threads=None, count: int = 360) -> list[MemorySample]:
    """Samples of an hour; each argument: share of the hour gone -> figure."""
    share = np.linspace(0, 1, count)
    files, threads = files or (lambda x: 0 * x + 14), threads or (lambda x: 0 * x + 30)
    columns = (share * HOUR, anon(share), 0 * share + 140, files(share), threads(share))
    return [MemorySample(*row) for row in np.stack(columns, axis=1).tolist()]


def _flat(samples: list[MemorySample]) -> dict[str, bool]:
    return {rise.name: rise.flat for rise in rises(samples, HOUR)}


def _noise(scale: float) -> np.ndarray:
    return np.random.default_rng(0).normal(0, scale, 360)


def test_ups_and_downs_and_a_warm_up_are_flat():
    warm_up = _run(
        lambda x: 180 + 100 * (1 - np.exp(-12 * x)) + _noise(8),
        threads=lambda x: 30 - 24 * (x % 0.1 < 0.02),
    )
    assert _flat(warm_up) == {"RssAnon": True, "open files": True, "threads": True}
    assert all(_flat(_run(lambda x: 300 - 100 * x)).values())  # what falls


@pytest.mark.parametrize(("mib", "flat"), [(20, True), (40, False), (100, False)])
def test_a_steady_rise_is_not_flat_beyond_five_per_cent(mib, flat):
    # 20 MiB an hour are 10 in its second half, of about 315: 3 %.
    assert _flat(_run(lambda x: 300 + mib * x + _noise(6)))["RssAnon"] is flat


def test_what_was_once_called_flat_is_not():
    """Figures of a real run: 395, 440 and 498 MiB RSS at 10, 50 and 100 %, 140 of them of files."""
    assert not _flat(_run(lambda x: np.interp(x, [0.1, 0.5, 1], [255, 300, 358]) + _noise(8)))[
        "RssAnon"
    ]


@pytest.mark.parametrize("name", ["files", "threads"])
def test_one_left_behind_by_each_restart_is_seen(name):
    restarts = 30
    leak = _run(
        lambda x: 0 * x + 250, **{name: lambda x: 14 + np.floor(restarts * x) + np.abs(_noise(2))}
    )
    assert _flat(leak)["open files" if name == "files" else "threads"] is False
    assert _flat(leak)["RssAnon"] is True


def test_file_pages_are_not_judged_and_few_samples_say_nothing():
    samples = [sample._replace(file_mib=sample.seconds) for sample in _run(lambda x: 0 * x + 250)]
    assert all(_flat(samples).values())
    assert rises(_run(lambda x: 0 * x + 250, count=20), HOUR) == []
    assert rises([], HOUR) == []
    assert at_marks([], HOUR) == []


def test_the_marks_are_those_of_the_run():
    shown = at_marks(_run(lambda x: 100 * x), HOUR)
    assert [sample.anon_mib for sample in shown] == pytest.approx(
        [100 * mark for mark in MARKS], abs=0.5
    )


def test_a_sample_tells_heap_from_mapped_files(tmp_path):
    (tmp_path / "large").write_bytes(bytes(32 << 20))
    pattern = bytes([1]) * (16 << 20)
    before = sample_memory(0)
    heap = mmap.mmap(
        -1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )  # malloc might have had it already
    heap[:] = pattern
    with (
        open(tmp_path / "large", "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        assert sum(mapped[:: mmap.PAGESIZE]) == 0  # touches every page
        stop = threading.Event()
        thread = threading.Thread(target=stop.wait)
        thread.start()
        after = sample_memory(0)
        stop.set()
        thread.join()
    heap.close()
    assert 15 < after.anon_mib - before.anon_mib < 24
    assert 31 < after.file_mib - before.file_mib < 40
    # The map keeps a descriptor of its own.
    assert (after.files - before.files, after.threads - before.threads) == (2, 1)


def test_a_log_takes_its_samples_evenly(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("benchmarks.soak_memory.time.monotonic", lambda: now[0])
    log = MemoryLog(40)
    for _ in range(1000):
        log.look()
        now[0] += 0.04
    assert 300 <= len(log.samples) <= 401
    assert log.samples[0].seconds == 0
    assert log.samples[-1].seconds > 39
    assert log.samples[-1].files == len(os.listdir("/proc/self/fd")) - 1
