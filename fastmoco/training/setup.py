"""Build loaders and monitors from a config: each choice that depends on this machine, once."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy
import torch

import fastmoco
from fastmoco.config import Config, Resolved
from fastmoco.config.launched import local_processes
from fastmoco.distributed.mesh import World
from fastmoco.evaluation.accuracy import AccuracyMonitor
from fastmoco.evaluation.interface import Monitor
from fastmoco.evaluation.monitor import KnnMonitor
from fastmoco.objectives.interface import Objective
from fastmoco.optim.averaged import AveragedOptimizer
from fastmoco.optim.build import name_of
from fastmoco.planning.duration import cpu_flops_per_s, estimate, slow_notes
from fastmoco.planning.free_memory import free_bytes
from fastmoco_kernels.attention.choice import AttentionChoice
from fastmoco_pipelines import Loader, LoaderSpec, SyntheticLoader, build_loader
from fastmoco_pipelines.loading.memory import loader_bytes
from fastmoco_pipelines.sampling.order import ORDER_VERSION
from fastmoco_pipelines.spec import Device
from fastmoco_pipelines.text import redact
from fastmoco_pipelines.views.runtime import WITHOUT_DALI, dali_version, has_dali


def share_cores(config: Config) -> int:
    """Set the number of torch's CPU threads; the processes on one machine share its cores.

    A process alone on its machine takes no more than `OMP_NUM_THREADS` says. For several, torchrun
    sets that variable to 1 itself, so it is no wish of the user.

    Returns:
        The number of threads.
    """
    processes = local_processes(os.environ)
    share = max(1, len(os.sched_getaffinity(0)) // processes)
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if processes == 1 and asked.isdigit() and int(asked[:9]):
        share = min(share, int(asked))
    threads = config.threads or share
    torch.set_num_threads(threads)
    return threads


def data_device(config: Config, world: World) -> Device:
    """Device of DALI: by default that of the model."""
    if config.data.device == "auto":
        return "gpu" if world.device.type == "cuda" else "cpu"
    return config.data.device


def loader_spec(config: Config, world: World, *, threads: int) -> LoaderSpec:
    """The spec of the training loader on this machine.

    If the model is on a GPU, views are uint8 by default, and the step normalises each micro-batch.

    Raises:
        ValueError: if `data.shards` is missing and the images are not synthetic.
    """
    device = "cpu" if config.data.synthetic else data_device(config, world)
    spec = config.loader_spec(device=device, threads=config.data.threads or threads)
    wanted = config.data.view_dtype
    if wanted == "auto":
        wanted = "uint8" if world.device.type == "cuda" else "float32"
    return replace(spec, view_dtype=wanted)


def reserved_bytes(world: World, loader: Loader | SyntheticLoader) -> float:
    """Bytes of the model's device that a plan must leave free for the loader.

    The batch in use is not included, because the plan counts it. The batch of a synthetic loader is
    allocated already, so its size is subtracted: the result is negative.
    """
    held = loader_bytes(loader.spec, world.world_size)
    if isinstance(loader, SyntheticLoader):
        return -float(held.batch_bytes)
    on_gpu = world.device.type == "cuda"
    return float(held.beside_batch_bytes) if on_gpu == (loader.spec.device == "gpu") else 0.0


def build_train_loader(
    config: Config,
    world: World,
    *,
    threads: int,
    start_step: int = 0,
    shuffle_window: int | None = None,
    order_version: int = ORDER_VERSION,
    quarantine_list: Path | None = None,
) -> Loader | SyntheticLoader:
    """Build the training loader of a config. Its first batch is that of `start_step`.

    Args:
        config: of the run.
        world: this process's rank and device.
        threads: of DALI, unless the config sets them.
        start_step: step of the first batch.
        shuffle_window: the window that the run started with, used unless the config sets one.
        order_version: of the order of the images that the run started with.
        quarantine_list: the run's list of bad images.

    Raises:
        ValueError: if `data.shards` is missing.
    """
    if config.data.synthetic:
        spec = loader_spec(config, world, threads=1)
        return SyntheticLoader(
            spec,
            rank=world.rank,
            world_size=world.world_size,
            device=world.device,
            start_step=start_step,
            order_version=order_version,
        )
    spec = loader_spec(config, world, threads=threads)
    device = spec.device
    if spec.shuffle_window is None:
        spec = replace(spec, shuffle_window=shuffle_window)
    device_id = world.device.index if device == "gpu" else None
    return build_loader(
        spec,
        rank=world.rank,
        world_size=world.world_size,
        device_id=device_id,
        start_step=start_step,
        quarantine_list=quarantine_list,
        pin_memory=world.device.type == "cuda",
        begin=False,
        order_version=order_version,
    )


def build_monitors(
    config: Config,
    world: World,
    *,
    threads: int,
    precision: str,
    quarantine_list: Path | None = None,
    scratch: Path | None = None,
) -> list[Monitor]:
    """Build the evaluations that a config has during training.

    Args:
        config: of the run.
        world: this process's rank and device.
        threads: of DALI, unless the config sets them.
        precision: of the encoder: "bf16", "fp32" or "fp64".
        quarantine_list: the run's list of bad images.
        scratch: folder for temporary files; None: that of `TMPDIR`.
    """
    knn = build_knn(
        config,
        world,
        threads=threads,
        precision=precision,
        quarantine_list=quarantine_list,
        scratch=scratch,
    )
    accuracy = build_accuracy(
        config, world, threads=threads, precision=precision, quarantine_list=quarantine_list
    )
    return [monitor for monitor in (knn, accuracy) if monitor is not None]


def build_knn(
    config: Config,
    world: World,
    *,
    threads: int,
    precision: str,
    quarantine_list: Path | None = None,
    scratch: Path | None = None,
) -> KnnMonitor | None:
    """Build the kNN monitor; None without held-out shards or without an interval.

    Features of a set that would take more than half of the memory that is free when it is measured,
    divided among the processes of this machine, are in a temporary file in `scratch`.
    """
    if not _has_knn(config):
        return None
    return KnnMonitor(
        config,
        world,
        threads=config.data.threads or threads,
        device=data_device(config, world),
        precision=precision,
        quarantine_list=quarantine_list,
        memory_bytes=half_of_free_memory,
        scratch=scratch,
    )


def build_accuracy(
    config: Config,
    world: World,
    *,
    threads: int,
    precision: str,
    quarantine_list: Path | None = None,
) -> AccuracyMonitor | None:
    """Build the monitor of the accuracy; None for a run that learns no classes, without held-out
    shards or without an interval.

    Raises:
        ValueError: if `accuracy.test_shards` is given for a run that learns no classes.
    """
    own = config.accuracy
    if config.objective.label_count is None:
        if own.test_shards:
            raise ValueError(
                f"accuracy.test_shards={redact(own.test_shards)!r}: {config.objective.kind} learns "
                "no classes; give --knn.test-shards, or fine-tune the run: fastmoco eval finetune"
            )
        return None
    if not (own.test_shards or config.knn.test_shards) or own.every_epochs == 0:
        return None
    return AccuracyMonitor(
        config,
        world,
        threads=config.data.threads or threads,
        device=data_device(config, world),
        precision=precision,
        quarantine_list=quarantine_list,
    )


def _has_knn(config: Config) -> bool:
    return bool(config.knn.test_shards) and config.knn.every_epochs > 0


def half_of_free_memory(device: torch.device | None = None) -> int | None:
    """Bytes of a device, None: of the host, for this process; None if the system does not report
    it."""
    try:
        return free_bytes(device or torch.device("cpu")) // 2
    except ValueError:
        return None


def describe(
    resolved: Resolved,
    world: World,
    precision: str,
    attention: AttentionChoice,
    plan: Mapping[str, Any],
    optimizer: AveragedOptimizer,
) -> dict[str, Any]:
    """The values that a config resolved to on this machine, for `config.json` and checkpoints."""
    return {
        **asdict(resolved),
        "precision": precision,
        "attention": asdict(attention),
        "chunk": plan["chunk"],
        "plan": dict(plan),
        "optimizer": name_of(optimizer),
        "device": world.device.type,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def decoder_note(config: Config) -> str | None:
    """What to tell the user about the decoder: that Pillow decodes, where DALI is not installed."""
    return None if config.data.synthetic or has_dali() else WITHOUT_DALI


def duration_notes(
    config: Config,
    world: World,
    resolved: Resolved,
    objective: Objective,
    precision: str,
    *,
    monitors: Sequence[Monitor],
    steps_left: int,
) -> list[str]:
    """What to tell the user of a CPU before a slow run; empty for a fast one, and on a GPU.

    Args:
        config: of the run.
        world: this process's rank and device.
        resolved: of the run.
        objective: of the run.
        precision: of the run.
        monitors: evaluations of the run; the first step waits for one measurement of each.
        steps_left: steps that the run has still to do.
    """
    if world.device.type != "cpu" or not steps_left:
        return []
    dtype = {"bf16": torch.bfloat16, "fp64": torch.float64}.get(precision, torch.float32)
    duration = estimate(
        config,
        objective,
        images=resolved.local_batch_size,
        knn_images=sum(monitor.images for monitor in monitors) // world.world_size,
        flops_per_s=cpu_flops_per_s(objective.encoder.embed_dim, dtype),
    )
    return slow_notes(duration, config, resolved, steps_left=steps_left)


def versions() -> dict[str, str]:
    """Versions of the libraries that affect the numbers of a run."""
    found = {
        "fastmoco": fastmoco.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": str(numpy.__version__),
    }
    if (dali := dali_version()) is not None:
        found["dali"] = dali
    if "torchao" in sys.modules:  # imported only if a model uses it
        found["torchao"] = importlib.metadata.version("torchao")
    return found
