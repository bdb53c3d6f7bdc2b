"""Every way of calling LARS wrongly, each with both numbers in its text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmoco_kernels.tensors import check_lists

OP = "lars_step_"
WIDE = (torch.float32, torch.float64)


def check_numbers(
    lr: float | Tensor, momentum: float, weight_decay: float, trust_coefficient: float
) -> None:
    """Refuse numbers out of range; a rate in a tensor is not read, only its size."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"{OP}: lr has {lr.numel()} elements; it needs 1")
    elif not lr >= 0:
        raise ValueError(f"{OP}: lr={lr} is below 0")
    if not 0 <= momentum < 1:
        raise ValueError(f"{OP}: momentum={momentum} lies outside [0, 1)")
    if not weight_decay >= 0:
        raise ValueError(f"{OP}: weight_decay={weight_decay} is below 0")
    if not trust_coefficient > 0:
        raise ValueError(f"{OP}: trust_coefficient={trust_coefficient} is not above 0")


def check_tensors(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    found_inf: Tensor | None,
) -> None:
    """Refuse lists, shapes, types and devices that do not fit together."""
    check_lists(OP, "params", params, {"grads": grads, "momentum_buffers": momentum_buffers})
    for i, (param, grad, buffer) in enumerate(zip(params, grads, momentum_buffers, strict=True)):
        if param.dtype not in WIDE:
            raise ValueError(
                f"{OP}: params[{i}] is {param.dtype}; small steps vanish in it: needs one of {WIDE}"
            )
        if not grad.dtype.is_floating_point:
            raise ValueError(f"{OP}: grads[{i}] is {grad.dtype}; it must be floating point")
        if param.dtype != params[0].dtype or buffer.dtype != param.dtype:
            raise ValueError(
                f"{OP}: params[{i}] is {param.dtype}, momentum_buffers[{i}] {buffer.dtype}, params[0] {params[0].dtype}; "
                "all must have one dtype"
            )
    if found_inf is not None and params:
        if found_inf.numel() != 1:
            raise ValueError(f"{OP}: found_inf has {found_inf.numel()} elements; it needs 1")
        if found_inf.device != params[0].device:
            raise ValueError(
                f"{OP}: found_inf is on {found_inf.device}, the parameters on {params[0].device}"
            )
