"""The memory-bound passes of a transformer block with its own backward: norms, GELU, q/k/v stack.

Apart from products and attention, a block's backward recomputes what the forward did not keep
(norms, GELU), takes the gradient through it, and sums rows for biases and norm weights. A graph
compiler does so in several passes. Here each tensor is read and written once:

* `norm_backward`: reads dy, x, the branch, and the gradient to their sum; writes the gradient to
  the sum in both dtypes and the normalised rows once more, which the product's weight gradient
  needs; adds up weight, bias and the branch's columns.
* `gelu_backward`: reads dg and h, writes GELU of h once more and dh, adds up dh.
* `stack_qkv`: reads dq, dk, dv with any strides, writes them stacked, adds up their rows.

`norm_forward` is `residual_norm` that also returns its statistics. None is differentiable: their
only caller is `fastmoco.models.fused_block`. Each is one operator of torch on every device, so a
counter of bytes sees one operation. `triton` selects the kernels; else plain torch
(`reference.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmoco_kernels.backends import (
    KERNEL_DTYPES,
    accumulation_dtype,
    require_triton,
    triton_is_default,
)
from fastmoco_kernels.fused_block.reference import (
    gelu_backward_reference,
    norm_backward_reference,
    norm_forward_reference,
    stack_qkv_reference,
)
from fastmoco_kernels.residual_norm.op import WIDEST

_Two = tuple[Tensor, Tensor]
_Three = tuple[Tensor, Tensor, Tensor]
_Four = tuple[Tensor, Tensor, Tensor, Tensor]


def kernels_fit(x: Tensor) -> bool:
    """Whether `"auto"` means the Triton kernels for a block whose stream is `x`."""
    return x.dtype in KERNEL_DTYPES and x.shape[-1] <= WIDEST and triton_is_default(x.device)


@torch.library.custom_op("fastmoco::block_norm", mutates_args=())
def norm_forward(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    triton: bool,
) -> _Four:
    """The sum (empty without a branch), its norm in `out_dtype`, and mean and rstd of each row."""
    if not triton:
        return norm_forward_reference(x, branch, weight, bias, eps, out_dtype)
    require_triton("fused_block", x.device)
    from fastmoco_kernels.residual_norm.launch import forward

    return forward(x, branch, weight, bias, eps, out_dtype)


@norm_forward.register_fake
def _(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    triton: bool,
) -> _Four:
    shape, dtype = (
        ((0,), x.dtype) if branch is None else (x.shape, torch.promote_types(x.dtype, branch.dtype))
    )
    rows, wide = x.numel() // x.shape[-1], accumulation_dtype(x)
    mean, rstd = (x.new_empty(rows, dtype=wide) for _ in range(2))
    return x.new_empty(shape, dtype=dtype), x.new_empty(x.shape, dtype=out_dtype), mean, rstd


@torch.library.custom_op("fastmoco::block_norm_backward", mutates_args=())
def norm_backward(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    branch_dtype: torch.dtype | None,
    triton: bool,
) -> _Four:
    """dx, dbranch (empty unless `branch_dtype`), y, and sums over rows [3 or 2, E].

    The sums are dweight, dbias and, with a branch, that of dbranch.
    """
    if not triton:
        return norm_backward_reference(dy, dsum, x, branch, weight, bias, mean, rstd, branch_dtype)
    require_triton("fused_block", x.device)
    from fastmoco_kernels.fused_block import launch

    return launch.norm_backward(dy, dsum, x, branch, weight, bias, mean, rstd, branch_dtype)


@norm_backward.register_fake
def _(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    branch_dtype: torch.dtype | None,
    triton: bool,
) -> _Four:
    sums = x.new_empty(2 if branch is None else 3, x.shape[-1], dtype=accumulation_dtype(x))
    dbranch = x.new_empty(0) if branch_dtype is None else x.new_empty(x.shape, dtype=branch_dtype)
    return x.new_empty(x.shape), dbranch, x.new_empty(x.shape, dtype=dy.dtype), sums


@torch.library.custom_op("fastmoco::block_gelu_backward", mutates_args=())
def gelu_backward(dg: Tensor, h: Tensor, triton: bool) -> _Three:
    """GELU of h, dh, and the sum over rows of dh."""
    if not triton:
        return gelu_backward_reference(dg, h)
    require_triton("fused_block", h.device)
    from fastmoco_kernels.fused_block import launch

    return launch.gelu_backward(dg, h)


@gelu_backward.register_fake
def _(dg: Tensor, h: Tensor, triton: bool) -> _Three:
    return (
        h.new_empty(h.shape),
        h.new_empty(h.shape),
        h.new_empty(h.shape[-1], dtype=accumulation_dtype(h)),
    )


@torch.library.custom_op("fastmoco::block_stack_qkv", mutates_args=())
def stack_qkv(dq: Tensor, dk: Tensor, dv: Tensor, triton: bool) -> _Two:
    """[B, L, 3 A d] of three [B, A, L, d] of any strides, and the sum over rows of it."""
    if not triton:
        return stack_qkv_reference(dq, dk, dv)
    require_triton("fused_block", dq.device)
    from fastmoco_kernels.stacked_qkv.launch import backward

    return backward(dq, dk, dv, torch.float32)


@stack_qkv.register_fake
def _(dq: Tensor, dk: Tensor, dv: Tensor, triton: bool) -> _Two:
    B, A, L, d = dq.shape
    return dq.new_empty(B, L, 3 * A * d), dq.new_empty(3 * A * d, dtype=accumulation_dtype(dq))
