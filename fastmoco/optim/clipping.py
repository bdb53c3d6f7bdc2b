"""Clip gradients: each tensor by its own norm, as DINO does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmoco_kernels.tensors import local, norms_of

FLOOR = 1e-6
"""Added to a norm before it divides."""


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
