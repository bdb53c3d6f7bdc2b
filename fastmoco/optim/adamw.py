"""AdamW as MoCo v3 uses it: one group, every trainable tensor decayed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fastmoco_kernels.adamw_ema.optimizer import AdamWEMA

_FUSED_DEVICES = ("cpu", "cuda")


def trainable_parameters(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    """The parameters an optimizer holds: frozen ones stay out.

    Raises:
        ValueError: if nothing is trainable.
    """
    trainable = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
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
) -> torch.optim.AdamW:
    """Build torch's AdamW over all trainable parameters in one group.

    Decoupled weight decay also reaches biases, norms and the class token, as in the recipe of Chen, Xie, He 2021.
    torch's fused kernel is used where every parameter's device has one.

    Args:
        named_parameters: as ``module.named_parameters()`` gives them; the group remembers the names.
        lr: learning rate until the trainer sets the schedule's.
        weight_decay: decoupled decay per unit of learning rate.
        betas: averaging of gradient and squared gradient.
        eps: added to the root of the squared gradient.

    Raises:
        ValueError: if nothing is trainable.
    """
    trainable = trainable_parameters(named_parameters)
    fused = all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for _, p in trainable)
    return torch.optim.AdamW(trainable, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)


def build_adamw_ema(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    averages: Mapping[nn.Parameter, Tensor],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> AdamWEMA:
    """The same AdamW in one sweep with the moving averages of its parameters; other arguments as `build_adamw`.

    Args:
        named_parameters: as ``module.named_parameters()`` gives them.
        averages: the average of each parameter that has one; those of frozen parameters are
            passed over.
        lr: learning rate until the trainer sets the schedule's.
        weight_decay: decoupled decay per unit of learning rate.
        betas: averaging of gradient and squared gradient.
        eps: added to the root of the squared gradient.

    Raises:
        ValueError: if nothing is trainable.
    """
    trainable = trainable_parameters(named_parameters)
    held: dict[Tensor, Tensor] = {p: averages[p] for _, p in trainable if p in averages}
    return AdamWEMA(trainable, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, averages=held)
