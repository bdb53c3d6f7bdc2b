"""Every way of calling LARS wrongly, each with both numbers in its text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WIDE = (torch.float32, torch.float64)


def check_numbers(lr: float | Tensor, momentum: float, weight_decay: float, trust_coefficient: float) -> None:
    """Refuse numbers out of range; a rate in a tensor is not read, only its size."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lars_step_: lr has {lr.numel()} elements; it needs 1")
    elif not lr >= 0:
        raise ValueError(f"lars_step_: lr={lr} is below 0")
    if not 0 <= momentum < 1:
        raise ValueError(f"lars_step_: momentum={momentum} lies outside [0, 1)")
    if not weight_decay >= 0:
        raise ValueError(f"lars_step_: weight_decay={weight_decay} is below 0")
    if not trust_coefficient > 0:
        raise ValueError(f"lars_step_: trust_coefficient={trust_coefficient} is not above 0")


def check_tensors(
    params: Sequence[Tensor], grads: Sequence[Tensor], momentum_buffers: Sequence[Tensor], found_inf: Tensor | None
) -> None:
    """Refuse lists, shapes, types and devices that do not fit together."""
    if not len(params) == len(grads) == len(momentum_buffers):
        raise ValueError(
            f"lars_step_: {len(params)} parameters but {len(grads)} gradients and {len(momentum_buffers)} buffers"
        )
    for i, (param, grad, buffer) in enumerate(zip(params, grads, momentum_buffers, strict=True)):
        if param.dtype not in WIDE:
            raise ValueError(f"lars_step_: parameter {i} is {param.dtype}; small steps vanish below {WIDE[0]}")
        if not grad.dtype.is_floating_point:
            raise ValueError(f"lars_step_: gradient {i} is {grad.dtype}, its parameter {param.dtype}")
        if param.dtype != params[0].dtype or buffer.dtype != param.dtype:
            raise ValueError(
                f"lars_step_: parameter {i} is {param.dtype}, its buffer {buffer.dtype}, parameter 0 {params[0].dtype}; "
                "all have one dtype"
            )
        for name, other in (("gradient", grad), ("buffer", buffer)):
            if other.shape != param.shape:
                raise ValueError(
                    f"lars_step_: parameter {i} is {tuple(param.shape)} but its {name} is {tuple(other.shape)}"
                )
            if other.device != param.device or param.device != params[0].device:
                raise ValueError(
                    f"lars_step_: parameter {i} is on {param.device}, its {name} on {other.device}, "
                    f"parameter 0 on {params[0].device}; all lie on one device"
                )
    if found_inf is not None and params:
        if found_inf.numel() != 1:
            raise ValueError(f"lars_step_: found_inf has {found_inf.numel()} elements; it needs 1")
        if found_inf.device != params[0].device:
            raise ValueError(f"lars_step_: found_inf is on {found_inf.device}, the parameters on {params[0].device}")
