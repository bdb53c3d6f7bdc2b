"""The marks of a step's parts: what they add up, across threads, and that they are off."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext

import pytest

from fastmoco_pipelines.loading import step_parts
from fastmoco_pipelines.loading.step_parts import (
    BACKWARD,
    DECODE,
    LOSS,
    READ,
    Collector,
    collecting,
    part,
    shares,
)


def _work(seconds: float) -> float:
    """Work for so long; the processor seconds that it has been, which may be more: on a virtual
    machine the clock of a thread can also count what the machine itself waited.
    """
    start = time.thread_time()
    while time.thread_time() < start + seconds:
        pass
    return time.thread_time() - start


def test_a_mark_outside_of_a_profile_is_one_shared_object_that_does_nothing() -> None:
    assert part(LOSS) is part(BACKWARD)
    assert isinstance(part(LOSS), nullcontext)


def test_an_inner_part_takes_its_time_out_of_the_outer_one() -> None:
    with collecting() as collector:
        with part(LOSS):
            with part(BACKWARD):
                assert collector.current() == BACKWARD
                inner = _work(0.2)
            assert collector.current() == LOSS
            outer = _work(0.02)
        assert collector.current() is None
    found = collector.figures()
    assert list(found) == [LOSS, BACKWARD]  # the order of a step
    assert found[BACKWARD].calls == found[LOSS].calls == 1
    assert found[BACKWARD].cpu_s >= inner
    assert outer <= found[LOSS].cpu_s < outer + inner / 2
    assert found[LOSS].wall_s >= outer
    assert sum(shares(found, collector.cpu_s).values()) == pytest.approx(1.0)


def test_a_thread_without_marks_counts_to_the_part_that_employs_it() -> None:
    worked: list[float] = []

    def loader() -> None:
        with part(DECODE, helpers=True):
            helper = threading.Thread(target=lambda: worked.append(_work(0.2)))
            helper.start()
            helper.join()

    for helpers in (False, True):
        with collecting(helpers=helpers) as collector:
            thread = threading.Thread(target=loader)
            thread.start()
            with part(LOSS):
                own = _work(0.2)  # at the same time, and none of the loader's
            thread.join()
        found = collector.figures()
        assert (0.9 * worked[-1] < found[DECODE].cpu_s) == helpers
        assert found[DECODE].cpu_s < worked[-1] + own / 2
        assert own <= found[LOSS].cpu_s < own + worked[-1] / 2


def test_what_a_thread_did_before_its_first_mark_is_taken_from_no_part() -> None:
    warm, decoding, reading = threading.Event(), threading.Event(), threading.Event()

    def reader() -> None:
        _work(0.4)
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
            own = _work(0.2)
        thread.join()
    assert 0.8 * own < collector.figures()[DECODE].cpu_s < own + 0.2


def test_a_clock_whose_reading_was_interrupted_is_read_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The process's time and that of the other threads are read one after the other; here another
    thread works between the two readings at the start of the part.
    """
    ready, interrupting, worked, closing = (threading.Event() for _ in range(4))
    others, readings = Collector._others_cpu, []

    def interrupted(collector: Collector, own: step_parts._Thread) -> float:
        found = others(collector, own)
        readings.append(found)
        interrupting.set()
        worked.wait()
        return found

    def trainer() -> None:
        with part(LOSS):
            ready.set()
            interrupting.wait()
            _work(0.2)
            worked.set()
            closing.wait()

    thread = threading.Thread(target=trainer)
    with collecting(helpers=True) as collector:
        thread.start()
        ready.wait()
        monkeypatch.setattr(Collector, "_others_cpu", interrupted)
        with part(DECODE, helpers=True):
            own = _work(0.2)
        closing.set()
        thread.join()
    assert len(readings) > 2  # one for each end of the part, and the interrupted one
    assert 0.8 * own < collector.figures()[DECODE].cpu_s < own + 0.1


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
