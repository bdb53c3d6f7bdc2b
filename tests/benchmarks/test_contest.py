"""Contests: a failed check forbids a speed-up, a skipped contender is named, memory is seen."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.contest import (
    Contender,
    contest,
    peak_bytes,
    relative_error,
    seconds_by_events,
    wall_and_host,
)

CPU = torch.device("cpu")


def _sleeper(name: str, seconds: float, error: float = 0.0) -> Contender:
    return Contender(
        name=name,
        call=lambda: time.sleep(seconds),
        errors=lambda: {"value": error},
        limits={"value": 1e-3},
    )


def test_the_subject_is_compared_with_every_other_that_passed():
    slow, wrong = _sleeper("slow", 0.02), _sleeper("wrong", 0.0, error=1.0)
    absent = Contender(name="absent", skipped="needs a GPU")
    result = contest(
        [_sleeper("ours", 0.001), slow, wrong, absent], subject="ours", device=CPU, rounds=2
    )
    assert set(result["speedup"]) == {"slow"}
    assert result["speedup"]["slow"]["median"] > 2
    assert result["failed"] == {"wrong": "value 1 > 0.001"}
    assert result["skipped"] == {"absent": "needs a GPU"}
    assert "milliseconds" not in result


@pytest.mark.parametrize("error", [1.0, float("nan"), float("inf")])
def test_a_subject_that_fails_its_check_gets_no_speedup(error):
    result = contest(
        [_sleeper("ours", 0.0, error), _sleeper("slow", 0.0)], subject="ours", device=CPU, rounds=1
    )
    assert result["speedup"] == {}
    assert "ours" in result["failed"]


def test_peak_memory_counts_what_lives_at_the_same_time():
    def call():
        for _ in range(3):
            torch.ones(1 << 20)  # 4 MiB each, one after another

    assert 4 << 20 <= peak_bytes(call, CPU) < 6 << 20


def test_the_relative_error_of_a_nan_is_infinite():
    truth = torch.ones(3)
    assert relative_error(torch.tensor([1.0, 1.0, float("nan")]), truth) == float("inf")
    assert relative_error(truth * 1.5, truth) == pytest.approx(0.5)


def test_one_that_has_no_memory_for_the_job_costs_only_itself():
    def call():
        raise torch.OutOfMemoryError("CUDA out of memory")

    large = Contender(name="large", errors=lambda: {"value": 0.0}, limits={"value": 1.0}, call=call)
    result = contest(
        [_sleeper("ours", 0.001), large, _sleeper("slow", 0.002)],
        subject="ours",
        device=CPU,
        rounds=1,
    )
    assert set(result["speedup"]) == {"slow"}
    assert "out of memory" in result["failed"]["large"]
    with pytest.raises(torch.OutOfMemoryError):
        contest([large], subject="large", device=CPU, rounds=1)


@pytest.mark.gpu
def test_gpu_time_is_that_of_the_kernels_and_not_of_python():
    x = torch.randn(4096, 4096, device="cuda")

    def slow_host():
        time.sleep(2e-3)  # the GPU still sleeps when the product is queued
        return x @ x

    device = torch.device("cuda")
    plain = min(seconds_by_events(lambda: x @ x, device) for _ in range(3))
    assert min(seconds_by_events(slow_host, device, queued=2e-2) for _ in range(3)) < 1.5 * plain
    wall, host = wall_and_host(slow_host, device)
    assert wall >= host >= 2e-3
