"""q, k, v as views, with the bias gradient as torch's linear layer sums it: the reference."""

from __future__ import annotations

from torch import Tensor

from fastmoco_kernels._bias_gradient import pass_bias_gradient

_Three = tuple[Tensor, Tensor, Tensor]


def views_of(qkv_BLF: Tensor, num_heads: int) -> _Three:
    """q, k, v [B, A, L, d]: views of [B, L, 3 A d], columns grouped q, k, v, then by head."""
    B, L, F3 = qkv_BLF.shape
    q, k, v = (
        part.transpose(1, 2)
        for part in qkv_BLF.view(B, L, 3, num_heads, F3 // (3 * num_heads)).unbind(2)
    )
    return q, k, v


def split_qkv_reference(qkv_BLF: Tensor, num_heads: int, bias: Tensor | None) -> _Three:
    """The views; their gradients are stacked by torch.

    Args:
        qkv_BLF: [B, L, 3 A d].
        num_heads: A.
        bias: [3 A d], or None.
    """
    return views_of(pass_bias_gradient(qkv_BLF, bias), num_heads)
