"""The marks of a step's parts: what they add up, across threads, and that they are off."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext

import pytest

from fastmoco_pipelines import step_parts
from fastmoco_pipelines.step_parts import BACKWARD, DECODE, LOSS, READ, collecting, part, shares


def _work(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_a_mark_outside_of_a_profile_is_one_shared_object_that_does_nothing() -> None:
    assert part(LOSS) is part(BACKWARD)
    assert isinstance(part(LOSS), nullcontext)


def test_an_inner_part_takes_its_time_out_of_the_outer_one() -> None:
    with collecting() as collector:
        with part(LOSS):
            with part(BACKWARD):
                assert collector.current() == BACKWARD
                _work(0.05)
            assert collector.current() == LOSS
            _work(0.01)
        assert collector.current() is None
    found = collector.figures()
    assert list(found) == [LOSS, BACKWARD]  # the order of a step
    assert found[BACKWARD].calls == found[LOSS].calls == 1
    assert found[BACKWARD].cpu_s >= 0.05
    assert 0.01 <= found[LOSS].cpu_s < 0.04
    assert found[LOSS].wall_s >= 0.01
    assert sum(shares(found, collector.cpu_s).values()) == pytest.approx(1.0)


def test_a_thread_without_marks_counts_to_the_part_that_employs_it() -> None:
    def loader() -> None:
        with part(DECODE, helpers=True):
            helper = threading.Thread(target=_work, args=(0.05,))
            helper.start()
            helper.join()

    for helpers in (False, True):
        with collecting(helpers=helpers) as collector:
            thread = threading.Thread(target=loader)
            thread.start()
            with part(LOSS):
                _work(0.05)  # at the same time, and none of the loader's
            thread.join()
        found = collector.figures()
        assert (0.045 <= found[DECODE].cpu_s < 0.09) == helpers
        assert 0.05 <= found[LOSS].cpu_s < 0.09


def test_what_a_thread_did_before_its_first_mark_is_taken_from_no_part() -> None:
    warm, decoding, reading = threading.Event(), threading.Event(), threading.Event()

    def reader() -> None:
        _work(0.2)
        warm.set()
        decoding.wait()
        with part(READ):
            reading.set()

    thread = threading.Thread(target=reader)
    thread.start()
    warm.wait()
    with collecting(helpers=True) as collector:
        with part(DECODE, helpers=True):
            decoding.set()
            reading.wait()
            _work(0.05)
        thread.join()
    assert 0.04 <= collector.figures()[DECODE].cpu_s < 0.1


def test_parts_are_ranges_of_the_profiler_and_end_with_an_error() -> None:
    import torch

    with torch.profiler.profile(acc_events=True) as profile, collecting(ranges=True) as collector:
        with pytest.raises(KeyError), part(LOSS):
            raise KeyError
        with part(BACKWARD):
            torch.ones(3).sum()
    names = [event.key for event in profile.key_averages()]
    assert {step_parts.RANGE + LOSS, step_parts.RANGE + BACKWARD} <= set(names)
    assert collector.current() is None
    with pytest.raises(RuntimeError, match="already"), collecting(), collecting():
        pass
    assert part(LOSS) is part(BACKWARD)
