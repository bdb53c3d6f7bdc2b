"""`fastmoco::soft_cross_entropy` and `fastmoco::soft_cross_entropy_rows`, with their gradients.

Of logits that are given, nothing is kept but themselves and a few numbers a row: the backward makes
their softmax again. Of rows and a weight, the gradient is made in the forward, where the logits of a
block are still there, and the backward multiplies it by the incoming one. Where nothing watches
torch's calls, autograd functions call the passes directly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastmoco_kernels.backends import accumulation_dtype
from fastmoco_kernels.info_nce.operator import once_differentiable
from fastmoco_kernels.soft_cross_entropy.blocks import Targets, count_of_pairs, of_logits, of_rows
from fastmoco_kernels.tensors import all_plain, traced

_NO_TEMPERATURE = 0.0
"""Of targets that are probabilities: operators have no optional numbers without cost."""


def of_given_logits(
    logits: Tensor, targets: Targets, *, temperature: float, triton: bool
) -> Tensor:
    """The loss of logits [V, B, K], differentiable once in them."""
    arguments = (
        logits,
        targets.values,
        targets.centre,
        temperature,
        targets.temperature or _NO_TEMPERATURE,
        triton,
    )
    run: Callable[..., tuple[Tensor, Tensor]] = (
        _logits_op if watched(arguments) else _EagerLogits.apply
    )
    return run(*arguments)[0]


def of_products(
    rows: Tensor, weight: Tensor, targets: Targets, *, temperature: float, triton: bool
) -> Tensor:
    """The loss of `rows weight^T`, differentiable once in both."""
    graded = torch.is_grad_enabled()
    arguments = (
        rows,
        weight,
        targets.values,
        targets.centre,
        temperature,
        targets.temperature or _NO_TEMPERATURE,
        graded and rows.requires_grad,
        graded and weight.requires_grad,
        triton,
    )
    run: Callable[..., tuple[Tensor, Tensor, Tensor]] = (
        _rows_op if watched(arguments) else _EagerRows.apply
    )
    return run(*arguments)[0]


def watched(arguments: tuple[Any, ...]) -> bool:
    """Whether a compiler, a mode, a transform or a tensor subclass must see the operator."""
    return (
        traced()
        or torch._C._are_functorch_transforms_active()
        or not all_plain(a for a in arguments if isinstance(a, Tensor))
    )


def _targets(values: Tensor, centre: Tensor | None, temperature: float) -> Targets:
    return Targets(values, centre, None if temperature == _NO_TEMPERATURE else temperature)


def _logits_forward(
    logits: Tensor,
    targets: Tensor,
    centre: Tensor | None,
    temperature: float,
    target_temperature: float,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    """The loss, and what the backward of the kernels needs of each row; in blocks nothing."""
    found = _targets(targets, centre, target_temperature)
    with torch.autocast(logits.device.type, enabled=False):
        if triton:
            from fastmoco_kernels.soft_cross_entropy.launch import forward

            results: tuple[Tensor, Tensor] = forward(logits, found, temperature)
            return results
        total = of_logits(logits, found, temperature=temperature)
        pairs = count_of_pairs(len(logits), len(targets)) * logits.shape[1]
        dtype = accumulation_dtype(logits)
        return (total / pairs).to(dtype), torch.empty(0, dtype=dtype, device=logits.device)


def _logits_backward(
    incoming: Tensor,
    logits: Tensor,
    targets: Tensor,
    centre: Tensor | None,
    statistics: Tensor,
    temperature: float,
    target_temperature: float,
    triton: bool,
) -> Tensor:
    """[V, B, K] of the dtype of the logits."""
    found = _targets(targets, centre, target_temperature)
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    with torch.autocast(logits.device.type, enabled=False):
        if triton:
            from fastmoco_kernels.soft_cross_entropy.launch import backward

            backward(incoming, logits, found, statistics, temperature, gradient)
            return gradient
        pairs = count_of_pairs(len(logits), len(targets)) * logits.shape[1]
        of_logits(
            logits,
            found,
            temperature=temperature,
            value=False,
            gradient=gradient,
            factor=incoming / pairs,
        )
    return gradient


def _rows_forward(
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    centre: Tensor | None,
    temperature: float,
    target_temperature: float,
    row_gradient: bool,
    weight_gradient: bool,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    found = _targets(targets, centre, target_temperature)
    with torch.autocast(rows.device.type, enabled=False):
        if triton:
            from fastmoco_kernels.soft_cross_entropy.launch import of_rows as run
        else:
            run = of_rows
        return run(
            rows,
            weight,
            found,
            temperature=temperature,
            row_gradient=row_gradient,
            weight_gradient=weight_gradient,
        )


_logits_op = torch.library.custom_op(
    "fastmoco::soft_cross_entropy", _logits_forward, mutates_args=()
)
_logits_backward_op = torch.library.custom_op(
    "fastmoco::soft_cross_entropy_backward", _logits_backward, mutates_args=()
)
_rows_op = torch.library.custom_op(
    "fastmoco::soft_cross_entropy_rows", _rows_forward, mutates_args=()
)


def statistics_size(V: int, Q: int, B: int, *, triton: bool) -> int:
    """Numbers that the kernels keep for the backward: two a row of logits, one a row of targets."""
    return (2 * V + Q) * B if triton else 0


@_logits_op.register_fake
def _(
    logits: Tensor,
    targets: Tensor,
    centre: Tensor | None,
    temperature: float,
    target_temperature: float,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(logits)
    V, B, _ = logits.shape
    kept = statistics_size(V, len(targets), B, triton=triton)
    return logits.new_empty((), dtype=dtype), logits.new_empty(kept, dtype=dtype)


@_logits_backward_op.register_fake
def _(
    incoming: Tensor,
    logits: Tensor,
    targets: Tensor,
    centre: Tensor | None,
    statistics: Tensor,
    temperature: float,
    target_temperature: float,
    triton: bool,
) -> Tensor:
    return logits.new_empty(logits.shape)


@_rows_op.register_fake
def _(
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    centre: Tensor | None,
    temperature: float,
    target_temperature: float,
    row_gradient: bool,
    weight_gradient: bool,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(rows)
    return (
        rows.new_empty((), dtype=dtype),
        rows.new_empty(rows.shape if row_gradient else (0,), dtype=dtype),
        weight.new_empty(weight.shape if weight_gradient else (0,), dtype=dtype),
    )


def _keep_logits(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, targets, centre, temperature, target_temperature, triton = inputs
    statistics = output[1]
    ctx.mark_non_differentiable(statistics)
    ctx.save_for_backward(logits, targets, centre, statistics)
    ctx.numbers = (temperature, target_temperature, triton)


def _logits_gradient(ctx: Any, incoming: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    arguments = (incoming, *ctx.saved_tensors, *ctx.numbers)
    run: Callable[..., Tensor] = _logits_backward_op if watched(arguments) else _logits_backward
    return _guarded(run(*arguments)), None, None, None, None, None


def _times(gradient: Tensor, incoming: Tensor) -> Tensor:
    """The product. Of the loss itself the incoming gradient is 1: where asking costs nothing, that
    saves a second tensor of the size of the weight."""
    if not watched((incoming,)) and incoming.device.type == "cpu" and incoming.item() == 1:
        return gradient
    return incoming * gradient


def _guarded(gradient: Tensor) -> Tensor:
    """With create_graph=True, a gradient that refuses to be differentiated."""
    if torch.is_grad_enabled():
        return once_differentiable(gradient, "soft_cross_entropy")
    return gradient


def keep_gradients(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Of a loss that has made both gradients in its forward."""
    _, drows, dweight = output
    ctx.mark_non_differentiable(drows, dweight)
    ctx.save_for_backward(drows, dweight)
    ctx.dtypes = (inputs[0].dtype, inputs[1].dtype)
    ctx.constants = len(inputs) - 2


def kept_gradients(ctx: Any, incoming: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """Those of rows and weight, which are the first inputs, times the incoming one."""
    gradients = [
        _guarded(_times(gradient, incoming).to(dtype)) if gradient.numel() else None
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    ]
    return (*gradients, *[None] * ctx.constants)


_logits_op.register_autograd(_logits_gradient, setup_context=_keep_logits)
_rows_op.register_autograd(kept_gradients, setup_context=keep_gradients)


class _EagerLogits(torch.autograd.Function):
    """The operator without torch.library's dispatch, which takes most of the host's time."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = _logits_forward(*inputs)
        _keep_logits(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *incoming: Any) -> Any:
        return _logits_gradient(ctx, *incoming)


class _EagerRows(torch.autograd.Function):
    """The same for rows and a weight."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = _rows_forward(*inputs)
        keep_gradients(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *incoming: Any) -> Any:
        return kept_gradients(ctx, *incoming)
