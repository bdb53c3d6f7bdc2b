"""LARS one tensor at a time, as the equation is written: the oracle of the tests."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def lars_step_reference_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    trust_coefficient: float,
    adapt: Sequence[bool],
    lr_in_buffer: bool = False,
) -> None:
    """You, Gitman, Ginsburg 2017, in place, in the tensors' dtype.

    `adapt` has a flag for each tensor: whether it is decayed and scaled. The rate is outside the
    buffer, as in MoCo v3, or inside it, as in SimCLR.
    """
    for param, grad, buffer, adapted in zip(params, grads, momentum_buffers, adapt, strict=True):
        update = grad.to(param.dtype)
        if adapted:
            update = update + weight_decay * param
            param_norm, update_norm = param.norm(), update.norm()
            if param_norm > 0 and update_norm > 0:
                update = update * (trust_coefficient * param_norm / update_norm)
        if lr_in_buffer:
            buffer.mul_(momentum).add_(lr * update)
            param.sub_(buffer)
        else:
            buffer.mul_(momentum).add_(update)
            param.sub_(lr * buffer)
