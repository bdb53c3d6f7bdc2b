"""AdamW as MoCo v3 uses it: one group, every trainable tensor decayed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

_FUSED_DEVICES = ("cpu", "cuda")


def build_adamw(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """Build AdamW over all trainable parameters in one group.

    Decoupled weight decay also reaches biases, norms and the class token, as in the recipe of Chen, Xie, He 2021.
    Frozen parameters stay out of the optimizer. torch's fused kernel is used where every parameter's device has one.

    Args:
        named_parameters: as ``module.named_parameters()`` gives them; the group remembers the names.
        lr: learning rate until the trainer sets the schedule's.
        weight_decay: decoupled decay per unit of learning rate.
        betas: averaging of gradient and squared gradient.
        eps: added to the root of the squared gradient.

    Raises:
        ValueError: if nothing is trainable.
    """
    trainable = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    if not trainable:
        raise ValueError("named_parameters=[]: an optimizer needs at least one trainable parameter")
    fused = all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for _, p in trainable)
    return torch.optim.AdamW(trainable, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)
