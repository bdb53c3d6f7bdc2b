"""The fuzz run: a small one breaks no rule, inputs repeat with their seed, and a violation is an
exit code."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path
from random import Random

import pytest

pytest.importorskip("tyro", reason="tyro is not installed")  # of the options, a target

from benchmarks.fuzz import changes, workers
from benchmarks.fuzz.__main__ import Count, main, report, rounds
from benchmarks.fuzz.table import all_targets
from benchmarks.fuzz.target import Target, input_of
from benchmarks.fuzz.workers import Job, Outcome


@pytest.mark.slow
def test_a_small_run_breaks_no_rule(capsys, tmp_path):
    """Every parser of small files, with inputs of this seed alone: `make fuzz` has all others."""
    code = main(["--inputs", "1200", "--seed", "7", "--workers", "1", "--keep", str(tmp_path)])
    text = capsys.readouterr().out
    assert code == 0, text
    assert "1200 inputs in" in text
    assert text.rstrip().endswith(" 0 violations")
    assert all(f"{target}: " in text for target in all_targets())


def test_inputs_repeat_with_their_seed_and_are_changed():
    for name, target in all_targets().items():
        seeds = target.seeds()
        first, again = (
            [input_of(all_targets(), seeds, 3, name, number) for number in range(12)]
            for _ in range(2)
        )
        assert first == again, name
        assert sum(data != sound for data, sound in first) > 6, name


def test_sound_inputs_are_accepted(tmp_path, monkeypatch):
    """Where a parser has become stricter, changes of what it refuses would find nothing."""
    for name, target in all_targets().items():
        if target.warm_up is None and name not in ("pattern", "options", "variables"):
            for number, sound in enumerate(target.seeds()):
                folder = tmp_path / f"{name}-{number}"
                folder.mkdir()
                monkeypatch.chdir(folder)
                outcome = target.read(folder, sound, sound)
                assert outcome.startswith(("accepted", "3 of 3")), (name, outcome)


def test_every_target_has_its_share_of_the_inputs():
    names = [*all_targets()]
    jobs = [job for some in rounds(20_000, names, 0) for job in some]
    assert len(jobs) == 20_000
    assert len(set(jobs)) == 20_000
    whole = sum(target.share for target in all_targets().values())
    counts = Counter(job.target for job in jobs)
    for name, target in all_targets().items():
        assert abs(counts[name] - 20_000 * target.share / whole) < len(names)


def test_a_changed_tar_has_right_checksums(tmp_path):
    from benchmarks.fuzz.samples import tars

    data = bytearray(tars()[0])
    data[124:136] = b"00000000007\0"
    changes.mend_tar(data)
    assert sum(data[:148]) + 8 * 32 + sum(data[156:512]) == int(bytes(data[148:154]), 8)
    assert changes.change_tar(Random(1), tars()[0]) == changes.change_tar(Random(1), tars()[0])


def test_a_pickle_is_cut_into_its_opcodes():
    import pickletools

    for name in ("DCP metadata", "torch file"):
        for data in all_targets()[name].seeds():
            if data[:2] != b"PK":
                starts = [at for _, _, at in pickletools.genops(data)]
                sizes = [len(part) for part in changes.opcodes(data)][: len(starts)]
                assert [sum(sizes[:i]) for i in range(len(sizes))] == starts


def hostile(_: Path, data: bytes, __: bytes) -> str:
    if data == b"crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if data == b"hang":
        time.sleep(1000)
    if data == b"memory":
        bytearray(4 * workers.MEMORY_BYTES)
    if data == b"refused":
        raise ValueError("x.json: is not JSON")
    if data == b"hidden":
        try:
            bytearray(4 * workers.MEMORY_BYTES)
        except MemoryError as error:
            raise ValueError("x.json: is too large") from error
    if data == b"error":
        raise KeyError("x")
    return "accepted"


def test_a_crash_a_hang_and_a_bomb_cost_one_input_each(monkeypatch, tmp_path):
    words = [b"crash", b"hang", b"memory", b"hidden", b"refused", b"error", b"good"]
    target = Target(
        share=1,
        seeds=lambda: [b""],
        change=lambda rng, data, seeds: b"",
        read=hostile,
        refusals=(ValueError,),
    )
    monkeypatch.setattr(workers, "all_targets", lambda: {"t": target})
    monkeypatch.setattr(workers, "read_seeds", lambda folder, name: [b""])
    monkeypatch.setattr(
        workers, "input_of", lambda targets, seeds, seed, name, number: (words[number], b"")
    )
    monkeypatch.setattr(workers, "SECONDS", 3.0)
    jobs = [Job("t", number, 0) for number in range(len(words))]
    kinds = {words[job.number]: o.kind for job, o in workers.run(jobs, tmp_path, workers=1)}
    assert kinds == {
        b"crash": "crash",
        b"hang": "hang",
        b"memory": "VIOLATION: MemoryError",
        b"hidden": "VIOLATION: memory",
        b"refused": "refused by name",
        b"error": "VIOLATION: KeyError",
        b"good": "accepted",
    }


def test_a_violation_is_an_exit_code(capsys):
    assert report({"image": Count(Counter({("refused by its header", "x"): 3}))}, seconds=1.0) == 0
    for kind in ("VIOLATION: pixels differ from Pillow's", "crash", "hang"):
        count = Count(Counter({(kind, "x"): 1}))
        assert report({"image": count}, seconds=1.0) == 1
    assert "1 violations" in capsys.readouterr().out


def test_of_each_violation_the_smallest_input_is_kept(tmp_path):
    from benchmarks.fuzz.__main__ import _note, keep

    for name in ("starts",):
        (tmp_path / name).mkdir()
        for number, content in enumerate(all_targets()[name].seeds()):
            (tmp_path / name / str(number)).write_bytes(content)
    count = Count()
    for number in range(20):
        _note(count, tmp_path, Job("starts", number, 0), Outcome("crash", "SIGSEGV"))
    keep(tmp_path / "kept", {"starts": count})
    seeds = all_targets()["starts"].seeds()
    inputs = [input_of(all_targets(), seeds, 0, "starts", number)[0] for number in range(20)]
    (kept,) = (tmp_path / "kept").glob("starts-*")
    assert kept.read_bytes() == min(inputs, key=len)
    assert "20 times" in (tmp_path / "kept" / "findings.txt").read_text()
