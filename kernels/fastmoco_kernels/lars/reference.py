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
) -> None:
    """You, Gitman, Ginsburg 2017, in place, in the tensors' dtype; the rate outside the buffer."""
    for param, grad, buffer in zip(params, grads, momentum_buffers, strict=True):
        update = grad.to(param.dtype)
        if param.ndim > 1:
            update = update + weight_decay * param
            param_norm, update_norm = param.norm(), update.norm()
            if param_norm > 0 and update_norm > 0:
                update = update * (trust_coefficient * param_norm / update_norm)
        buffer.mul_(momentum).add_(update)
        param.sub_(lr * buffer)
