"""From a config to live objects: the choices that depend on this machine, each made in one place."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import numpy
import torch

import fastmoco
from fastmoco.config import Config
from fastmoco.distributed.mesh import World
from fastmoco.evaluation.monitor import KnnMonitor
from fastmoco.models.vit import ARCHITECTURES
from fastmoco.objectives import MoCoV3
from fastmoco.optim.adamw import build_adamw
from fastmoco_pipelines import Loader, SyntheticLoader, build_loader


def share_cores(config: Config) -> int:
    """Set torch's CPU threads for this process; several processes on one machine share its cores.

    Returns:
        The number of threads.
    """
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = config.threads or max(1, len(os.sched_getaffinity(0)) // local_processes)
    torch.set_num_threads(threads)
    return threads


def choose_precision(
    precision: Literal["auto", "bf16", "fp32", "fp64"], device: torch.device
) -> Literal["bf16", "fp32", "fp64"]:
    """What ``precision`` means on a device: ``auto`` takes bf16 only where the hardware multiplies it natively."""
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            # Older torch cannot be asked; fp32 is right everywhere.
            ask: Callable[[], Mapping[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
            known = ask()
            native = any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        return "bf16" if native else "fp32"
    return precision


def build_objective(config: Config, device: torch.device) -> MoCoV3:
    """Encoder, twin and heads of a config, initialised from its seed: the same numbers on every rank and device."""
    torch.manual_seed(config.seed)
    model = config.model
    build_encoder = partial(ARCHITECTURES[model.architecture], image_size=model.image_size, patch_size=model.patch_size)
    objective = MoCoV3(
        build_encoder,
        projection_dim=model.projection_dim,
        hidden_dim=model.hidden_dim,
        temperature=config.objective.temperature,
    )
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    return objective.to(device, dtype)


def build_optimizer(config: Config, objective: MoCoV3) -> torch.optim.AdamW:
    """AdamW over the objective's trainable parameters; the trainer sets the learning rate of every step."""
    optim = config.optim
    return build_adamw(
        objective.named_parameters(), lr=0.0, weight_decay=optim.weight_decay, betas=optim.betas, eps=optim.eps
    )


def data_device(config: Config, world: World) -> Literal["cpu", "gpu"]:
    """Where DALI works: beside the model unless the config says otherwise."""
    if config.data.device == "auto":
        return "gpu" if world.device.type == "cuda" else "cpu"
    return config.data.device


def build_train_loader(config: Config, world: World, *, threads: int, start_step: int = 0) -> Loader | SyntheticLoader:
    """The loader of a config, about to deliver the batch of ``start_step``.

    Raises:
        ValueError: if ``data.shards`` is not given.
    """
    if config.data.synthetic:
        spec = config.loader_spec(device="cpu", threads=1)
        return SyntheticLoader(
            spec, rank=world.rank, world_size=world.world_size, device=world.device, start_step=start_step
        )
    device = data_device(config, world)
    spec = config.loader_spec(device=device, threads=config.data.threads or threads)
    device_id = world.device.index if device == "gpu" else None
    return build_loader(spec, rank=world.rank, world_size=world.world_size, device_id=device_id, start_step=start_step)


def build_knn(config: Config, world: World, *, threads: int) -> KnnMonitor | None:
    """The kNN monitor that a config asks for; None without held-out shards or without an interval."""
    if not config.knn.test_shards or config.knn.every_epochs == 0:
        return None
    return KnnMonitor(
        config,
        world,
        threads=config.data.threads or threads,
        device=data_device(config, world),
        precision=choose_precision(config.precision, world.device),
    )


def versions() -> dict[str, str]:
    """Versions that a run's numbers depend on."""
    found = {
        "fastmoco": fastmoco.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": str(numpy.__version__),
    }
    try:
        import nvidia.dali as dali

        found["dali"] = str(dali.__version__)
    except ImportError:
        pass
    return found
