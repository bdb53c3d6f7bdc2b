"""Contenders for one job: each is checked first, then they are timed in turns, and only then compared.

Speed-ups are ratios of medians within one run. Milliseconds are reported from a GPU alone: this project's CPUs are shared.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.measure import interleave, ratios


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way of doing the job.

    Attributes:
        name: what the result calls it.
        call: does the whole job once, on inputs made beforehand.
        errors: the distance of its results from a float64 truth, by quantity; run once, before anything is timed.
        limits: the largest allowed value of each error.
        skipped: why it does not run here; then nothing else is looked at.
    """

    name: str
    call: Callable[[], object] = lambda: None
    errors: Callable[[], Mapping[str, float]] = dict
    limits: Mapping[str, float] = field(default_factory=dict)
    skipped: str = ""


def contest(contenders: Sequence[Contender], *, subject: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """Check, time and compare.

    Args:
        contenders: ``subject`` among them.
        subject: the name whose speed-up over every other is asked for.
        device: where all of them run.
        rounds: timed turns of each.

    Returns:
        ``errors`` by contender; ``skipped`` and ``failed`` with reasons; ``peak_bytes`` that one call adds;
        ``speedup`` of the subject over each other contender that passed its check; ``milliseconds`` on CUDA.
        Without a passing subject there is no ``speedup`` at all.
    """
    result: dict[str, Any] = {"errors": {}, "skipped": {}, "failed": {}, "peak_bytes": {}, "speedup": {}}
    running = []
    for contender in contenders:
        if contender.skipped:
            result["skipped"][contender.name] = contender.skipped
            continue
        errors = dict(contender.errors())
        result["errors"][contender.name] = {name: float(f"{value:.3g}") for name, value in errors.items()}
        beyond = [
            f"{name} {errors[name]:.3g} > {limit:.3g}"
            for name, limit in contender.limits.items()
            if not errors[name] <= limit
        ]
        if beyond:
            result["failed"][contender.name] = ", ".join(beyond)
        else:
            running.append(contender)
    if subject not in {contender.name for contender in running}:
        return result
    for contender in running:
        contender.call()  # compile, tune, fill the caches
        result["peak_bytes"][contender.name] = peak_bytes(contender.call, device)
    timed = {contender.name: _timer(contender.call, device) for contender in running}
    figures = interleave(timed, rounds=rounds)
    if device.type == "cuda":
        result["milliseconds"] = {name: round(statistics.median(values) * 1e3, 4) for name, values in figures.items()}
    result["speedup"] = {
        name: {kind: round(value, 3) for kind, value in ratios(values, figures[subject]).items()}
        for name, values in figures.items()
        if name != subject
    }
    return result


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """``||value - truth|| / ||truth||`` in float64; a NaN or an infinity anywhere gives infinity."""
    value, truth = value.detach().double().cpu(), truth.detach().double().cpu()
    error = float((value - truth).norm() / truth.norm().clamp_min(1e-300))
    return error if error == error else float("inf")


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Memory that one call needs at its peak beyond what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def _timer(call: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """Seconds of one call: by events behind a cleared L2 cache on CUDA, by the clock elsewhere."""
    if device.type != "cuda":

        def by_clock() -> float:
            began = time.perf_counter()
            call()
            return time.perf_counter() - began

        return by_clock
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device=device)

    def by_events() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        flush.zero_()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end)) / 1e3

    return by_events
