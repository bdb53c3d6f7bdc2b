"""`fastmoco::short_attention`: the Triton kernels as a differentiable operator of torch.

The forward keeps its inputs, its output and a float32 a query; the weights are recomputed in the
backward. A graph compiler sees two nodes. The operator reads strided views as they are and leaves
its output as [B, L, A, d] in memory, so that neither the packed projection before it nor the one
after it costs a copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmoco_kernels.attention.choice import triton_fault
from fastmoco_kernels.backends import require_triton


@torch.library.custom_op("fastmoco::short_attention", mutates_args=())
def _short_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    require_triton("attention", q.device)
    fault = triton_fault(q.device, q.dtype, q.shape[2], k.shape[2], q.shape[3])
    if fault:  # a compiled caller has not been through `choice.announce`
        raise ValueError(f"attention: backend='triton': {fault}; backend='auto' takes any shape")
    from fastmoco_kernels.attention.launch import forward

    return forward(q, k, v)


@torch.library.custom_op("fastmoco::short_attention_backward", mutates_args=())
def _short_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from fastmoco_kernels.attention.launch import backward

    return backward(grad, q, k, v, out, lse)


def _empty_by_rows(like: Tensor) -> Tensor:
    """[B, A, rows, d], in memory as [B, rows, A, d]."""
    B, A, rows, d = like.shape
    return like.new_empty(B, rows, A, d).transpose(1, 2)


@_short_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_by_rows(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@_short_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_by_rows(q), _empty_by_rows(k), _empty_by_rows(v)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, lse = ctx.saved_tensors
    found: tuple[Tensor, Tensor, Tensor] = _short_attention_backward(grad, q, k, v, out, lse)
    return found


_short_attention.register_autograd(_gradients, setup_context=_keep)


def short_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by the Triton kernels; shapes and dtypes have been checked by the caller.

    Args:
        q: [B, A, L, d] bf16 or fp16 (in Triton's interpreter also fp32), L at most 256, d 32 or 64.
        k: [B, A, M, d], M at most 256.
        v: [B, A, M, d].

    Returns:
        [B, A, L, d], in memory as [B, L, A, d]; differentiable once in all three.
    """
    out: Tensor = _short_attention(q, k, v)[0]
    return out
