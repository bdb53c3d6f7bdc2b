"""The moving average in plain torch: the reference, one tensor at a time, and the CPU path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ema_update_reference_(
    averages: Sequence[Tensor], sources: Sequence[Tensor], momentum: float | Tensor
) -> None:
    """`average += (1 - momentum) * (source - average)`, tensor by tensor, in place."""
    for average, source in zip(averages, sources, strict=True):
        if isinstance(momentum, Tensor):
            weight = (1 - momentum.reshape(()).double()).to(average.dtype)
            average.lerp_(source.to(average.dtype), weight)
        else:
            average.lerp_(source.to(average.dtype), 1 - momentum)


def ema_update_foreach_(
    averages: Sequence[Tensor], sources: Sequence[Tensor], momentum: float | Tensor
) -> None:
    """The same by torch's multi-tensor lerp; tensor by tensor for a momentum on the device."""
    if isinstance(momentum, Tensor):
        ema_update_reference_(averages, sources, momentum)
    elif averages:
        matching = [
            s if s.dtype == a.dtype else s.to(a.dtype)
            for a, s in zip(averages, sources, strict=True)
        ]
        torch._foreach_lerp_(list(averages), matching, 1 - momentum)
