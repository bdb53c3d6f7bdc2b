"""Residual add, layer norm and cast in plain torch: the reference of the kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoco_kernels._bias_gradient import pass_bias_gradient
from fastmoco_kernels.backends import accumulation_dtype


def residual_norm_reference(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    branch_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`x + branch` and its layer norm (Ba, Kiros, Hinton 2016, Eq. 4) in `out_dtype`.

    The norm is computed in float32 or wider and rounded once.

    Args:
        x: [..., E].
        branch: [..., E], or None: then the first result is `x` itself.
        weight: [E], widened to the arithmetic type where it is narrower.
        bias: [E].
        eps: added to the variance.
        out_dtype: of the second result.
        branch_bias: [E], given the sum over rows of the branch's gradient; or None.
    """
    x_new = x if branch is None else x + pass_bias_gradient(branch, branch_bias)
    wide = accumulation_dtype(x_new)
    normed = F.layer_norm(x_new.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps)
    return x_new, normed.to(out_dtype)
