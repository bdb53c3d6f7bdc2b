"""A task for contenders: check each, time them in turns on rotated inputs, then compare.

Speed-ups are ratios of neighbouring turns within one run. The clock is the processor time of this
process on a CPU, which is shared, and that of the GPU on a GPU. Milliseconds are a result on a GPU
only: the time of its kernels, the time of the host to launch them, and the wall-clock time of both.
On a CPU `cpu_ms` is the evidence beside a ratio.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import shutil
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.chips import chip_of
from benchmarks.measure import interleave, ratios

CYCLES_PER_S = 2e9
"""Upper bound of a GPU's clock rate, so that a sleep in cycles is at least as long as intended."""
TURN_S = 0.02
"""CPU-seconds of a turn: short calls are repeated, so that the clock resolves them."""
SETTLED, WARM_S = 0.05, 1.0
"""Turns are warm when two differ by less than this share, or after that many seconds."""
MOST_BUFFERS = 64
Results = Mapping[str, Tensor | Sequence[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way of doing the task.

    Attributes:
        name: in the result.
        open: takes one set of inputs and returns the call that does the whole task on it; copies
            what the call changes. A call returns its results by quantity.
        limits: the largest allowed errors, where they differ from the task's.
        skipped: the reason why it does not run here; `open` is then unused.
    """

    name: str
    open: Callable[[Any], Callable[[], Results]] = lambda _: dict
    limits: Mapping[str, float] = field(default_factory=dict)
    skipped: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What the best implementation of one call does."""

    flops: float = 0
    bytes: float = 0
    dtype: str = "fp32"
    """Of the operands of products."""


def relative_error(value: Tensor, truth: Tensor) -> float:
    """`||value - truth|| / ||truth||` in float64; a NaN or an infinity anywhere gives infinity."""
    value, truth = value.detach().double().cpu(), truth.detach().double().cpu()
    error = float((value - truth).norm() / truth.norm().clamp_min(1e-300))
    return error if error == error else float("inf")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the contenders do, on inputs of one shape.

    Attributes:
        inputs: makes a set of inputs from a seed.
        truth: the results for a set, in float64; those of the first rows alone are enough.
        contenders: including the subject.
        subject: name of the contender whose speed-ups over the others are reported.
        limits: the largest allowed error, by quantity.
        error: of a result relative to the truth.
        work: of one call of the subject.
        about: further fields of the result.
    """

    inputs: Callable[[int], Any]
    truth: Callable[[Any], Results]
    contenders: Sequence[Contender]
    subject: str
    limits: Mapping[str, float]
    error: Callable[[Tensor, Tensor], float] = relative_error
    work: Work = Work()
    about: Mapping[str, Any] = field(default_factory=dict)


def contest(task: Task, *, device: torch.device, rounds: int, seed: int = 0) -> dict[str, Any]:
    """Check, time and compare.

    Args:
        task: to do.
        device: of all contenders.
        rounds: timed turns of each.
        seed: of the first set of inputs.

    Returns:
        `errors` by contender; `skipped` and `failed` with reasons; `peak_bytes` that one call adds;
        `speedup` of the subject over each other contender that passed its check (median and
        quantiles 0.2 and 0.8); on CUDA `milliseconds` of the GPU, `host_ms` and `wall_ms`, on a CPU
        `cpu_ms`; `work` and `roofline`, the share that the subject reaches. Without a passing
        subject there is no `speedup`. Contenders that fail, by their check, an error or lack of
        memory, are reported and omitted.
    """
    skipped = {each.name: each.skipped for each in task.contenders if each.skipped}
    result: dict[str, Any] = {"errors": {}, "skipped": skipped, "failed": {}, "peak_bytes": {}}
    result |= {"speedup": {}, "subject": task.subject, **task.about}
    running = [each for each in task.contenders if not each.skipped]
    if task.subject in skipped:
        return result

    # Check each contender against its limits.
    first = task.inputs(seed)
    truth = task.truth(first)
    for each in tuple(running):
        gate = functools.partial(_gate, each, task, first, truth, result)
        if not _attempt(each.name, gate, result):
            running.remove(each)
    if task.subject not in {each.name for each in running}:
        return result

    # Measure the peak of one warm call, and open each contender on rotated inputs.
    sets = [first, *(task.inputs(seed + i) for i in range(1, buffers(first, device)))]
    calls: dict[str, list[Callable[[], object]]] = {}
    for each in running:
        opened = functools.partial(_open, each, sets, device)
        if (found := _attempt(each.name, opened, result)) is not None:
            calls[each.name], result["peak_bytes"][each.name] = found
    if task.subject not in calls:
        return result

    # Time the rest in turns.
    timed = {name: _timer(these, device) for name, these in calls.items()}
    for timer in timed.values():
        warm(timer)
    figures = interleave(timed, rounds=rounds)
    result |= _times(figures, calls, device)
    result["buffers"] = len(sets)
    result |= _roofline(task, statistics.median(figures[task.subject]), device)
    result["speedup"] = {
        name: {kind: round(value, 3) for kind, value in ratios(values, mine).items()}
        for mine in (figures[task.subject],)
        for name, values in figures.items()
        if name != task.subject
    }
    return result


def _gate(
    contender: Contender, task: Task, inputs: Any, truth: Results, result: dict[str, Any]
) -> bool:
    """Whether the errors of a contender are within their limits; they are added to the result."""
    found = contender.open(inputs)()
    errors = {name: _error(task, found[name], value) for name, value in truth.items()}
    result["errors"][contender.name] = {name: float(f"{e:.3g}") for name, e in errors.items()}
    limits = {**task.limits, **contender.limits}
    beyond = [
        f"{name} {error:.3g} > {limits[name]:.3g}"
        for name, error in errors.items()
        if not error <= limits[name]
    ]
    if beyond:
        result["failed"][contender.name] = ", ".join(beyond)
    return not beyond


def _error(task: Task, value: Tensor | Sequence[Tensor], truth: Tensor | Sequence[Tensor]) -> float:
    value, truth = (t if isinstance(t, Tensor) else flat(t) for t in (value, truth))
    return task.error(value[: len(truth)] if truth.dim() else value, truth)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All tensors as one vector, in float64."""
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def _open(
    contender: Contender, sets: Sequence[Any], device: torch.device
) -> tuple[list[Callable[[], object]], int]:
    calls: list[Callable[[], object]] = [contender.open(each) for each in sets]
    calls[0]()  # compile, tune, fill caches
    return calls, peak_bytes(calls[0], device)


def _times(
    figures: Mapping[str, list[float]],
    calls: Mapping[str, Sequence[Callable[[], object]]],
    device: torch.device,
) -> dict[str, Any]:
    """Medians in milliseconds."""
    found = {name: round(statistics.median(values) * 1e3, 4) for name, values in figures.items()}
    if device.type != "cuda":
        return {"cpu_ms": found}
    walls = {name: wall_and_host(these[0], device) for name, these in calls.items()}
    return {
        "milliseconds": found,
        "wall_ms": {name: round(wall * 1e3, 4) for name, (wall, _) in walls.items()},
        "host_ms": {name: round(host * 1e3, 4) for name, (_, host) in walls.items()},
    }


def _roofline(task: Task, seconds: float, device: torch.device) -> dict[str, Any]:
    """The work, and the share of the rates of the chip that the subject reaches."""
    work = {key: value for key, value in dataclasses.asdict(task.work).items() if value}
    if len(work) == 1:  # the dtype alone
        return {}
    found: dict[str, Any] = {"work": work}
    if device.type == "cuda":
        work["ms"] = round(seconds * 1e3, 4)
        if task.work.bytes:
            found["gb_per_s"] = round(task.work.bytes / seconds / 1e9, 1)
    if chip := chip_of(device, task.work.dtype):
        least = chip[1].roofline_s(task.work.flops, task.work.bytes, task.work.dtype)
        found["roofline"] = {"chip": chip[0], "share": float(f"{least / seconds:.3g}")}
        if device.type != "cuda":
            found["roofline"] |= {
                "flops_per_s": float(f"{max(chip[1].flops_per_s.values()):.3g}"),
                "bytes_per_s": float(f"{chip[1].bytes_per_s:.3g}"),
            }
    return found


def _attempt(name: str, action: Callable[[], Any], result: dict[str, Any]) -> Any:
    """The result of `action`; None, with the reason in `failed`, if it fails. An error inside CUDA
    is raised, because the process cannot continue.
    """
    try:
        return action()
    except (
        RuntimeError,
        ValueError,
        ImportError,
    ) as error:  # torch.OutOfMemoryError is a RuntimeError
        if "CUDA error" in str(error):
            raise
        traceback.print_exc(file=sys.stderr)
        result["failed"][name] = f"{type(error).__name__}: {str(error)[:200]}"
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None


def buffers(inputs: Any, device: torch.device) -> int:
    """Sets of inputs that together exceed twice the last-level cache, so that a call does not find
    its inputs there. On a GPU one is enough, because the cache is cleared before each call.
    """
    if device.type == "cuda":
        return 1
    return min(MOST_BUFFERS, 1 + 2 * cache_bytes() // max(1, nbytes(inputs)))


def nbytes(inputs: Any) -> int:
    """Bytes of the tensors and arrays in some nested lists and tuples."""
    if isinstance(inputs, Tensor | np.ndarray):
        return int(inputs.nbytes)
    return sum(map(nbytes, inputs)) if isinstance(inputs, list | tuple) else 0


@functools.cache
def cache_bytes() -> int:
    """Size of the last-level cache of the CPU; 32 MiB if the system does not report it."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text[:-1].isdigit():
            sizes.append(int(text[:-1]) << {"K": 10, "M": 20}.get(text[-1], 0))
    return max(sizes, default=32 << 20)


def no_compiler(options: Mapping[str, Any], device: torch.device) -> str:
    """Why a contender through torch.compile does not run; "" if it does."""
    if not options["compile"]:
        return "left out by compile=0"
    missing = device.type == "cpu" and shutil.which("g++") is None
    return "torch.compile needs a C++ compiler" if missing else ""


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


def warm(timer: Callable[[], float]) -> None:
    """Take turns until the times settle."""
    began, before = time.perf_counter(), timer()
    while time.perf_counter() - began < WARM_S:
        now = timer()
        if abs(now - before) <= SETTLED * before:
            return
        before = now


def _timer(calls: Sequence[Callable[[], object]], device: torch.device) -> Callable[[], float]:
    """Measures a turn: seconds of one call, on the inputs in rotation."""
    rotated = itertools.cycle(calls)
    if device.type != "cuda":
        return functools.partial(_cpu_seconds, rotated)
    _, host = wall_and_host(calls[0], device, calls=2)
    queued = min(0.5, 1.5 * host + 2e-4)
    return lambda: seconds_by_events(next(rotated), device, queued=queued)


def _cpu_seconds(calls: Iterator[Callable[[], object]]) -> float:
    """CPU-seconds of one of as many calls as a turn takes."""
    began, clock, count = time.process_time(), time.perf_counter(), 0
    while True:
        next(calls)()
        count += 1
        spent = time.process_time() - began
        if spent >= TURN_S or time.perf_counter() - clock >= 10 * TURN_S:
            return spent / count
