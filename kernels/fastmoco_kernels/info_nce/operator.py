"""`fastmoco::info_nce`: the one-pass loss as one operator of torch, with its gradient.

The operator computes the gradient in its forward, where it is nearly free, and returns it as
further results; the backward multiplies it by the incoming gradient. So nothing of size B x N is
kept, and a graph compiler sees one node. Where nothing watches torch's calls, an autograd function
calls the pass directly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmoco_kernels.backends import accumulation_dtype
from fastmoco_kernels.info_nce.chunked import OnePass, Request, info_nce_chunked
from fastmoco_kernels.tensors import all_plain, traced

_Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
_SCHEMA = (
    "(Tensor q, Tensor keys, Tensor? second_q, Tensor? second_keys, "
    "Tensor? temperature, float fixed_temperature, float scale, int positive_offset, "
    "bool gradient, bool key_gradient, bool accuracy, str precision, bool triton, "
    "Tensor? queue=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class _Values(NamedTuple):
    """The operator's arguments, in the order of its schema: a `Request` and its tensors, flat."""

    q: Tensor
    keys: Tensor
    second_q: Tensor | None
    second_keys: Tensor | None
    temperature: Tensor | None
    fixed_temperature: float
    scale: float
    positive_offset: int
    gradient: bool
    key_gradient: bool
    accuracy: bool
    precision: str
    triton: bool
    queue: Tensor | None = None


def one_pass(
    queries: tuple[Tensor, ...],
    keys: tuple[Tensor, ...],
    request: Request,
    *,
    triton: bool,
    queue: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss, differentiable as requested, and hits, of one direction or two.

    Args:
        queries: one or two [B, D].
        keys: as many [N, D].
        request: what is wanted.
        triton: the kernels; else chunks in torch.
        queue: [K, D] negatives of one direction, whose `keys` are then positives alone.
    """
    temperature, fixed_temperature = (
        (request.temperature, 0.0)
        if isinstance(request.temperature, Tensor)
        else (None, request.temperature)
    )
    values = _Values(
        queries[0],
        keys[0],
        queries[1] if len(queries) > 1 else None,
        keys[1] if len(keys) > 1 else None,
        temperature,
        fixed_temperature,
        request.scale,
        request.positive_offset,
        request.gradient,
        request.key_gradient,
        request.accuracy,
        request.precision,
        triton,
        queue,
    )
    given = queries + keys + (() if queue is None else (queue,))
    watched = traced() or torch._C._are_functorch_transforms_active() or not all_plain(given)
    run: Callable[..., _Results] = _info_nce if watched else _Eager.apply
    results = run(*values)
    return results[0], results[4]


def _compute(values: _Values) -> _Results:
    """The pass itself; its results may share memory."""
    q, keys, temperature = values.q, values.keys, values.temperature
    request = Request(
        temperature=values.fixed_temperature
        if temperature is None
        else temperature.detach().to(accumulation_dtype(q)),
        scale=values.scale,
        positive_offset=values.positive_offset,
        gradient=values.gradient,
        key_gradient=values.key_gradient,
        accuracy=values.accuracy,
        precision=values.precision,
    )
    queries = (q,) if values.second_q is None else (q, values.second_q)
    all_keys = (keys,) if values.second_keys is None else (keys, values.second_keys)
    with torch.autocast(q.device.type, enabled=False):
        if values.triton:
            from fastmoco_kernels.info_nce.launch import info_nce_triton

            found = info_nce_triton(queries, all_keys, request, queue=values.queue)
        else:
            found = info_nce_chunked(queries, all_keys, request, queue=values.queue)
    return _as_results(found, q, keys, learnt=temperature is not None)


@torch.library.custom_op("fastmoco::info_nce", mutates_args=(), schema=_SCHEMA)
def _info_nce(*arguments: Any) -> _Results:
    results = _compute(_Values(*arguments))
    # An operator's results share no memory; those of a few numbers may be parts of one tensor.
    loss, dq, dkeys, dtemperature, hits = (
        part.clone() if part.numel() < 3 else part for part in results
    )
    return loss, dq, dkeys, dtemperature, hits


def _as_results(found: OnePass, q: Tensor, keys: Tensor, *, learnt: bool) -> _Results:
    return (
        found.loss,
        found.dq.to(kept_dtype(q)),
        found.dkeys.to(kept_dtype(keys)),
        found.dtemperature if learnt and found.dtemperature.numel() else found.loss.new_empty(0),
        found.hits,
    )


def kept_dtype(tensor: Tensor) -> torch.dtype:
    """float32 for fp16, which would flush gradients that a loss scaler has not scaled yet."""
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype


@_info_nce.register_fake
def _(*arguments: Any) -> _Results:
    values = _Values(*arguments)
    q, keys = values.q, values.keys
    dtype = accumulation_dtype(q)
    directions = 1 if values.second_q is None else 2
    learnt = values.gradient and values.temperature is not None
    return (
        q.new_empty((), dtype=dtype),
        q.new_empty((directions, *q.shape) if values.gradient else (0,), dtype=kept_dtype(q)),
        keys.new_empty(tuple(keys.shape) if values.key_gradient else (0,), dtype=kept_dtype(keys)),
        q.new_empty(() if learnt else (0,), dtype=dtype),
        q.new_empty((2,) if values.accuracy else (0,), dtype=dtype),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Results) -> None:
    values = _Values(*inputs)
    _, dq, dkeys, dtemperature, hits = output
    ctx.mark_non_differentiable(dq, dkeys, dtemperature, hits)
    ctx.save_for_backward(dq, dkeys, dtemperature)
    temperature = values.temperature
    ctx.dtypes = (
        values.q.dtype,
        values.keys.dtype,
        None if temperature is None else temperature.dtype,
    )


def _backward(ctx: Any, incoming: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    dq, dkeys, dtemperature = ctx.saved_tensors
    q_dtype, key_dtype, temperature_dtype = ctx.dtypes
    wanted = ctx.needs_input_grad

    def scaled(gradient: Tensor, dtype: torch.dtype) -> Tensor:
        result = (incoming * gradient).to(dtype)
        if torch.is_grad_enabled():  # create_graph=True: what the forward computed has no graph
            return once_differentiable(result, "info_nce_loss")
        return result

    both = scaled(dq, q_dtype) if wanted[0] and wanted[2] else None  # one launch instead of two
    return (
        (scaled(dq[0], q_dtype) if both is None else both[0]) if wanted[0] else None,
        scaled(dkeys, key_dtype) if wanted[1] else None,
        (scaled(dq[1], q_dtype) if both is None else both[1]) if wanted[2] else None,
        None,
        scaled(dtemperature, temperature_dtype)
        if temperature_dtype is not None and wanted[4]
        else None,
        *[None] * 9,
    )


class _Eager(torch.autograd.Function):
    """The operator without torch.library's dispatch, which takes most of the host's time."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        results = _compute(_Values(*inputs))
        _setup_context(ctx, inputs, results)
        return results

    @staticmethod
    def backward(ctx: Any, *incoming: Any) -> Any:
        return _backward(ctx, *incoming)


class _OnceOnly(torch.autograd.Function):
    """Passes a gradient on, and refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, gate: Tensor, op: str) -> Tensor:
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.op}: the gradient was computed in the forward and cannot be "
            "differentiated again; "
            "backend='reference' can be differentiated any number of times"
        )


def once_differentiable(gradient: Tensor, op: str) -> Tensor:
    """The gradient, whose own derivative is refused in words that name the op."""
    gate = torch.zeros((), requires_grad=True)
    result: Tensor = _OnceOnly.apply(gradient, gate, op)  # type: ignore[no-untyped-call]
    return result


_info_nce.register_autograd(_backward, setup_context=_setup_context)
