"""From a config to an optimizer: who offers it, and on which device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from fastmoco.config import Config
from fastmoco.optim.adamw import build_adamw, build_adamw_ema
from fastmoco.optim.apex import build_apex
from fastmoco.optim.averaged import AveragedLARS, AveragedOptimizer, FusedAdamW, HostSkipped, SweptAdamW
from fastmoco.optim.groups import GroupOf, split_groups, whole_group
from fastmoco.optim.lars import build_lars
from fastmoco_kernels.backends import triton_is_default


def choose_optimizer_backend(
    config: Config, device: torch.device, *, sharded: bool = False
) -> Literal["torch", "fastmoco", "apex"]:
    """What `optim.fused_backend` means on a device.

    `auto` takes the sweep where it is one kernel, and the optimizer of torch elsewhere. It takes the
    sweep on shards too: there torch plans every call again, which takes the host longer than the
    step takes a GPU.
    """
    optim = config.optim
    if optim.fused_backend != "auto":
        return optim.fused_backend
    return "fastmoco" if optim.name == "lars" or sharded or triton_is_default(device) else "torch"


def build_optimizer(
    config: Config,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    averages: Mapping[nn.Parameter, Tensor],
    group_of: GroupOf = whole_group,
) -> AveragedOptimizer:
    """The optimizer of all trainable parameters and of all averages.

    The trainer sets the learning rate of every step.

    Args:
        config: the run; `config.optim` names the optimizer and its numbers.
        named_parameters: of the whole objective, sharded already where it will be.
        averages: the exponential moving average of each parameter that has one.
        group_of: the group of each parameter; default: one group.

    Raises:
        ValueError: if apex is asked for and cannot serve.
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
    lr, decay = 0.0, optim.weight_decay
    if optim.name == "lars":
        momentum, trust = optim.sgd_momentum, optim.trust_coefficient
        lars = build_lars(named, lr=lr, weight_decay=decay, sgd_momentum=momentum, trust_coefficient=trust)
        return AveragedLARS(lars, averages)
    sharded = any(hasattr(parameter, "placements") for _, parameter in named)
    backend = choose_optimizer_backend(config, named[0][1].device, sharded=sharded)
    if backend == "apex":
        apex = build_apex(optim.name, named, lr=lr, weight_decay=decay, betas=optim.betas, eps=optim.eps)
        return HostSkipped(apex, averages)
    if backend == "fastmoco":
        swept = build_adamw_ema(named, averages, lr=lr, weight_decay=decay, betas=optim.betas, eps=optim.eps)
        return SweptAdamW(swept, averages)
    adamw = build_adamw(named, lr=lr, weight_decay=decay, betas=optim.betas, eps=optim.eps)
    return (FusedAdamW if adamw.defaults["fused"] else HostSkipped)(adamw, averages)


def name_of(optimizer: AveragedOptimizer) -> str:
    """Whose optimizer it is: `torch AdamW`, `fastmoco_kernels LARS`."""
    kind = type(optimizer.inner)
    return f"{kind.__module__.partition('.')[0]} {kind.__name__}"
