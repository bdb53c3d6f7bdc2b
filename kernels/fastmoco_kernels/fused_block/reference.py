"""The passes of a fused block in plain torch: the reference of the kernels.

All arithmetic is float32 (float64 of float64), whatever is stored; sums over rows are those of what
is stored.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoco_kernels.backends import accumulation_dtype


def norm_forward_reference(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum (empty without a branch), its norm in `out_dtype`, and mean and rstd of each row.

    Args:
        x: [..., E].
        branch: [..., E], or None.
        weight: [E].
        bias: [E].
        eps: added to the variance.
        out_dtype: of the norm.
    """
    summed = x if branch is None else x + branch
    wide = accumulation_dtype(summed)
    y, mean, rstd = torch.native_layer_norm(
        summed.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps
    )
    return (
        x.new_empty(0) if branch is None else summed,
        y.to(out_dtype),
        mean.flatten(),
        rstd.flatten(),
    )


def norm_backward_reference(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dbranch (empty unless `branch_dtype`), y recomputed, and sums over rows [3 or 2, E].

    The sums are dweight, dbias and that of dbranch: of dx where there is no dbranch, absent without
    a branch.

    `dx = dsum + rstd * (g - mean(g) - xhat * mean(g * xhat))`, `g = weight * dy` (Ba, Kiros, Hinton
    2016, Eq. 4, derived).

    Args:
        dy: [..., E], gradient to the norm, in its dtype.
        dsum: [..., E], gradient to the sum by its other use; or None.
        x: [..., E], the sum without its branch.
        branch: [..., E], or None: x is the sum.
        weight: [E].
        bias: [E].
        mean: [rows] of the sum.
        rstd: [rows].
        branch_dtype: of dbranch, where it is another than x's.
    """
    wide, E = accumulation_dtype(x), x.shape[-1]
    summed = (x if branch is None else x + branch).to(wide)
    rows = (*x.shape[:-1], 1)
    xhat = (summed - mean.view(rows)) * rstd.view(rows)
    g = dy.to(wide) * weight.to(wide)
    dx = (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True)) * rstd.view(rows)
    dx = (dx if dsum is None else dx + dsum).to(x.dtype)
    dbranch = x.new_empty(0) if branch_dtype is None else dx.to(branch_dtype, copy=True)
    y = (xhat * weight.to(wide) + bias.to(wide)).to(dy.dtype)
    added = (
        dy.to(wide) * xhat,
        dy,
        *(() if branch is None else (dx if branch_dtype is None else dbranch,)),
    )
    return dx, dbranch, y, torch.stack([t.reshape(-1, E).sum(0, dtype=wide) for t in added])


def gelu_backward_reference(dg: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """GELU of h recomputed, the gradient of h, and its sum over rows.

    `g = h * Phi(h)`, `dh = dg * (Phi(h) + h * phi(h))` with the normal distribution's Phi and phi
    (Hendrycks and Gimpel 2016).

    Args:
        dg: [..., F], gradient to GELU's output.
        h: [..., F], GELU's input.
    """
    wide = accumulation_dtype(h)
    dh = torch.ops.aten.gelu_backward(dg.to(wide), h.to(wide)).to(h.dtype)
    return F.gelu(h.to(wide)).to(h.dtype), dh, dh.reshape(-1, h.shape[-1]).sum(0, dtype=wide)


def stack_qkv_reference(dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
    """Stack three [B, A, L, d] to [B, L, 3 A d], columns by part, then head; sum its rows."""
    B, A, L, d = dq.shape
    stacked = torch.stack([part.transpose(1, 2) for part in (dq, dk, dv)], dim=2).reshape(
        B, L, 3 * A * d
    )
    return stacked, stacked.sum((0, 1), dtype=accumulation_dtype(dq))
