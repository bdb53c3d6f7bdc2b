"""The events of torch's profiler, by part of a step.

An event belongs to the innermost part that the training thread was in when it began. So the work of
autograd's own thread, which a GPU's backward runs in, belongs to the backward.
"""

from __future__ import annotations

import bisect
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch._C._autograd import DeviceType

from fastmoco_pipelines.step_parts import OPTIMIZER, RANGE

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
    ranges = [e for e in events if e.name.startswith(RANGE) and e.device_type == DeviceType.CPU]
    trainer = next((e.thread for e in ranges if e.name == RANGE + OPTIMIZER), None)
    own = [e for e in ranges if e.thread == trainer]
    loaders = {e.thread for e in ranges} - {trainer}
    segments = _Segments(own)
    found = TracedParts()
    inner = {id(e.cpu_parent) for e in events if e.cpu_parent is not None and _is_operator(e)}
    times: defaultdict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()

    for event in events:
        if event.device_type != DeviceType.CPU or event.thread in loaders:
            continue
        part = segments.at(event.time_range.start)
        kernels = [k for k in event.kernels if not k.name.startswith(RANGE)]
        found.launches[part] += len(kernels)
        found.device_ms[part] += sum(k.duration for k in kernels) / 1e3
        for kernel in kernels:
            times[kernel.name] += kernel.duration / 1e3
            calls[kernel.name] += 1
        if event.name in _SYNCHRONISING:
            found.waits[part] += 1
        if _is_operator(event) and id(event) not in inner:
            found.operators[part] += 1

    # Without a GPU, operators by the time that they spend themselves.
    if not times:
        for event in events:
            if _is_operator(event) and event.thread not in loaders:
                times[event.name] += event.self_cpu_time_total / 1e3
                calls[event.name] += 1
    order = sorted(times, key=lambda name: -times[name])[:largest]
    found.top = [(name, times[name], calls[name]) for name in order]
    return found


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
