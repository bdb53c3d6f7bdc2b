"""Events of torch's profiler, sorted into the parts of a step."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch._C._autograd import DeviceType

from fastmoco.training.profiling.events import by_part
from fastmoco_pipelines.loading.step_parts import (
    AUGMENT,
    BACKWARD,
    DECODE,
    LOSS,
    OPTIMIZER,
    RANGE,
    collecting,
    part,
)


@dataclass
class Span:
    start: float
    end: float


@dataclass
class Event:
    name: str
    thread: int
    time_range: Span
    id: int = 0
    cpu_parent: Any = None
    device_type: DeviceType = DeviceType.CPU
    self_cpu_time_total: float = 0.0
    is_user_annotation: bool = False


def kernel(name: str, number: int, us: float) -> Event:
    """A kernel on the GPU, long after its launch."""
    span = Span(10_000 * number, 10_000 * number + us)
    return Event(name, 7, span, number, device_type=DeviceType.CUDA)


def test_kernels_and_waits_belong_to_the_innermost_part_at_their_launch() -> None:
    trainer, autograd, loader, of_dali = range(1, 5)
    events = [
        Event(RANGE + OPTIMIZER, trainer, Span(100, 200)),
        Event(RANGE + BACKWARD, trainer, Span(0, 50)),
        Event(RANGE + LOSS, trainer, Span(10, 20)),
        # What ranges look like on the GPU: those of parts, and those that torch opens itself.
        kernel(RANGE + LOSS, 0, 50),
        replace(kernel("Optimizer.step#AdamW.step", 0, 70), is_user_annotation=True),
        Event("cudaLaunchKernel", trainer, Span(12, 13), 1),
        kernel("gemm", 1, 500),
        Event("autograd::engine::evaluate_function: MmBackward0", autograd, Span(29, 32)),
        Event("cuLaunchKernelEx", autograd, Span(30, 31), 2),
        kernel("gemm", 2, 300),
        Event("cudaStreamSynchronize", trainer, Span(150, 160)),
        Event("cudaLaunchKernel", trainer, Span(60, 61), 3),
        kernel("add", 3, 100),
        Event(RANGE + AUGMENT, loader, Span(0, 300)),
        Event("cudaMemcpyAsync", loader, Span(12, 14), 4),
        kernel("copy", 4, 50),
        Event("cudaEventSynchronize", loader, Span(20, 30)),
        Event("cudaLaunchKernel", of_dali, Span(20, 30), 5),
        kernel("nvjpeg::decode", 5, 40),
        Event("cudaStreamSynchronize", of_dali, Span(20, 30)),
    ]
    found = by_part(events, largest=2)
    times = {LOSS: 0.5, BACKWARD: 0.3, "": 0.1, AUGMENT: 0.05, DECODE: 0.04}
    assert found.device_ms == pytest.approx(times)
    assert found.launches == dict.fromkeys(times, 1)
    assert found.waits == {OPTIMIZER: 1}
    assert found.top == [("gemm", pytest.approx(0.8), 2), ("add", pytest.approx(0.1), 1)]


def test_a_real_profile_has_the_operators_of_the_training_thread_by_part() -> None:
    weight = torch.ones(8, 8, requires_grad=True)

    def loader() -> None:
        with part(DECODE):
            torch.ones(9).cumsum(0)

    every_thread = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with (
        torch.profiler.profile(acc_events=True, experimental_config=every_thread) as profile,
        collecting(ranges=True),
    ):
        thread = threading.Thread(target=loader)
        thread.start()
        thread.join()
        with part(LOSS):
            loss = (torch.ones(2, 8) @ weight).exp().sum()
        with part(BACKWARD):
            loss.backward()  # type: ignore[no-untyped-call]
        with part(OPTIMIZER):
            weight.detach().mul_(0.5)
    found = by_part(profile.events(), largest=50)
    names = {name for name, _, _ in found.top}
    assert {"aten::mm", "aten::exp", "aten::mul_"} <= names
    assert "aten::cumsum" not in names
    assert all(found.operators[name] for name in (LOSS, BACKWARD, OPTIMIZER))
    assert not found.launches.total()
