"""`fastmoco::split_qkv_backward`: the kernel as an operator of torch, and its autograd node.

The forward returns views, which an operator of torch may not; so the node is plain autograd, and
only the kernel of the backward is an operator. Nothing is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmoco_kernels.backends import require_triton
from fastmoco_kernels.stacked_qkv.reference import views_of
from fastmoco_kernels.tensors import all_plain, traced

_Three = tuple[Tensor, Tensor, Tensor]


def _backward(
    dq: Tensor, dk: Tensor, dv: Tensor, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    require_triton("split_qkv", dq.device)
    from fastmoco_kernels.stacked_qkv.launch import backward

    return backward(dq, dk, dv, bias_dtype)


_split_qkv_backward = torch.library.custom_op(
    "fastmoco::split_qkv_backward", _backward, mutates_args=()
)


@_split_qkv_backward.register_fake
def _(dq: Tensor, dk: Tensor, dv: Tensor, bias_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    B, A, L, d = dq.shape
    shape = (0,) if bias_dtype is None else (3 * A * d,)
    return dq.new_empty(B, L, 3 * A * d), dq.new_empty(shape, dtype=bias_dtype or dq.dtype)


class _SplitQkv(torch.autograd.Function):
    """Views whose gradients the kernel stacks. Differentiable once."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int, bias: Tensor | None) -> _Three:
        ctx.bias_dtype = None if bias is None else bias.dtype
        return views_of(qkv, num_heads)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor | None]:
        dq, dk, dv = gradients
        bias_dtype = ctx.bias_dtype if ctx.needs_input_grad[2] else None
        watched = traced() or not all_plain(gradients)  # the dispatcher costs the host more
        dqkv, dbias = (_split_qkv_backward if watched else _backward)(dq, dk, dv, bias_dtype)
        return dqkv, None, None if bias_dtype is None else dbias


def split_qkv_triton(qkv: Tensor, num_heads: int, bias: Tensor | None) -> _Three:
    """q, k, v with the kernel's gradient; shapes and dtypes have been checked by the caller."""
    found: _Three = _SplitQkv.apply(qkv, num_heads, bias)  # type: ignore[no-untyped-call]
    return found
