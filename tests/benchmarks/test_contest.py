"""Contests: a failed check forbids a speed-up, inputs rotate, memory is seen."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import pytest
import torch

from benchmarks import contest as harness
from benchmarks.case import COMMON
from benchmarks.chips import CHIPS, Chip, chip_of, this_cpu
from benchmarks.contest import (
    Contender,
    Task,
    Work,
    buffers,
    contest,
    nbytes,
    peak_bytes,
    relative_error,
    seconds_by_events,
    wall_and_host,
)
from benchmarks.measure import quantiles
from benchmarks.registry import CASES

CPU = torch.device("cpu")


def _busy(seconds, error=0.0):
    """A contender that computes for a while, with this error."""

    def open_(inputs):
        def call():
            until = time.process_time() + seconds
            while time.process_time() < until:
                pass
            return {"value": inputs + error}

        return call

    return open_


def _task(*contenders, subject="ours", **fields):
    return Task(
        inputs=lambda seed: torch.ones(3),
        truth=lambda inputs: {"value": inputs.double()},
        contenders=contenders,
        subject=subject,
        limits={"value": 1e-3},
        **fields,
    )


OURS, SLOW = Contender(name="ours", open=_busy(1e-4)), Contender(name="slow", open=_busy(1e-3))


def test_the_subject_is_compared_with_every_other_that_passed():
    wrong = Contender(name="wrong", open=_busy(0.0, error=1.0))
    absent = Contender(name="absent", skipped="needs a GPU")
    result = contest(_task(OURS, SLOW, wrong, absent), device=CPU, rounds=2)
    assert set(result["speedup"]) == {"slow"}
    assert result["speedup"]["slow"]["median"] > 2
    assert result["failed"] == {"wrong": "value 1 > 0.001"}
    assert result["skipped"] == {"absent": "needs a GPU"}
    assert "milliseconds" not in result


@pytest.mark.parametrize("error", [1.0, float("nan"), float("inf")])
def test_a_subject_that_fails_its_check_gets_no_speedup(error):
    ours = Contender(name="ours", open=_busy(0.0, error))
    result = contest(_task(ours, SLOW), device=CPU, rounds=1)
    assert result["speedup"] == {}
    assert "ours" in result["failed"]
    assert "cpu_ms" not in result


def test_an_error_of_a_contender_affects_itself_alone():
    def fails(inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    result = contest(_task(OURS, Contender(name="large", open=fails), SLOW), device=CPU, rounds=1)
    assert set(result["speedup"]) == {"slow"}
    assert "out of memory" in result["failed"]["large"]
    alone = contest(_task(Contender(name="ours", open=fails), SLOW), device=CPU, rounds=1)
    assert (alone["speedup"], list(alone["failed"])) == ({}, ["ours"])


def test_calls_rotate_through_inputs_larger_than_the_cache(monkeypatch):
    monkeypatch.setattr(harness, "cache_bytes", lambda: 100)
    monkeypatch.setattr(harness, "TURN_S", 0.0)
    seen = []

    def open_(inputs):
        def call():
            seen.append(int(inputs[0]))
            return {"value": inputs}

        return call

    task = replace(
        _task(Contender(name="ours", open=open_)),
        inputs=lambda seed: torch.full((10,), seed),  # 80 bytes: 3 sets exceed 200
    )
    result = contest(task, device=CPU, rounds=9, seed=5)
    assert result["buffers"] == 3
    turns = seen[-9:]
    assert set(turns) == {5, 6, 7}
    assert all(a != b for a, b in itertools.pairwise(turns))
    assert 3 * nbytes(task.inputs(0)) > 200


def test_buffers_are_few_for_large_inputs_and_one_on_a_gpu(monkeypatch):
    monkeypatch.setattr(harness, "cache_bytes", lambda: 1 << 20)
    assert buffers([torch.zeros(1 << 20)], CPU) == 1
    assert buffers((torch.zeros(1), [torch.zeros(1)]), CPU) == harness.MOST_BUFFERS
    assert buffers([torch.zeros(1)], torch.device("cuda")) == 1


def test_quantiles_are_of_the_values():
    assert quantiles([4.0, 1.0, 2.0, 3.0, 5.0, 6.0]) == {"median": 3.5, "q20": 2.0, "q80": 5.0}
    assert quantiles([7.0]) == {"median": 7.0, "q20": 7.0, "q80": 7.0}


def test_the_share_of_the_roofline_is_that_of_the_larger_bound(monkeypatch):
    chip = Chip(flops_per_s={"fp32": 1e6}, bytes_per_s=1e3, source="")
    assert chip.roofline_s(2e6, 1e3, "fp32") == 2.0
    assert chip.roofline_s(2e6, 5e3, "fp32") == 5.0
    assert chip.roofline_s(1.0, 1.0, "bf16") == 0.0  # unknown rate
    monkeypatch.setattr(harness, "chip_of", lambda *_: ("this CPU", chip))
    found = contest(_task(OURS, work=Work(flops=50.0)), device=CPU, rounds=3)["roofline"]
    assert 0.1 < found["share"] <= 0.5  # 50 us of a call of at least 100 us
    assert found["chip"] == "this CPU"


def test_chips_have_rates_and_sources():
    assert {"A100", "H100", "H200", "B200"} <= set(CHIPS)
    for chip in CHIPS.values():
        assert chip.source
        assert chip.flops_per_s["bf16"] > chip.flops_per_s["tf32"] > chip.flops_per_s["fp32"]
    name, here = chip_of(CPU, "fp32")
    assert name == "this CPU"
    assert here is this_cpu("fp32", torch.get_num_threads())  # measured once in a run
    assert here.flops_per_s["fp32"] > 1e8
    assert here.bytes_per_s > 1e7


OP_CASES = [name for name, case in CASES.items() if COMMON.keys() <= case.defaults.keys()]


@pytest.mark.parametrize("name", OP_CASES)
def test_no_case_prints_a_speedup_on_a_failed_gate(name, monkeypatch):
    small = {
        "attention": ["L=9", "M=9"],
        "cut_views": ["images=1", "height=30", "width=40", "size=16"],
        "fused_block": ["tokens=5", "E=32", "heads=4"],
        "info_nce": ["rows=32", "dim=8"],
        "residual_norm": ["rows=8", "E=16"],
        "soft_cross_entropy": ["images=2", "outputs=16", "dim=8"],
        "view_color": ["images=1", "size=16"],
    }
    monkeypatch.setattr(harness, "_error", lambda *_: float("nan"))
    options = CASES[name].options([*small.get(name, []), "rounds=1", "device=cpu"], quick=True)
    result = CASES[name].run(options)
    parts = [part for part in (result, *result.values()) if isinstance(part, dict)]
    contests = [part for part in parts if "subject" in part]
    assert contests
    for part in contests:
        assert part["speedup"] == {}
        assert part["subject"] in {**part["failed"], **part["skipped"]}


def test_peak_memory_counts_what_lives_at_the_same_time():
    def call():
        for _ in range(3):
            torch.ones(1 << 20)  # 4 MiB each, one after another

    assert 4 << 20 <= peak_bytes(call, CPU) < 6 << 20


def test_the_relative_error_of_a_nan_is_infinite():
    truth = torch.ones(3)
    assert relative_error(torch.tensor([1.0, 1.0, float("nan")]), truth) == float("inf")
    assert relative_error(truth * 1.5, truth) == pytest.approx(0.5)


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
