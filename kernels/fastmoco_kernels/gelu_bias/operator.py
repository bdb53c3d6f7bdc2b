"""`fastmoco::gelu_backward`: the kernel as an operator of torch, and its autograd node.

The forward is torch's GELU, already one pass, which a graph compiler may fuse or recompute. Kept
for the backward: h.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoco_kernels.backends import require_triton
from fastmoco_kernels.tensors import all_plain, traced


def _backward(dy: Tensor, h: Tensor, bias_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    require_triton("gelu", h.device)
    from fastmoco_kernels.gelu_bias.launch import backward

    return backward(dy, h, bias_dtype)


_gelu_backward = torch.library.custom_op("fastmoco::gelu_backward", _backward, mutates_args=())


@_gelu_backward.register_fake
def _(dy: Tensor, h: Tensor, bias_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    shape = (0,) if bias_dtype is None else h.shape[-1:]
    return h.new_empty(h.shape), h.new_empty(shape, dtype=bias_dtype or h.dtype)


class _Gelu(torch.autograd.Function):
    """GELU whose backward is the kernel. Differentiable once."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(h)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.gelu(h)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        (h,) = ctx.saved_tensors
        bias_dtype = ctx.bias_dtype if ctx.needs_input_grad[1] else None
        watched = traced() or not all_plain((*gradients, h))  # the dispatcher costs the host more
        dh, dbias = (_gelu_backward if watched else _backward)(gradients[0], h, bias_dtype)
        return dh, None if bias_dtype is None else dbias


def gelu_triton(h: Tensor, bias: Tensor | None) -> Tensor:
    """GELU with the kernel's gradient; shapes and dtypes have been checked by the caller."""
    out: Tensor = _Gelu.apply(h, bias)  # type: ignore[no-untyped-call]
    return out
