"""Build the optimizer of a config, and choose the library that provides it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from fastmoco.config import Config
from fastmoco.optim.adamw import build_adamw, build_adamw_ema
from fastmoco.optim.apex import build_apex
from fastmoco.optim.averaged import (
    AveragedLARS,
    AveragedOptimizer,
    AveragedSGD,
    FusedAdamW,
    HostSkipped,
    SweptAdamW,
)
from fastmoco.optim.groups import GroupOf, split_groups, whole_group
from fastmoco.optim.larc import build_larc
from fastmoco.optim.lars import build_lars
from fastmoco.optim.sgd import SGD, build_sgd
from fastmoco_kernels.backends import triton_is_default


def choose_optimizer_backend(
    config: Config, device: torch.device, *, sharded: bool = False
) -> Literal["torch", "fastmoco", "apex"]:
    """Resolve `optim.fused_backend` for a device.

    `auto` selects fastmoco's AdamW if it runs as one kernel, and torch's otherwise. It also selects
    fastmoco's for shards, because there torch plans every call again, and the host needs longer for
    that than a GPU for the update.
    """
    optim = config.optim
    if optim.fused_backend != "auto":
        return optim.fused_backend
    if optim.name in ("lars", "larc"):
        return "fastmoco"
    if optim.name == "sgd":
        return "torch"
    return "fastmoco" if sharded or triton_is_default(device) else "torch"


def build_optimizer(
    config: Config,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    averages: Mapping[nn.Parameter, Tensor],
    group_of: GroupOf = whole_group,
) -> AveragedOptimizer:
    """Build the optimizer of all trainable parameters and of all averages.

    The learning rate is 0 until the trainer sets that of a step.

    Args:
        config: of the run; `config.optim` selects the optimizer and its parameters.
        named_parameters: of the whole objective, after sharding.
        averages: the exponential moving average of each parameter that has one.
        group_of: the group of each parameter; default: one group.

    Raises:
        ValueError: if apex is selected and cannot be used.
    """
    named = list(named_parameters)
    optimizer = _build_whole(config, named, averages)
    split_groups(optimizer.inner, named, group_of)
    return optimizer


def _build_whole(
    config: Config,
    named: list[tuple[str, nn.Parameter]],
    averages: Mapping[nn.Parameter, Tensor],
) -> AveragedOptimizer:
    """The optimizer with all parameters in one group."""
    optim = config.optim
    lr = 0.0
    decay = optim.weight_decay
    if optim.name == "lars":
        lars = build_lars(
            named,
            lr=lr,
            weight_decay=decay,
            sgd_momentum=optim.sgd_momentum,
            trust_coefficient=optim.trust_coefficient,
            lr_in_buffer=optim.lr_in_buffer,
        )
        return AveragedLARS(lars, averages)

    if optim.name == "sgd":
        sgd = build_sgd(
            named,
            lr=lr,
            weight_decay=decay,
            sgd_momentum=optim.sgd_momentum,
            nesterov=optim.nesterov,
        )
        return AveragedSGD(sgd, averages)
    if optim.name == "larc":
        larc = build_larc(
            named,
            lr=lr,
            weight_decay=decay,
            sgd_momentum=optim.sgd_momentum,
            trust_coefficient=optim.trust_coefficient,
        )
        return AveragedSGD(larc, averages)

    # AdamW or LAMB: from apex, from fastmoco, or from torch.
    sharded = any(hasattr(parameter, "placements") for _, parameter in named)
    backend = choose_optimizer_backend(config, named[0][1].device, sharded=sharded)
    if backend == "apex":
        apex = build_apex(
            optim.name, named, lr=lr, weight_decay=decay, betas=optim.betas, eps=optim.eps
        )
        return HostSkipped(apex, averages)
    if backend == "fastmoco":
        swept = build_adamw_ema(
            named, averages, lr=lr, weight_decay=decay, betas=optim.betas, eps=optim.eps
        )
        return SweptAdamW(swept, averages)
    adamw = build_adamw(named, lr=lr, weight_decay=decay, betas=optim.betas, eps=optim.eps)
    return (FusedAdamW if adamw.defaults["fused"] else HostSkipped)(adamw, averages)


def name_of(optimizer: AveragedOptimizer) -> str:
    """Library and class of an optimizer: `torch AdamW`, `fastmoco_kernels LARS`."""
    inner = optimizer.inner
    kind: type[torch.optim.Optimizer] = type(inner)
    if isinstance(inner, torch.optim.AdamW):
        kind = torch.optim.AdamW
    elif isinstance(inner, SGD):
        kind = torch.optim.SGD
    return f"{kind.__module__.partition('.')[0]} {kind.__name__}"
