"""From a config to an optimizer: who offers it, and on which device."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastmoco.config import Config
from fastmoco.optim import build_adamw, build_adamw_ema, build_apex, build_lars
from fastmoco_kernels._runtime import triton_is_default


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


def build_optimizer(config: Config, objective: Any) -> torch.optim.Optimizer:
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
        averages: dict[Tensor, Tensor] = dict(objective.averages())
        return build_adamw_ema(named, averages, lr=lr, weight_decay=decay, betas=optim.betas, eps=optim.eps)
    return build_adamw(named, lr=lr, weight_decay=decay, betas=optim.betas, eps=optim.eps)


def name_of(optimizer: torch.optim.Optimizer) -> str:
    """Whose optimizer it is: ``torch AdamW``, ``fastmoco_kernels LARS``."""
    return f"{type(optimizer).__module__.partition('.')[0]} {type(optimizer).__name__}"
