"""From a config to live objects: the choices that depend on this machine, each made in one place."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import fastmoco
from fastmoco.config import Config, Resolved
from fastmoco.distributed.mesh import World
from fastmoco.evaluation.monitor import KnnMonitor
from fastmoco.models import float8, float8_inference
from fastmoco.models.blocks import Block
from fastmoco.models.vit import ARCHITECTURES, VisionTransformer
from fastmoco.objectives import MoCoV3
from fastmoco.optim import build_adamw, build_adamw_ema, build_apex, build_lars
from fastmoco_kernels.attention.choice import AttentionChoice, choose_attention
from fastmoco_kernels.backends import triton_is_default
from fastmoco_pipelines import Loader, LoaderSpec, SyntheticLoader, build_loader
from fastmoco_pipelines.memory import loader_bytes


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
    """Encoder, twin and heads of a config, initialised from its seed: the same numbers on every rank and device.

    Raises:
        ValueError: if the device does not multiply as the config says, or that would lose.
    """
    for name in ("linears", "momentum_linears"):
        if getattr(config.model, name) == "float8":
            float8.require_support(device, choose_precision(config.precision, device), field=f"model.{name}")
    torch.manual_seed(config.seed)
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    return build_model(config).to(device, dtype)


def build_model(config: Config) -> MoCoV3:
    """Encoder, twin and heads of a config as torch's current seed, device and dtype make them."""
    model = config.model
    build_encoder = partial(
        ARCHITECTURES[model.architecture],
        image_size=model.image_size,
        patch_size=model.patch_size,
        attention=model.attention,
    )
    objective = MoCoV3(
        build_encoder,
        projection_dim=model.projection_dim,
        hidden_dim=model.hidden_dim,
        temperature=config.objective.temperature,
    )
    objective.encoder.recompute(model.checkpointing)
    for encoder in (objective.encoder, objective.momentum_encoder):
        # Float8 layers of a momentum encoder are modules, which a fused block would pass by.
        ours = model.blocks == "fused" and (encoder is objective.encoder or model.momentum_linears == "native")
        for block in encoder.blocks:
            assert isinstance(block, Block)
            block.fused = ours
    if model.linears == "float8":
        for encoder in (objective.encoder, objective.momentum_encoder):
            float8.require_gain(encoder)
            float8.use_float8_(encoder)
    if model.momentum_linears == "float8":
        float8_inference.require_gain(objective.momentum_encoder)
        float8_inference.use_float8_inference_(objective.momentum_encoder)
    return objective


def attention_choice(
    config: Config, encoder: VisionTransformer, precision: str, device: torch.device
) -> AttentionChoice:
    """Who computes attention in a run, and why.

    Raises:
        ValueError: if the config names a backend that does not run here: with what it lacks and the cure.
    """
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[precision]
    block = encoder.blocks[0]
    assert isinstance(block, Block)
    tokens = encoder.pos_embed.shape[1]
    head_dim = encoder.embed_dim // block.attn.num_heads
    return choose_attention(device, dtype, tokens, tokens, head_dim, backend=config.model.attention)


def choose_optimizer_backend(
    config: Config, device: torch.device, *, sharded: bool = False
) -> Literal["torch", "fastmoco", "apex"]:
    """What ``optim.fused_backend`` means on a device: ``auto`` takes the sweep where it is one kernel, torch's elsewhere.

    On shards too: torch's plans every call anew for them, which takes the host longer than the step takes a GPU.
    """
    optim = config.optim
    if optim.fused_backend != "auto":
        return optim.fused_backend
    return "fastmoco" if optim.name == "lars" or sharded or triton_is_default(device) else "torch"


def build_optimizer(config: Config, objective: MoCoV3) -> torch.optim.Optimizer:
    """The optimizer of the objective's trainable parameters; the trainer sets the learning rate of every step.

    Raises:
        ValueError: if apex is asked for and cannot serve.
    """
    optim = config.optim
    named = list(objective.named_parameters())
    lr, decay = 0.0, optim.weight_decay
    if optim.name == "lars":
        momentum, trust = optim.sgd_momentum, optim.trust_coefficient
        return build_lars(named, lr=lr, weight_decay=decay, sgd_momentum=momentum, trust_coefficient=trust)
    sharded = any(isinstance(parameter, DTensor) for _, parameter in named)
    backend = choose_optimizer_backend(config, named[0][1].device, sharded=sharded)
    if backend == "apex":
        return build_apex(optim.name, named, lr=lr, weight_decay=decay, betas=optim.betas, eps=optim.eps)
    if backend == "fastmoco":
        own, twins = objective.encoder.parameters(), objective.momentum_encoder.parameters()
        averages: dict[Tensor, Tensor] = dict(zip(own, twins, strict=True))
        return build_adamw_ema(named, averages, lr=lr, weight_decay=decay, betas=optim.betas, eps=optim.eps)
    return build_adamw(named, lr=lr, weight_decay=decay, betas=optim.betas, eps=optim.eps)


def name_of(optimizer: torch.optim.Optimizer) -> str:
    """Whose optimizer it is: ``torch AdamW``, ``fastmoco_kernels LARS``."""
    return f"{type(optimizer).__module__.partition('.')[0]} {type(optimizer).__name__}"


def data_device(config: Config, world: World) -> Literal["cpu", "gpu"]:
    """Where DALI works: beside the model unless the config says otherwise."""
    if config.data.device == "auto":
        return "gpu" if world.device.type == "cuda" else "cpu"
    return config.data.device


def loader_spec(config: Config, world: World, *, threads: int) -> LoaderSpec:
    """What the training loader of a config delivers here: beside a GPU, levels, which the step normalises by chunks.

    Raises:
        ValueError: if ``data.shards`` is not given, and the images are not synthetic.
    """
    device = "cpu" if config.data.synthetic else data_device(config, world)
    spec = config.loader_spec(device=device, threads=config.data.threads or threads)
    wanted = config.data.view_dtype
    if wanted == "auto":
        wanted = "uint8" if world.device.type == "cuda" else "float32"
    return replace(spec, view_dtype=wanted)


def reserved_bytes(world: World, loader: Loader | SyntheticLoader) -> float:
    """Bytes of the model's device that a plan of the step must leave to the loader, beside the batch that is in use.

    The batch of a synthetic loader, which a plan counts, lies there already: less than nothing.
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
    quarantine_list: Path | None = None,
) -> Loader | SyntheticLoader:
    """The loader of a config, about to deliver the batch of ``start_step``.

    Args:
        config: the run.
        world: this process among those that train.
        threads: of DALI, where the config does not say.
        start_step: step of the first batch.
        shuffle_window: what the run began with, for a config that leaves it open.
        quarantine_list: the run's list of bad images.

    Raises:
        ValueError: if ``data.shards`` is not given.
    """
    if config.data.synthetic:
        spec = loader_spec(config, world, threads=1)
        return SyntheticLoader(
            spec, rank=world.rank, world_size=world.world_size, device=world.device, start_step=start_step
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
    )


def build_knn(config: Config, world: World, *, threads: int, quarantine_list: Path | None = None) -> KnnMonitor | None:
    """The kNN monitor that a config asks for; None without held-out shards or without an interval."""
    if not config.knn.test_shards or config.knn.every_epochs == 0:
        return None
    return KnnMonitor(
        config,
        world,
        threads=config.data.threads or threads,
        device=data_device(config, world),
        precision=choose_precision(config.precision, world.device),
        quarantine_list=quarantine_list,
    )


def describe(
    resolved: Resolved,
    world: World,
    precision: str,
    attention: AttentionChoice,
    plan: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
) -> dict[str, Any]:
    """What a config came to on this machine, for ``config.json`` and checkpoints."""
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
    if "torchao" in sys.modules:  # there only where a model multiplies with it
        found["torchao"] = importlib.metadata.version("torchao")
    return found
