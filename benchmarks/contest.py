"""Contenders for one task: check each, time them in turns, then compare.

Speed-ups are ratios of medians within one run. Milliseconds are reported on a GPU only, because
CPUs are shared: the time of the kernels on the GPU, the time of the host to launch them, and the
wall-clock time of both.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks.measure import interleave, ratios

CYCLES_PER_S = 2e9
"""Upper bound of a GPU's clock rate, so that a sleep in cycles is at least as long as intended."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way of doing the task.

    Attributes:
        name: in the result.
        call: does the whole task once, on prepared inputs.
        errors: computes the errors relative to float64, by quantity; called once, before timing.
        limits: the largest allowed value of each error.
        skipped: the reason why it does not run here; the other fields are then unused.
    """

    name: str
    call: Callable[[], object] = lambda: None
    errors: Callable[[], Mapping[str, float]] = dict
    limits: Mapping[str, float] = field(default_factory=dict)
    skipped: str = ""


def contest(
    contenders: Sequence[Contender], *, subject: str, device: torch.device, rounds: int
) -> dict[str, Any]:
    """Check, time and compare.

    Args:
        contenders: including `subject`.
        subject: name of the contender whose speed-ups over the others are reported.
        device: of all of them.
        rounds: timed turns of each.

    Returns:
        `errors` by contender; `skipped` and `failed` with reasons; `peak_bytes` that one call adds;
        `speedup` of the subject over each other contender that passed its check; on CUDA
        `milliseconds` of the GPU, `host_ms` and `wall_ms`. Without a passing subject there is no
        `speedup`. Other contenders that fail, by their check, an error or lack of memory, are
        reported and omitted.
    """
    result: dict[str, Any] = {
        "errors": {},
        "skipped": {},
        "failed": {},
        "peak_bytes": {},
        "speedup": {},
        "subject": subject,
    }

    # Check each contender against its limits.
    running = []
    for contender in contenders:
        if contender.skipped:
            result["skipped"][contender.name] = contender.skipped
            continue
        if (found := _attempt(contender.name, subject, contender.errors, result)) is None:
            continue
        errors = dict(found)
        result["errors"][contender.name] = {
            name: float(f"{value:.3g}") for name, value in errors.items()
        }
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

    # Measure the peak of one warm call.
    for contender in tuple(running):
        peak = _attempt(
            contender.name, subject, partial(_warm_peak, contender.call, device), result
        )
        if peak is None:
            running.remove(contender)
        else:
            result["peak_bytes"][contender.name] = peak

    # Time the rest in turns.
    timed = {contender.name: _timer(contender.call, device) for contender in running}
    figures = interleave(timed, rounds=rounds)
    if device.type == "cuda":
        result["milliseconds"] = {
            name: round(statistics.median(values) * 1e3, 4) for name, values in figures.items()
        }
        walls = {contender.name: wall_and_host(contender.call, device) for contender in running}
        result["wall_ms"] = {name: round(wall * 1e3, 4) for name, (wall, _) in walls.items()}
        result["host_ms"] = {name: round(host * 1e3, 4) for name, (_, host) in walls.items()}
    result["speedup"] = {
        name: {kind: round(value, 3) for kind, value in ratios(values, figures[subject]).items()}
        for name, values in figures.items()
        if name != subject
    }
    return result


def _attempt(name: str, subject: str, action: Callable[[], Any], result: dict[str, Any]) -> Any:
    """The result of `action`; None, with the reason in `failed`, if it fails
    for a contender other than the subject.
    """
    try:
        return action()
    except (
        RuntimeError,
        ValueError,
        ImportError,
    ) as error:  # torch.OutOfMemoryError is a RuntimeError
        if name == subject or "CUDA error" in str(error):
            raise
        result["failed"][name] = f"{type(error).__name__}: {str(error)[:200]}"
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None


def _warm_peak(call: Callable[[], object], device: torch.device) -> int:
    call()  # compile, tune, fill caches
    return peak_bytes(call, device)


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """`||value - truth|| / ||truth||` in float64; a NaN or an infinity anywhere gives infinity."""
    value, truth = value.detach().double().cpu(), truth.detach().double().cpu()
    error = float((value - truth).norm() / truth.norm().clamp_min(1e-300))
    return error if error == error else float("inf")


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Peak memory of one call above the memory allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def seconds_by_events(
    call: Callable[[], object], device: torch.device, *, queued: float = 2e-3
) -> float:
    """Seconds of one call's kernels on a GPU, after a cleared L2 cache; on a CPU by the clock.

    The GPU sleeps first, so that all launches of the call are queued when it wakes, and events
    measure kernels, not Python. The host is visible only if the call itself waits for the device,
    or queues more than about a thousand launches.

    Args:
        call: the work.
        device: of the call.
        queued: seconds that the GPU sleeps, longer than the host takes for the call.
    """
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    _flush(device).zero_()
    torch.cuda._sleep(int(queued * CYCLES_PER_S))  # type: ignore[no-untyped-call]
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(end)) / 1e3


def wall_and_host(
    call: Callable[[], object], device: torch.device, *, calls: int = 5
) -> tuple[float, float]:
    """Seconds until the results of a call are complete, and until the host
    continues; medians over calls.
    """
    walls, hosts = [], []
    for _ in range(calls):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        call()
        hosts.append(time.perf_counter() - began)
        torch.cuda.synchronize(device)
        walls.append(time.perf_counter() - began)
    return statistics.median(walls), statistics.median(hosts)


@functools.cache
def _flush(device: torch.device) -> torch.Tensor:
    """More bytes than any L2 cache holds."""
    return torch.empty(256 * 2**20, dtype=torch.int8, device=device)


def _timer(call: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """Seconds of one call, on a GPU by the clock of the GPU."""
    if device.type != "cuda":
        return lambda: seconds_by_events(call, device)
    _, host = wall_and_host(call, device, calls=2)
    return lambda: seconds_by_events(call, device, queued=min(0.5, 1.5 * host + 2e-4))
