"""`fastmoco profile`: some steps of a run, measured by part and traced.

Steps are measured three times, because each way of looking costs time of its own: by the marks
alone (times), by torch's profiler (the trace, kernels, waits), and under a counter of operators
(on a CPU). Loader, logging and skipping of bad steps are those of a run; nothing is evaluated or
saved.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmoco.config import Config
from fastmoco.distributed.mesh import World
from fastmoco.errors import EXIT_STOPPED
from fastmoco.objectives.interface import Coupling
from fastmoco.optim.averaged import AveragedOptimizer, SweptAdamW
from fastmoco.planning.costs import part_flops
from fastmoco.training.profiling.counting import StepCounter
from fastmoco.training.profiling.events import TracedParts, by_part
from fastmoco.training.setup import versions
from fastmoco.training.short_run import peak_bytes, settle, short_run
from fastmoco.training.trainer import Trainer
from fastmoco_kernels import LARS
from fastmoco_kernels.adamw_ema.op import bytes_moved as adamw_bytes
from fastmoco_kernels.ema.op import bytes_moved as ema_bytes
from fastmoco_kernels.info_nce import cost as loss_cost
from fastmoco_kernels.lars.op import lars_bytes
from fastmoco_pipelines import Loader
from fastmoco_pipelines.files.small import open_regular
from fastmoco_pipelines.loading.step_parts import (
    EMA,
    LOSS,
    OPTIMIZER,
    PARTS,
    TRANSFER,
    PartFigures,
    collecting,
)

WARM_UP = 3
"""Steps before the measured ones: they compile, create the optimizer's state and fill caches."""
TRACED = 3
"""Steps in the trace."""
LARGEST = 15
"""Operators that are listed."""
REST = "rest"
"""What is in no part: waiting for the loader, the loop itself, threads without marks."""


@dataclass(kw_only=True)
class PartRow:
    """One part of a step; figures are by step. None: not known, or does not exist on this device.

    Attributes:
        cpu_ms: processor milliseconds.
        wall_ms: milliseconds from its start to its end on its thread.
        device_ms: milliseconds of its kernels on a GPU.
        share: of the processor time of the step; on a GPU of the kernels' time.
        flops: of products, convolutions and attention.
        bytes: that must be moved, where a cost model knows them.
        calls: kernel launches; on a CPU calls of operators.
        waits: calls for which the host waits for the device; on a CPU those that would, and None
            where blocks are compiled.
    """

    cpu_ms: float
    wall_ms: float
    share: float
    device_ms: float | None = None
    flops: float | None = None
    bytes: float | None = None
    calls: float | None = None
    waits: float | None = None

    def per_s(self, amount: float | None) -> float | None:
        """An amount of a step by second of this part."""
        spent = self.cpu_ms if self.device_ms is None else self.device_ms
        return amount / spent * 1e3 if amount is not None and spent > 0 else None


@dataclass(kw_only=True)
class StepProfile:
    """What `profile_steps` has found. Figures are by step.

    Attributes:
        recipe: name of the recipe.
        device: name of the GPU, or "cpu".
        precision: of the products.
        images: of a step.
        steps: that were measured.
        threads: of torch on the CPU.
        parts: in the order of a step, `REST` at the end.
        step_ms: from one step to the next.
        cpu_ms: processor time of the whole process.
        images_per_s: by wall time.
        images_per_cpu_s: by processor time.
        wait_share: of the time that the trainer waited for the loader.
        peak_bytes: of the device; on a CPU the largest resident set.
        recompilations: graphs that were compiled during the measured steps.
        growth: from the first to the last measured step: bytes and number of live tensors, resident
            bytes, and on a GPU requested and reserved bytes of torch's allocator.
        waits: what waited, by part and, on a CPU, name, in one step; None where it is not known.
        top: operators (on a GPU kernels) by time: name, milliseconds and calls.
        counted: how `calls` and `waits` were counted.
        chosen: batch plan, attention, optimizer, and whether blocks are compiled.
        versions: of the libraries.
    """

    recipe: str
    device: str
    precision: str
    images: int
    steps: int
    threads: int
    parts: dict[str, PartRow]
    step_ms: float
    cpu_ms: float
    images_per_s: float
    images_per_cpu_s: float
    wait_share: float
    peak_bytes: int
    recompilations: int
    growth: dict[str, int]
    waits: dict[str, float] | None
    top: list[tuple[str, float, float]]
    counted: str
    chosen: dict[str, str]
    versions: dict[str, str] = field(default_factory=versions)

    def to_json(self) -> dict[str, Any]:
        """Values of JSON, with the rates of each part."""
        found = asdict(self)
        for name, row in self.parts.items():
            rates = {"flops_per_s": row.per_s(row.flops), "bytes_per_s": row.per_s(row.bytes)}
            found["parts"][name] |= rates
        found["top"] = [{"name": name, "ms": ms, "calls": calls} for name, ms, calls in self.top]
        return found


def profile_steps(
    config: Config, world: World, *, steps: int, warm_up: int = WARM_UP, trace: Path | None = None
) -> StepProfile:
    """Train some steps of a config and measure them by part.

    Args:
        config: of the run. Evaluations are left out, and nothing is saved.
        world: this process, which must be the only one.
        steps: that are measured, at least 1.
        warm_up: steps before them, at least 1.
        trace: file for a Chrome trace of the last steps, compressed where it ends in `.gz`; None:
            they are traced for the figures alone.

    Raises:
        ValueError: for a config that is refused, or a run with fewer steps.
    """
    traced = min(steps, TRACED)
    with short_run(config, world) as trainer:
        needed = warm_up + steps + traced + 2
        total = trainer.resolved.total_steps
        if needed > total:
            raise ValueError(
                f"steps={steps}: this run has {total} steps, and a profile takes {needed}, "
                "with those that warm up and those of the trace; take more --epochs"
            )
        _train(trainer, warm_up)
        measured = _measured(trainer, steps)
        seen = _traced(trainer, traced, trace)
        counter = _counted(trainer)
    return _assembled(trainer.config, trainer, measured, seen, counter, steps=steps, traced=traced)


def _train(trainer: Trainer, steps: int) -> None:
    """Train some steps. A signal that would stop a run ends the profile."""
    if trainer.run(steps) == EXIT_STOPPED:
        raise KeyboardInterrupt


@dataclass(slots=True)
class _Measured:
    """Some steps by the marks alone; sums over them."""

    parts: Mapping[str, PartFigures]
    wall_s: float
    cpu_s: float
    wait_s: float
    recompilations: int
    growth: dict[str, int]
    peak_bytes: int


def _measured(trainer: Trainer, steps: int) -> _Measured:
    device = trainer.world.device
    on_cpu = device.type == "cpu"

    # On a CPU from one moment at which the loader is idle to another: it makes as many batches as
    # are trained on, whose processor time counts.
    settle(trainer, loader=on_cpu)
    before, compiled = memory(device), _graphs()
    waited = trainer.loader.figures().wait_s
    with collecting(helpers=torch.get_num_threads() == 1) as collector:
        _train(trainer, steps)
        settle(trainer, loader=False)
        wall_s = collector.wall_s
        settle(trainer, loader=on_cpu)
        refilled_s = collector.wall_s - wall_s
        cpu_s, parts = collector.cpu_s, collector.figures()
    wait_s = trainer.loader.figures().wait_s - waited

    # The loader had batches ahead, which it has made again after the last step. A trainer that
    # waits for it would have waited for them too; to another one they take no time.
    wall_s += min(refilled_s, wait_s)
    after = memory(device)
    return _Measured(
        parts=parts,
        wall_s=wall_s,
        cpu_s=cpu_s,
        wait_s=wait_s,
        recompilations=_graphs() - compiled,
        growth={name: after[name] - value for name, value in before.items()},
        peak_bytes=peak_bytes(device),
    )


def _traced(trainer: Trainer, steps: int, trace: Path | None) -> TracedParts:
    """Some steps under torch's profiler."""
    device = trainer.world.device
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    every_thread = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with (
        torch.profiler.profile(
            activities=activities, acc_events=True, experimental_config=every_thread
        ) as profiler,
        collecting(ranges=True),
    ):
        _train(trainer, steps)
        settle(trainer, loader=False)
    if trace is not None:
        with tempfile.TemporaryDirectory(prefix=".trace-", dir=trace.parent) as folder:
            fresh = Path(folder) / trace.name  # whose ending compresses it
            profiler.export_chrome_trace(str(fresh))
            fresh.replace(trace)
    return by_part(profiler.events(), LARGEST)


def _counted(trainer: Trainer) -> StepCounter | None:
    """One step under a counter of operators, if possible one that is not logged; None where the
    profiler's figures are better."""
    if (trainer.step_count + 1) % trainer.config.log_every_steps == 0:
        _train(trainer, 1)
    if trainer.world.device.type != "cpu" or trainer.forward_backward.compile.compiled:
        return None
    with collecting() as collector, StepCounter(collector) as counter:
        _train(trainer, 1)
    return counter


def _assembled(
    config: Config,
    trainer: Trainer,
    measured: _Measured,
    seen: TracedParts,
    counter: StepCounter | None,
    *,
    steps: int,
    traced: int,
) -> StepProfile:
    """The figures by part and step."""
    device = trainer.world.device
    on_gpu = device.type == "cuda"
    images = trainer.resolved.local_batch_size
    flops, moved = _flops(config, trainer), _bytes(trainer)

    # Calls and waits: those of a step, by part.
    waits: dict[str, float] | None = None
    named: dict[str, float] | None = None
    if counter is not None:
        calls: dict[str, float] = dict(counter.by_part(counter.operators))
        waits = dict(counter.by_part(counter.waits))
        named = {f"{part or REST}: {name}": count for (part, name), count in counter.waits.items()}
        counted = "operators that do work, in one step that is not logged"
    else:
        found = seen.launches if on_gpu else seen.operators
        calls = {part: count / traced for part, count in found.items()}
        if on_gpu:  # torch's profiler sees no waits on a CPU
            waits = {part: count / traced for part, count in seen.waits.items()}
            named = {part or REST: count for part, count in waits.items() if count}
        counted = (
            "kernels, copies and fills, log steps included"
            if on_gpu
            else "innermost operators in the trace"
        )

    # A row for each part; what is in none is the rest.
    busy_ms = sum(seen.device_ms.values()) / traced
    rows: dict[str, PartRow] = {}
    names = [name for name in PARTS if name in measured.parts or name in calls]
    for name in names:
        own = measured.parts.get(name, PartFigures())
        device_ms = seen.device_ms.get(name, 0.0) / traced if on_gpu else None
        whole, part = (measured.cpu_s, own.cpu_s) if device_ms is None else (busy_ms, device_ms)
        rows[name] = PartRow(
            cpu_ms=1e3 * own.cpu_s / steps,
            wall_ms=1e3 * own.wall_s / steps,
            share=part / whole if whole > 0 else 0.0,
            device_ms=device_ms,
            flops=flops.get(name),
            bytes=moved.get(name),
            calls=calls.get(name, 0.0),
            waits=waits.get(name, 0.0) if waits is not None else None,
        )
    cpu_s = max(0.0, measured.cpu_s - sum(own.cpu_s for own in measured.parts.values()))
    rows[REST] = PartRow(
        cpu_ms=1e3 * cpu_s / steps,
        wall_ms=1e3 * measured.wait_s / steps,
        share=max(0.0, 1.0 - sum(row.share for row in rows.values())),
        device_ms=seen.device_ms.get("", 0.0) / traced if on_gpu else None,
        calls=calls.get("", 0.0),
        waits=waits.get("", 0.0) if waits is not None else None,
    )

    chosen = trainer.forward_backward
    return StepProfile(
        recipe=config.recipe,
        device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
        precision=trainer.precision,
        images=images,
        steps=steps,
        threads=torch.get_num_threads(),
        parts=rows,
        step_ms=1e3 * measured.wall_s / steps,
        cpu_ms=1e3 * measured.cpu_s / steps,
        images_per_s=images * steps / measured.wall_s,
        images_per_cpu_s=images * steps / measured.cpu_s,
        wait_share=measured.wait_s / measured.wall_s,
        peak_bytes=measured.peak_bytes,
        recompilations=measured.recompilations,
        growth=measured.growth,
        waits=named,
        top=[(name, ms / traced, count / traced) for name, ms, count in seen.top],
        counted=counted,
        chosen={
            "batch": str(chosen.plan),
            "blocks": str(chosen.compile),
            "attention": str(trainer.attention),
            "optimizer": type(trainer.optimizer.inner).__name__,
        },
    )


def _flops(config: Config, trainer: Trainer) -> dict[str, float]:
    """FLOPs of a step by part, as they are computed."""
    plan, images = trainer.forward_backward.plan, trainer.resolved.local_batch_size
    again = 0
    if plan.chunk and trainer.objective.coupling is not Coupling.NONE:
        again = max(0, images - plan.kept_images)
    return part_flops(
        config,
        trainer.precision,
        images,
        attention=trainer.attention.backend,
        images_twice=0 if plan.lean else again,
        images_lean=again if plan.lean else 0,
        phase=trainer.objective.phase(trainer.progress(trainer.step_count)),
    )


def _bytes(trainer: Trainer) -> dict[str, float]:
    """Bytes that a step must move, of the parts that have a cost model."""
    images, device = trainer.resolved.local_batch_size, trainer.world.device
    found: dict[str, float] = {}
    trained = [p for p in trainer.objective.parameters() if p.requires_grad]
    averages = trainer.objective.averages()
    averaged = sum(p.numel() for p in averages if p.requires_grad)
    swept = isinstance(trainer.optimizer, SweptAdamW)
    update = _update_bytes(trainer.optimizer, trained, averaged if swept else 0)
    if update is not None:
        # The norms of the gradients read them once more.
        found[OPTIMIZER] = update + sum(p.nbytes for p in trained)
    if averaged and not swept:
        found[EMA] = ema_bytes(averaged)
    spec = trainer.loader.spec
    if device.type == "cuda" and spec.device == "cpu" and isinstance(trainer.loader, Loader):
        size = 1 if spec.view_dtype == "uint8" else 4
        found[TRANSFER] = size * images * sum(3 * view.size**2 for view in spec.each_view)
    if trainer.config.objective.kind == "moco_v3":
        width = trainer.config.model.projection_dim
        found[LOSS] = loss_cost.bytes_moved(images, images, width, directions=2)
    return found


def _update_bytes(
    optimizer: AveragedOptimizer, trained: list[torch.nn.Parameter], averaged: int
) -> float | None:
    """Of the update of the weights alone, unless averages are `averaged` in the same sweep."""
    if isinstance(optimizer.inner, LARS):
        return lars_bytes(trained)
    if "adam" in type(optimizer.inner).__name__.lower():
        return adamw_bytes(sum(p.numel() for p in trained), averaged=averaged)
    return None


def _graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    utils = sys.modules.get("torch._dynamo.utils")
    return int(utils.counters["stats"]["unique_graphs"]) if utils is not None else 0


def memory(device: torch.device) -> dict[str, int]:
    """What is allocated at a moment between two steps, by name (`StepProfile.growth`)."""
    gc.collect()
    storages = {}
    for value in gc.get_objects():
        with contextlib.suppress(Exception):  # an object that is half made, or without a storage
            if issubclass(type(value), Tensor) and value.device == device:
                storage = value.untyped_storage()
                if storage.device.type == device.type:  # that of a fake tensor is on none
                    storages[storage._cdata] = storage.nbytes()
    found = {"tensors": len(storages), "tensor_bytes": sum(storages.values())}
    if (resident := _resident_bytes()) is not None:
        found["resident_bytes"] = resident
    if device.type == "cuda":
        statistics = torch.cuda.memory_stats(device)
        found["requested_bytes"] = statistics.get("requested_bytes.all.current", 0)
        found["reserved_bytes"] = statistics.get("reserved_bytes.all.current", 0)
    return found


def _resident_bytes(statm: Path = Path("/proc/self/statm")) -> int | None:
    """Memory of this process; None where the system does not report it."""
    try:
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[None]:
    """The console lines of the trained steps go to a file, which may not be a link.

    Raises:
        UnfitFileError, OSError: if it cannot be opened.
    """
    descriptor = open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, follow=False)
    with open(descriptor, "w") as file, contextlib.redirect_stdout(file):
        yield
