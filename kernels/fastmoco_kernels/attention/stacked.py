"""Attention of stacked projections: the layout of a ViT's `qkv` layer in, that of its output
projection out.

On a CPU in bf16 the written-out form is one autograd node. It lays the projections out once, scales
inside the product, and normalises the scores in place. In autograd's own form every product copies
its operands and the scores have a second copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmoco_kernels.attention.choice import announce
from fastmoco_kernels.attention.op import attention
from fastmoco_kernels.tensors import runs_directly


def stacked_attention(qkv_BLF: Tensor, num_heads: int, *, backend: str = "auto") -> Tensor:
    """`attention` of every token to every token.

    Args:
        qkv_BLF: [B, L, 3 E] floating point; channels are grouped q, k, v, then by head.
        num_heads: A, a divisor of E.
        backend: as for `attention`.

    Returns:
        [B, L, E] in the dtype of `attention`, differentiable once on a CPU in bf16.

    Numerics: as `attention`. Written out in bf16 on a CPU: scores are scaled before they are
        rounded, which gives other bits than `attention` unless the square root of E / A is a power
        of two.
    Memory and cost: as `attention`; keeps a copy of `qkv_BLF` and the weights of `explicit`.
    Distributed: none.

    Example:
        >>> import torch
        >>> from fastmoco_kernels.attention.stacked import stacked_attention
        >>> stacked_attention(torch.ones(2, 5, 24), 2).shape
        torch.Size([2, 5, 8])
    """
    B, L, F = qkv_BLF.shape
    d = F // (3 * num_heads)
    qkv = qkv_BLF.view(B, L, 3, num_heads, d)
    if (
        backend in ("auto", "explicit")
        and qkv_BLF.device.type == "cpu"
        and qkv_BLF.dtype == torch.bfloat16
        and runs_directly((qkv_BLF,))
    ):
        announce(qkv.device, qkv.dtype, L, L, d, backend)
        if not torch.is_grad_enabled():
            return _forward(qkv)[0]
        out: Tensor = _Explicit.apply(qkv)  # type: ignore[no-untyped-call]
        return out
    # Views of one buffer, so that their gradients are stacked without another copy.
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    return attention(q, k, v, backend=backend).transpose(1, 2).reshape(B, L, F // 3)


def _forward(qkv_BLSAd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The result [B, L, E]; the parts [3, B A, L, d] and the weights [B A, L, L]."""
    B, L, _, A, d = qkv_BLSAd.shape
    parts = qkv_BLSAd.permute(2, 0, 3, 1, 4).reshape(3, B * A, L, d)
    q, k, v = parts.unbind()
    weights = q.new_empty(B * A, L, L)
    # Outputs of products are given, which autocast leaves alone.
    torch.baddbmm(weights, q, k.mT, beta=0, alpha=d**-0.5, out=weights)
    torch.softmax(weights, -1, out=weights)
    out = torch.bmm(weights, v, out=torch.empty_like(v))
    return out.view(B, A, L, d).transpose(1, 2).reshape(B, L, A * d), parts, weights


class _Explicit(torch.autograd.Function):
    """`softmax(q k^T / sqrt(d)) v` and its gradient."""

    @staticmethod
    def forward(ctx: Any, qkv_BLSAd: Tensor) -> Tensor:
        out, parts, weights = _forward(qkv_BLSAd)
        ctx.save_for_backward(parts, weights)
        ctx.num_heads = qkv_BLSAd.shape[3]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BLE: Tensor) -> Tensor:
        parts, weights = ctx.saved_tensors
        q, k, v = parts.unbind()
        L, d = q.shape[1:]
        A = ctx.num_heads
        B = len(q) // A
        dy = dy_BLE.view(B, L, A, d).transpose(1, 2).reshape(B * A, L, d)
        dparts = torch.empty_like(parts)
        dq, dk, dv = dparts.unbind()
        torch.bmm(weights.mT, dy, out=dv)

        # The gradient of the weights becomes that of the scores in place.
        dscores = torch.bmm(dy, v.mT, out=torch.empty_like(weights))
        torch.ops.aten._softmax_backward_data.out(
            dscores, weights, -1, weights.dtype, grad_input=dscores
        )
        torch.baddbmm(dq, dscores, k, beta=0, alpha=d**-0.5, out=dq)
        torch.baddbmm(dk, dscores.mT, q, beta=0, alpha=d**-0.5, out=dk)
        return dparts.view(3, B, A, L, d).permute(1, 3, 0, 2, 4).contiguous()
