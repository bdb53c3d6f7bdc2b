"""Time by kernel of a training step, and the number of its launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

LARGEST = 12


def profiled(step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Profile one call after warm-up.

    Args:
        step: the work.
        device: CUDA: kernels are counted; CPU: operators.

    Returns:
        `launches`: kernels, copies and fills of one call; `busy_ms`: the sum of their times;
        `largest_kernels`: the twelve that take most, each with its milliseconds, its share and its
        calls.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as found:
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
    rows: list[tuple[float, int, str]] = []
    for event in found.key_averages():
        if on_gpu and event.device_type == DeviceType.CUDA:
            rows.append((event.self_device_time_total / 1e3, event.count, event.key))
        elif not on_gpu:
            rows.append((event.self_cpu_time_total / 1e3, event.count, event.key))
    busy = sum(ms for ms, _, _ in rows)
    rows.sort(reverse=True)
    return {
        "launches": sum(count for _, count, _ in rows),
        "busy_ms": round(busy, 2),
        "largest_kernels": [
            f"{ms:.2f} ms {ms / max(busy, 1e-9):.1%} x{count} {name[:80]}"
            for ms, count, name in rows[:LARGEST]
        ],
    }
