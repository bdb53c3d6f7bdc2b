"""Every way of calling the sweep wrongly, each with both numbers in its text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmoco_kernels.adamw_ema.sweep import Number, Scalars, Sweep

OP = "adamw_ema_step_"
WIDE = (torch.float32, torch.float64)


def check_sweep(sweep: Sweep) -> None:
    """Counts, shapes, devices and dtypes.

    Raises:
        ValueError: naming the list, the parameter and both values.
    """
    lists: dict[str, Sequence[Tensor | None]] = {
        "grads": sweep.grads,
        "exp_avgs": sweep.exp_avgs,
        "exp_avg_sqs": sweep.exp_avg_sqs,
        "averages": sweep.averages,
    }
    for name, tensors in {**lists, "steps": sweep.steps}.items():
        if len(tensors) != len(sweep.params):
            raise ValueError(f"{OP}: {len(sweep.params)} params but {len(tensors)} {name}")
    for i, param in enumerate(sweep.params):
        if param.dtype not in WIDE:
            raise ValueError(
                f"{OP}: params[{i}] is {param.dtype}; updates below its half ulp vanish: needs one of {WIDE}"
            )
        if param.device != sweep.params[0].device:
            raise ValueError(f"{OP}: params[{i}] is on {param.device} but params[0] on {sweep.params[0].device}")
        for name, tensors in lists.items():
            tensor = tensors[i]
            if tensor is None:
                continue
            if tensor.shape != param.shape:
                raise ValueError(f"{OP}: {name}[{i}] is {tuple(tensor.shape)} but its param is {tuple(param.shape)}")
            if tensor.device != param.device:
                raise ValueError(f"{OP}: {name}[{i}] is on {tensor.device} but its param is on {param.device}")
            if tensor.is_complex() or not tensor.is_floating_point() or tensor.layout != torch.strided:
                raise ValueError(
                    f"{OP}: {name}[{i}] is {tensor.dtype}, {tensor.layout}; it must be dense floating point"
                )
            if name in ("exp_avgs", "exp_avg_sqs", "averages") and tensor.dtype not in WIDE:
                raise ValueError(f"{OP}: {name}[{i}] is {tensor.dtype}; only one of {WIDE} moves near momentum 1")
        step = sweep.steps[i]
        if step.numel() != 1 or step.device != param.device or not step.is_floating_point():
            raise ValueError(
                f"{OP}: steps[{i}] has {step.numel()} elements of {step.dtype} on {step.device}; "
                f"it must be 1 of floating point on {param.device}"
            )


def check_scalars(scalars: Scalars, device: torch.device) -> None:
    """Ranges of numbers; device and size of tensors, whose values are not looked at.

    Raises:
        ValueError: naming the value and its rule.
    """
    for name in ("lr", "weight_decay", "eps"):
        value: Number = getattr(scalars, name)
        if not isinstance(value, Tensor) and not value >= 0:
            raise ValueError(f"{OP}: {name}={value} must be 0 or more")
    for name in ("beta1", "beta2"):
        value = getattr(scalars, name)
        if not isinstance(value, Tensor) and not 0 <= value < 1:
            raise ValueError(f"{OP}: {name}={value} lies outside [0, 1)")
    if not isinstance(scalars.ema_momentum, Tensor) and not 0 <= scalars.ema_momentum <= 1:
        raise ValueError(f"{OP}: ema_momentum={scalars.ema_momentum} lies outside [0, 1]")
    for name in ("lr", "weight_decay", "beta1", "beta2", "eps", "ema_momentum", "found_inf", "grad_scale"):
        tensor = getattr(scalars, name)
        if isinstance(tensor, Tensor) and (tensor.numel() != 1 or tensor.device != device):
            raise ValueError(f"{OP}: {name} has {tensor.numel()} elements on {tensor.device}; it must be 1 on {device}")
