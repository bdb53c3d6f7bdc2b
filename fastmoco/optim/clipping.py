"""Clip gradients: all together, or each tensor by its own norm, as DINO does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmoco_kernels.tensors import local, norms_of

FLOOR = 1e-6
"""Added to a norm before it divides."""


@torch.no_grad()
def clip_together_(gradients: Sequence[Tensor], norm: Tensor, most: float) -> None:
    """Scale all gradients by one factor, in place, if their norm as one vector exceeds `most`. No
    host sync.

    The factor is `min(1, most / (norm + 1e-6))`, as that of torch.

    Args:
        gradients: plain tensors, or DTensors.
        norm: scalar, of all of them together.
        most: > 0.
    """
    factor = (most / (norm + FLOOR)).clamp(max=1.0)
    torch._foreach_mul_(local(gradients), factor)


@torch.no_grad()
def clip_each_(gradients: Sequence[Tensor], most: float) -> None:
    """Scale each tensor down to a norm of `most`, in place, if its norm is larger. No host sync.

    The factor is `min(1, most / (norm + 1e-6))`. Of a sharded tensor the whole counts, so all ranks
    must call it with the same tensors.

    Args:
        gradients: plain tensors, or DTensors.
        most: > 0.
    """
    if not gradients:
        return
    factors = (most / (norms_of(gradients) + FLOOR)).clamp(max=1.0)
    scaled = local(gradients)
    torch._foreach_mul_(scaled, [f.to(g.dtype) for f, g in zip(factors, scaled, strict=True)])
