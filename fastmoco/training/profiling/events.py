"""The events of torch's profiler, by part of a step.

An event belongs to the innermost part that its thread was in when it began, and a kernel to that of
its launch. The threads of autograd, in which a GPU's backward runs, are in the parts of the training
thread.
"""

from __future__ import annotations

import bisect
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch._C._autograd import DeviceType

from fastmoco_pipelines.loading.step_parts import DECODE, OPTIMIZER, RANGE

_SYNCHRONISING = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "hipStreamSynchronize",
    "hipDeviceSynchronize",
    "hipEventSynchronize",
)
"""Calls of the runtime in which the host waits for the device."""
_RUNTIME = ("cuda", "cu", "hip")
"""How the names of calls of a runtime begin; those that launch have the number of their kernel."""
_DECODER = ("dali", "nvjpeg")
"""In the names of kernels that the loader's own threads launch."""


@dataclass(slots=True)
class TracedParts:
    """What the profiler saw of some steps, by part; "" is outside of all parts.

    Attributes:
        device_ms: milliseconds of kernels, copies and fills on a GPU.
        launches: their number.
        waits: calls in which the training thread or autograd waited for a GPU.
        operators: calls of operators that contain no other one.
        top: operators by their own time, the largest first: name, milliseconds, calls. On a GPU
            kernels.
    """

    device_ms: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    launches: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    operators: Counter[str] = field(default_factory=Counter)
    top: list[tuple[str, float, int]] = field(default_factory=list)


def by_part(events: Iterable[Any], largest: int) -> TracedParts:
    """Sort the events of a profile into the parts.

    Args:
        events: of `torch.profiler.profile.events()`; the parts are ranges in them
            (`collecting(ranges=True)`).
        largest: how many operators are listed.
    """
    events = list(events)
    on_host = [e for e in events if e.device_type == DeviceType.CPU]
    found = TracedParts()
    times: defaultdict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()

    # The parts of each thread. Autograd's threads are in those of the trainer's.
    ranges: defaultdict[Any, list[Any]] = defaultdict(list)
    for event in on_host:
        if event.name.startswith(RANGE):
            ranges[event.thread].append(event)
    names = {thread: {e.name for e in own} for thread, own in ranges.items()}
    trainer = next((t for t, own in names.items() if RANGE + OPTIMIZER in own), None)
    segments = {thread: _Segments(own) for thread, own in ranges.items()}
    of_trainer = segments.get(trainer, _Segments(()))
    loaders = ranges.keys() - {trainer}
    autograd = {e.thread for e in on_host if e.name.startswith("autograd::")} - loaders
    segments |= dict.fromkeys(autograd, of_trainer)

    # Kernels, by the time of their launch.
    launches = {
        e.id: (e.thread, e.time_range.start) for e in on_host if e.name.startswith(_RUNTIME)
    }
    for event in events:
        if event.device_type == DeviceType.CPU or _is_range(event):
            continue
        thread, start = launches.get(event.id, (None, 0.0))
        part = segments[thread].at(start) if thread in segments else ""
        if any(word in event.name.lower() for word in _DECODER):
            part = DECODE
        elapsed = (event.time_range.end - event.time_range.start) / 1e3
        found.launches[part] += 1
        found.device_ms[part] += elapsed
        times[event.name] += elapsed
        calls[event.name] += 1

    # Waits, and operators that contain no other one.
    inner = {id(e.cpu_parent) for e in on_host if e.cpu_parent is not None and _is_operator(e)}
    for event in on_host:
        if event.thread in loaders:
            continue
        part = of_trainer.at(event.time_range.start)
        if event.name in _SYNCHRONISING and event.thread in (trainer, *autograd):
            found.waits[part] += 1
        if _is_operator(event) and id(event) not in inner:
            found.operators[part] += 1

    # Without a GPU, operators by the time that they spend themselves.
    if not times:
        for event in on_host:
            if _is_operator(event) and event.thread not in loaders:
                times[event.name] += event.self_cpu_time_total / 1e3
                calls[event.name] += 1
    order = sorted(times, key=lambda name: -times[name])[:largest]
    found.top = [(name, times[name], calls[name]) for name in order]
    return found


def _is_range(event: Any) -> bool:
    """Whether an event is a range: of a part, of an optimizer of torch, of a compiled graph. On a
    GPU a range spans the kernels that it launched, which are events of their own."""
    return bool(event.is_user_annotation) or event.name.startswith(RANGE)


def _is_operator(event: Any) -> bool:
    """Whether an event is an operator, not a range, a node of autograd or a call of a runtime."""
    name: str = event.name
    return "::" in name and not name.startswith(("autograd::", "torch::autograd", RANGE, "c10"))


class _Segments:
    """Which range is the innermost one at a time.

    Args:
        ranges: events of one thread, each within another or apart from it.
    """

    def __init__(self, ranges: Iterable[Any]) -> None:
        self._times: list[float] = []
        self._names: list[str] = []
        edges = []
        for event in ranges:
            span = event.time_range
            edges.append((span.start, 1, -span.end, event.name.removeprefix(RANGE)))
            edges.append((span.end, 0, -span.start, ""))
        stack: list[str] = []
        for time, opens, _, name in sorted(edges, key=lambda edge: edge[:3]):
            if opens:
                stack.append(name)
            elif stack:
                stack.pop()
            self._times.append(time)
            self._names.append(stack[-1] if stack else "")

    def at(self, time: float) -> str:
        """The part at a time; "" outside of all."""
        place = bisect.bisect_right(self._times, time) - 1
        return self._names[place] if place >= 0 else ""
