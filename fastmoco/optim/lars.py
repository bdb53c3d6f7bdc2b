"""LARS over all trainable parameters: by default as MoCo v3 uses it for ResNets, without decay and
trust ratio for biases and norms."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from fastmoco.optim.adamw import trainable_parameters
from fastmoco.optim.groups import ParameterGroup, split_groups
from fastmoco_kernels.lars.optimizer import LARS


def build_lars(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    weight_decay: float,
    sgd_momentum: float = 0.9,
    trust_coefficient: float = 0.001,
    lr_in_buffer: bool = False,
    adapt: Callable[[str, nn.Parameter], bool | None] | None = None,
) -> LARS:
    """LARS over all trainable parameters, in one group unless `adapt` splits them.

    Args:
        named_parameters: as from `module.named_parameters()`; the group stores the names.
        lr: initial learning rate; the trainer sets it in every step.
        weight_decay: added to the gradient of tensors that are adapted.
        sgd_momentum: of the buffer that accumulates the scaled gradients.
        trust_coefficient: norm of a step relative to that of the tensor, before the learning rate.
        lr_in_buffer: whether the rate is a factor of what the buffer accumulates, as in SimCLR, or
            of the step, as in MoCo v3 and BYOL.
        adapt: whether a parameter is decayed and scaled by its trust ratio, from its name and
            itself; None, or no function: if it has two or more dimensions. `unless_named` makes
            the rule of SimCLR and BYOL.

    Raises:
        ValueError: if nothing is trainable.
    """
    named = trainable_parameters(named_parameters)
    optimizer = LARS(
        named,
        lr=lr,
        momentum=sgd_momentum,
        weight_decay=weight_decay,
        trust_coefficient=trust_coefficient,
        lr_in_buffer=lr_in_buffer,
    )
    if adapt is not None:
        split_groups(optimizer, named, lambda name, p: ParameterGroup(adapt=adapt(name, p)))
    return optimizer


def unless_named(*parts: str) -> Callable[[str, nn.Parameter], bool]:
    """The rule of SimCLR and BYOL: parameters are adapted unless their name contains one of these.

    SimCLR's parts are "batch_normalization", "bias" and "head_supervised". Names of torch modules
    have "bn" or a number instead of "batch_normalization".
    """
    return lambda name, parameter: not any(part in name for part in parts)
