"""AdamW as MoCo v3 uses it: one group, weight decay on every trainable tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastmoco_kernels.adamw_ema.optimizer import AdamWEMA
from fastmoco_kernels.eager_optimizer import EagerOptimizer, without_decorators

_FUSED_DEVICES = ("cpu", "cuda")


class AdamW(EagerOptimizer, torch.optim.AdamW):
    """torch's AdamW, bit for bit, without the import of torch._dynamo."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As torch.optim.AdamW."""
        # torch's decorator sets `no_grad` too. Its graph breaks are for compiled steps.
        return without_decorators(torch.optim.AdamW.step)(self, closure)


def trainable_parameters(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
) -> list[tuple[str, nn.Parameter]]:
    """The parameters that an optimizer updates, without frozen ones.

    Raises:
        ValueError: if nothing is trainable.
    """
    trainable = [
        (name, parameter) for name, parameter in named_parameters if parameter.requires_grad
    ]
    if not trainable:
        raise ValueError("named_parameters=[]: an optimizer needs at least one trainable parameter")
    return trainable


def build_adamw(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> AdamW:
    """Build torch's AdamW over all trainable parameters in one group.

    Weight decay also applies to biases, norms and the class token, as in the recipe of Chen, Xie,
    He 2021. torch's fused kernel is used if the device of every parameter has one.

    Args:
        named_parameters: as from `module.named_parameters()`; the group stores the names.
        lr: initial learning rate; the trainer sets it in every step.
        weight_decay: decoupled decay per unit of learning rate.
        betas: decay rates of the averages of gradient and squared gradient.
        eps: added to the root of the averaged squared gradient.

    Raises:
        ValueError: if nothing is trainable.
    """
    trainable = trainable_parameters(named_parameters)
    fused = all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for _, p in trainable)
    return AdamW(trainable, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)


def build_adamw_ema(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    averages: Mapping[nn.Parameter, Tensor],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> AdamWEMA:
    """AdamW and the moving averages of its parameters in one pass over memory; other arguments as
    `build_adamw`.

    Args:
        named_parameters: as from `module.named_parameters()`.
        averages: the average of each parameter that has one; those of frozen parameters are
            ignored.
        lr: initial learning rate; the trainer sets it in every step.
        weight_decay: decoupled decay per unit of learning rate.
        betas: decay rates of the averages of gradient and squared gradient.
        eps: added to the root of the averaged squared gradient.

    Raises:
        ValueError: if nothing is trainable.
    """
    trainable = trainable_parameters(named_parameters)
    held: dict[Tensor, Tensor] = {p: averages[p] for _, p in trainable if p in averages}
    return AdamWEMA(
        trainable, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, averages=held
    )
