"""LARS as MoCo v3 uses it for ResNets: one group, no decay or trust ratio for biases and norms."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from fastmoco.optim.adamw import trainable_parameters
from fastmoco_kernels.lars.optimizer import LARS


def build_lars(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    weight_decay: float,
    sgd_momentum: float = 0.9,
    trust_coefficient: float = 0.001,
) -> LARS:
    """LARS over all trainable parameters in one group.

    Args:
        named_parameters: as from `module.named_parameters()`; the group stores the names.
        lr: initial learning rate; the trainer sets it in every step.
        weight_decay: added to the gradient of tensors of two or more dimensions.
        sgd_momentum: of the buffer that accumulates the scaled gradients.
        trust_coefficient: norm of a step relative to that of the tensor, before the learning rate.

    Raises:
        ValueError: if nothing is trainable.
    """
    return LARS(
        trainable_parameters(named_parameters),
        lr=lr,
        momentum=sgd_momentum,
        weight_decay=weight_decay,
        trust_coefficient=trust_coefficient,
    )
