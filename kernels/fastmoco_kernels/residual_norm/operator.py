"""`fastmoco::residual_norm`: the kernels as one operator of torch, with its gradient.

Kept for the backward: x_new (x itself without a branch), the weight, and two float32 a row. Not y:
the product that reads it keeps it anyway. The operator is below autocast, which casts none of its
arguments. Where nothing watches torch's calls, an autograd function launches directly: the
dispatcher takes the host twice as long. No argument has a default: the dispatcher would drop it,
and the number of gradients would not match.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmoco_kernels.backends import require_triton
from fastmoco_kernels.tensors import traced

_Four = tuple[Tensor, Tensor, Tensor, Tensor]
_Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


def residual_norm_triton(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    branch_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """x_new and y by the Triton kernels, differentiable once; the caller checks the arguments."""
    run: Callable[..., _Four] = (
        _residual_norm if _watched(x, branch, weight, bias, branch_bias) else _Eager.apply
    )
    x_new, y, _, _ = run(x, branch, weight, bias, eps, out_dtype, branch_bias)
    return (x if branch is None else x_new), y


def _watched(*tensors: Tensor | None) -> bool:
    """Whether a compiler, a mode, a transform or a tensor subclass must see the operator."""
    return (
        traced()
        or torch._C._are_functorch_transforms_active()
        or not _PLAIN.issuperset(map(type, tensors))
    )


def _forward(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    branch_bias: Tensor | None,
) -> _Four:
    require_triton("residual_norm", x.device)
    from fastmoco_kernels.residual_norm.launch import forward

    return forward(x, branch, weight, bias, eps, out_dtype)


_residual_norm = torch.library.custom_op("fastmoco::residual_norm", _forward, mutates_args=())


def _backward(
    dy: Tensor,
    dx_new: Tensor | None,
    x_new: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
    branch_bias_dtype: torch.dtype | None,
) -> _Five:
    from fastmoco_kernels.residual_norm.launch import backward

    return backward(dy, dx_new, x_new, weight, mean, rstd, x_dtype, branch_dtype, branch_bias_dtype)


_residual_norm_backward = torch.library.custom_op(
    "fastmoco::residual_norm_backward", _backward, mutates_args=()
)


@_residual_norm.register_fake
def _(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    branch_bias: Tensor | None,
) -> _Four:
    rows = x.numel() // x.shape[-1]
    shape, dtype = (
        ((0,), x.dtype) if branch is None else (x.shape, torch.promote_types(x.dtype, branch.dtype))
    )
    return (
        x.new_empty(shape, dtype=dtype),
        x.new_empty(x.shape, dtype=out_dtype),
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty(rows, dtype=torch.float32),
    )


@_residual_norm_backward.register_fake
def _(
    dy: Tensor,
    dx_new: Tensor | None,
    x_new: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
    branch_bias_dtype: torch.dtype | None,
) -> _Five:
    return (
        x_new.new_empty(x_new.shape, dtype=x_dtype),
        x_new.new_empty(
            (0,) if branch_dtype is None else x_new.shape, dtype=branch_dtype or x_dtype
        ),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(
            (0,) if branch_bias_dtype is None else weight.shape, dtype=branch_bias_dtype
        ),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: _Four) -> None:
    x, branch, weight = inputs[:3]
    branch_bias = inputs[6]
    x_new, _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*((x_new,) if branch is None else ()), mean, rstd)
    ctx.save_for_backward(x if branch is None else x_new, weight, mean, rstd)
    ctx.dtypes = (
        x.dtype,
        None if branch is None else branch.dtype,
        None if branch_bias is None else branch_bias.dtype,
    )


def _gradients(
    ctx: Any, dx_new: Tensor | None, dy: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    x_new, weight, mean, rstd = ctx.saved_tensors
    x_dtype, branch_dtype, branch_bias_dtype = ctx.dtypes
    branch_bias_dtype = branch_bias_dtype if ctx.needs_input_grad[6] else None
    # Without a branch that result is an empty placeholder.
    dx_new = None if branch_dtype is None else dx_new
    if dy is None:  # y was not used: the sum alone is differentiated
        dx = None if dx_new is None else dx_new.to(x_dtype)
        dbranch = None if dx_new is None or branch_dtype is None else dx_new.to(branch_dtype)
        dbranch_bias = None
        if dbranch is not None and branch_bias_dtype is not None:
            dbranch_bias = (
                dbranch.reshape(-1, dbranch.shape[-1])
                .sum(0, dtype=torch.float32)
                .to(branch_bias_dtype)
            )
        return dx, dbranch, None, None, None, None, dbranch_bias
    other = None if branch_dtype == x_dtype else branch_dtype  # of x's dtype, dbranch is dx
    run: Callable[..., _Five] = (
        _residual_norm_backward if _watched(dy, dx_new, x_new, weight) else _backward
    )
    dx, own, dweight, dbias, sums = run(
        dy, dx_new, x_new, weight, mean, rstd, x_dtype, other, branch_bias_dtype
    )
    dbranch = None if branch_dtype is None else dx if other is None else own
    return dx, dbranch, dweight, dbias, None, None, None if branch_bias_dtype is None else sums


_residual_norm.register_autograd(_gradients, setup_context=_keep)


class _Eager(torch.autograd.Function):
    """The operator without the dispatcher."""

    @staticmethod
    def forward(
        ctx: Any, *arguments: Any
    ) -> Any:  # with a setup_context, torch reads the signature at every call
        output = _forward(*arguments)
        _keep(ctx, arguments, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *incoming: Any) -> Any:
        return _gradients(ctx, *incoming)
