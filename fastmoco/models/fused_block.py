"""A transformer block as one autograd node that defines its saved tensors and
every pass of its backward.

Saved: the stream, the statistics of both norms, the stacked projections, the output of attention,
its projection (the branch), and the hidden layer: 11 elements of 16 bits per token and channel.
Norms, GELU and the second sum are recomputed, each in the kernel that computes the gradient through
it and the sums for biases and norm weights (`fastmoco_kernels.fused_block`). One sum over rows
needs its own pass: the gradient of the block's branch, for the bias of its last product. The kernel
that computes this gradient runs in the next block, for which FSDP2 has gathered other weights.

With `remakes` only the stream, the statistics and the branch are saved, 3 elements of 16 bits. The
backward recomputes projections, attention and hidden layer, but neither the branch nor the last
product, so it costs less than a second forward.

Attention has its own backward: its part of the graph is built and kept inside this node. Weights
are saved as parameters and cast again in the backward, so FSDP2 may free them in between.

Legend: B images, L tokens, E width, F hidden width, A heads, d = E / A; R = B L rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoco_kernels import attention
from fastmoco_kernels.fused_block.op import (
    gelu_backward,
    kernels_fit,
    norm_backward,
    norm_forward,
    stack_qkv,
)


class Weights(NamedTuple):
    """A block's parameters, in the order of their use."""

    norm1: Tensor
    norm1_bias: Tensor
    qkv: Tensor
    qkv_bias: Tensor
    proj: Tensor
    proj_bias: Tensor
    norm2: Tensor
    norm2_bias: Tensor
    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor
    fc2_bias: Tensor


class Form(NamedTuple):
    """Everything that defines a block except its weights."""

    num_heads: int
    eps: tuple[float, float]
    """Of the first norm and the second."""
    attention: str
    """Backend of `fastmoco_kernels.attention`."""
    remakes: bool = False
    """Whether the backward recomputes products and attention instead of keeping their results."""


def fused_block(
    x_BLE: Tensor, branch_BLE: Tensor | None, weights: Weights, form: Form
) -> tuple[Tensor, Tensor]:
    """Stream and branch, [B, L, E] each, to stream and branch: the values of `Block` with the
    backward of this module.

    Products and norms have the dtype of autocast if it is on and the stream is not float64,
    otherwise the stream's dtype. Differentiable once.

    Args:
        x_BLE: the residual stream, floating point.
        branch_BLE: is added to the stream, in a dtype no wider than the stream's; or None.
        weights: of the block, in the stream's dtype or narrower.
        form: heads, epsilons, attention backend and recomputation.

    Raises:
        ValueError: if the branch has a wider dtype than the stream.
    """
    if branch_BLE is not None and torch.promote_types(x_BLE.dtype, branch_BLE.dtype) != x_BLE.dtype:
        raise ValueError(
            f"fused block: the branch is {branch_BLE.dtype}, wider than the stream, {x_BLE.dtype}"
        )
    dtype = x_BLE.dtype
    kind = x_BLE.device.type
    if dtype != torch.float64 and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        if torch.is_grad_enabled():
            found: tuple[Tensor, Tensor] = _FusedBlock.apply(
                form, dtype, x_BLE, branch_BLE, *weights
            )  # type: ignore[no-untyped-call]
            return found
        return _forward(form, dtype, x_BLE, branch_BLE, weights).out


class _Forward(NamedTuple):
    """Results, and intermediate tensors that the backward needs."""

    out: tuple[Tensor, Tensor]
    stream: Tensor | None
    """The sum of the block's inputs, if there are two."""
    statistics: tuple[Tensor, Tensor, Tensor, Tensor]
    qkv: tuple[Tensor, Tensor, Tensor]
    attended: Tensor
    """[B, A, L, d], with its graph from `qkv` if `keep` was set."""
    branch: Tensor
    hidden: Tensor


def _forward(
    form: Form,
    dtype: torch.dtype,
    x: Tensor,
    branch: Tensor | None,
    weights: Weights,
    *,
    keep: bool = False,
) -> _Forward:
    """Compute the block; `keep`: keep the graph of attention."""
    triton = kernels_fit(x)
    w = weights
    stream, y1, mean1, rstd1 = norm_forward(
        x, branch, w.norm1, w.norm1_bias, form.eps[0], dtype, triton
    )
    stream = x if branch is None else stream
    q, k, v = _heads(F.linear(y1, w.qkv.to(dtype), w.qkv_bias.to(dtype)), form.num_heads)
    del y1
    (q, k, v), attended = _attend((q, k, v), form, keep=keep)
    a = F.linear(_tokens(attended.detach()), w.proj.to(dtype), w.proj_bias.to(dtype))
    x2, y2, mean2, rstd2 = norm_forward(
        stream, a, w.norm2, w.norm2_bias, form.eps[1], dtype, triton
    )
    hidden = F.linear(y2, w.fc1.to(dtype), w.fc1_bias.to(dtype))
    del y2
    m = F.linear(F.gelu(hidden), w.fc2.to(dtype), w.fc2_bias.to(dtype))
    return _Forward(
        out=(x2, m),
        stream=None if branch is None else stream,
        statistics=(mean1, rstd1, mean2, rstd2),
        qkv=(q, k, v),
        attended=attended,
        branch=a,
        hidden=hidden,
    )


class _FusedBlock(torch.autograd.Function):
    """The block as one node."""

    @staticmethod
    def forward(
        ctx: Any, form: Form, dtype: torch.dtype, x: Tensor, branch: Tensor | None, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        made = _forward(form, dtype, x, branch, Weights(*weights), keep=not form.remakes)
        stream = x if made.stream is None else made.stream
        ctx.save_for_backward(
            stream, *made.statistics, made.branch, None if form.remakes else made.hidden, *weights
        )
        ctx.attention = None if form.remakes else (made.qkv, made.attended)
        ctx.form = form
        ctx.used = False
        ctx.branch_dtype = None if branch is None else branch.dtype
        ctx.set_materialize_grads(False)
        return made.out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        stream, mean1, rstd1, mean2, rstd2, a, hidden, *parameters = ctx.saved_tensors
        if ctx.used:
            raise RuntimeError(
                "a fused block supports one backward pass; use model.blocks modules for several"
            )
        kept = ctx.attention
        ctx.attention = None
        ctx.used = True
        # The memory of a step peaks here, so every tensor is freed after its last use.
        ctx.maybe_clear_saved_tensors()
        w = Weights(*parameters)
        dtype = a.dtype
        triton = kernels_fit(stream)
        if kept is None:
            with torch.autocast(stream.device.type, enabled=False):
                kept, hidden = _remade(ctx.form, dtype, stream, a, w)
        qkv, attended = kept
        del kept
        dx2, dm = gradients
        del gradients
        with torch.autocast(stream.device.type, enabled=False):
            # MLP: second product, GELU, first product.
            dm_RE = _rows(torch.zeros_like(a) if dm is None else dm)
            del dm
            dfc2_bias = dm_RE.sum(0, dtype=mean1.dtype)
            gelu, dhidden, dfc1_bias = gelu_backward(dm_RE @ w.fc2.to(dtype), _rows(hidden), triton)
            del hidden
            dfc2 = dm_RE.t() @ gelu
            del dm_RE, gelu
            dy2 = (dhidden @ w.fc1.to(dtype)).view_as(a)

            # Second norm and the residual sum before it.
            narrow = None if dtype == stream.dtype else dtype
            dx1, da, y2, dnorm2 = norm_backward(
                dy2, dx2, stream, a, w.norm2, w.norm2_bias, mean2, rstd2, narrow, triton
            )
            del dy2, dx2, a
            dfc1 = dhidden.t() @ _rows(y2)
            del dhidden, y2

            # Output projection, attention, stacked projections.
            da_RE = _rows(dx1 if narrow is None else da)
            del da
            dproj = da_RE.t() @ _rows(_tokens(attended.detach()))
            B, A, L, d = attended.shape
            dattended = (da_RE @ w.proj.to(dtype)).view(B, L, A, d).transpose(1, 2)
            del da_RE
            parts = torch.autograd.grad(attended, qkv, dattended)
            del attended, qkv, dattended
            dqkv, dqkv_bias = stack_qkv(*parts, triton)
            del parts
            dqkv_RF = _rows(dqkv)
            dy1 = (dqkv_RF @ w.qkv.to(dtype)).view_as(stream)

            # First norm and the sum of the block's inputs.
            narrow = None if ctx.branch_dtype == stream.dtype else ctx.branch_dtype
            dx, dbranch, y1, dnorm1 = norm_backward(
                dy1, dx1, stream, None, w.norm1, w.norm1_bias, mean1, rstd1, narrow, triton
            )
            if narrow is None:
                dbranch = None if ctx.branch_dtype is None else dx

            dweights = Weights(
                norm1=dnorm1[0],
                norm1_bias=dnorm1[1],
                qkv=dqkv_RF.t() @ _rows(y1),
                qkv_bias=dqkv_bias,
                proj=dproj,
                proj_bias=dnorm2[2],
                norm2=dnorm2[0],
                norm2_bias=dnorm2[1],
                fc1=dfc1,
                fc1_bias=dfc1_bias,
                fc2=dfc2,
                fc2_bias=dfc2_bias,
            )
            return (
                None,
                None,
                dx,
                dbranch,
                *(g.to(p.dtype) for g, p in zip(dweights, w, strict=True)),
            )


def _attend(
    qkv: tuple[Tensor, Tensor, Tensor], form: Form, *, keep: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Attention of q, k, v; `keep`: with its own graph from the leaves that are returned."""
    with torch.set_grad_enabled(keep):
        if keep:
            q, k, v = (part.detach().requires_grad_() for part in qkv)
            qkv = q, k, v
        return qkv, attention(*qkv, backend=form.attention)


def _remade(
    form: Form, dtype: torch.dtype, stream: Tensor, a: Tensor, w: Weights
) -> tuple[tuple[tuple[Tensor, Tensor, Tensor], Tensor], Tensor]:
    """Recompute q, k, v, attention with its graph, and the hidden layer."""
    triton = kernels_fit(stream)
    y = norm_forward(stream, None, w.norm1, w.norm1_bias, form.eps[0], dtype, triton)[1]
    kept = _attend(
        _heads(F.linear(y, w.qkv.to(dtype), w.qkv_bias.to(dtype)), form.num_heads), form, keep=True
    )
    y = norm_forward(stream, a, w.norm2, w.norm2_bias, form.eps[1], dtype, triton)[1]
    return kept, F.linear(y, w.fc1.to(dtype), w.fc1_bias.to(dtype))


def _heads(qkv_BLF: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views q, k, v [B, A, L, d] of stacked projections [B, L, 3 E]."""
    B, L, F3 = qkv_BLF.shape
    q, k, v = (
        part.transpose(1, 2)
        for part in qkv_BLF.view(B, L, 3, num_heads, F3 // (3 * num_heads)).unbind(2)
    )
    return q, k, v


def _tokens(attended_BALd: Tensor) -> Tensor:
    """[B, A, L, d] -> [B, L, E]: a view if heads are adjacent in memory."""
    B, A, L, d = attended_BALd.shape
    return attended_BALd.transpose(1, 2).reshape(B, L, A * d)


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])
