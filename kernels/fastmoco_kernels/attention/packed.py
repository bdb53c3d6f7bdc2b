"""Attention over sequences of unequal length, packed one behind the other without padding.

``varlen`` is torch's varlen_attn (flash attention with sequence boundaries), ``xformers`` its memory_efficient_attention
with a BlockDiagonalMask; both need CUDA and 16-bit inputs. ``loop`` takes one sequence after the other through
`attention` on any device: the reference, and the path of the CPU. The two views of MoCo v3 have equal length and need
none of this: they are one batch.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fastmoco_kernels.attention.choice import require_xformers
from fastmoco_kernels.attention.op import attention, cast_by_autocast
from fastmoco_kernels.backends import choose_backend

PACKED_BACKENDS = ("varlen", "xformers", "loop")


def packed_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], *, backend: str = "auto") -> Tensor:
    """Attention inside each of several sequences: rows attend to the rows of their own sequence.

    ``softmax(q_s k_s^T / sqrt(d)) v_s`` for every sequence s (Vaswani et al. 2017, Eq. 1).

    Args:
        q: [total, A, d] floating point: the rows of all sequences in order, A heads of dimension d.
        k: [total, A, d], same dtype and device.
        v: [total, A, d], same dtype and device.
        lengths: rows of each sequence, at least 1 each; they sum to ``total``.
        backend: ``"auto"``, ``"varlen"``, ``"xformers"`` or ``"loop"``. Auto is ``varlen`` in bf16 and fp16 on CUDA
            where this torch has it, else ``loop``.

    Returns:
        [total, A, d] in the dtype of ``q`` (of autocast, where it is on), differentiable in all three inputs.

    Raises:
        ValueError: for shapes, dtypes, devices or lengths that do not fit together, an unknown backend, or one that
            does not run here.

    Numerics: as `attention`, sequence by sequence.
    Memory and cost: 4 A d sum(length^2) FLOPs forward; ``varlen`` and ``xformers`` keep no weights. Boundaries and masks
        are made once for each tuple of lengths and kept for the last 64 of them.
    Distributed: none.

    Example:
        >>> import torch
        >>> packed_attention(*torch.ones(3, 7, 2, 8), lengths=[3, 4]).shape
        torch.Size([7, 2, 8])
    """
    _check(q, k, v, lengths)
    q, k, v = cast_by_autocast(q, k, v)
    on_chip = q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16)
    default = "varlen" if on_chip and _has_varlen() else "loop"
    name = choose_backend("packed_attention", backend, default, PACKED_BACKENDS)
    if name == "loop":
        return _loop(q, k, v, lengths)
    if not on_chip:
        raise ValueError(
            f"packed_attention: backend={name!r} in {q.dtype} on {q.device}; it needs float16 or bfloat16 on CUDA, "
            "or take backend='loop'"
        )
    return _varlen(q, k, v, lengths) if name == "varlen" else packed_by_xformers(q, k, v, lengths)


def packed_by_xformers(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """All sequences as one row of xformers' batch, kept apart by a block-diagonal mask.

    Args:
        q: [total, A, d].
        k: [total, A, d].
        v: [total, A, d].
        lengths: rows of each sequence.

    Raises:
        ValueError: if xformers is missing or of another version.
    """
    require_xformers()
    from xformers.ops import memory_efficient_attention

    mask = _block_diagonal(tuple(lengths), q.device)
    out: Tensor = memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask)
    return out[0]


@functools.lru_cache(maxsize=64)
def _block_diagonal(lengths: tuple[int, ...], device: torch.device) -> Any:
    from xformers.ops.fmha import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens(list(lengths), device=device)


@functools.cache
def _has_varlen() -> bool:
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


def _varlen(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    if not _has_varlen():
        raise ValueError(
            f"packed_attention: backend='varlen', but torch {torch.__version__} has no torch.nn.attention.varlen"
        )
    from torch.nn.attention.varlen import varlen_attn

    starts = _starts(tuple(lengths), q.device)
    out = varlen_attn(q, k, v, starts, starts, max(lengths), max(lengths))
    assert isinstance(out, Tensor)  # a pair only where more than the output is asked for
    return out


@functools.lru_cache(maxsize=64)
def _starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """[sequences + 1] int32: where each sequence begins, and the total."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def _loop(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    parts = [torch.split(t, list(lengths)) for t in (q, k, v)]
    found = [attention(*(t.transpose(0, 1)[None] for t in sequence)) for sequence in zip(*parts, strict=True)]
    return torch.cat([out[0].transpose(0, 1) for out in found])


def _check(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> None:
    """Every way of calling the op wrongly, each with both numbers in its text."""
    if q.dim() != 3 or not (q.shape == k.shape == v.shape):
        raise ValueError(
            f"packed_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} must be three [total, A, d]"
        )
    if not (q.is_floating_point() and q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        raise ValueError(
            f"packed_attention: q is {q.dtype} on {q.device}, k {k.dtype} on {k.device}, v {v.dtype} on {v.device}; "
            "they must agree, and be floating point"
        )
    if not lengths or min(lengths) < 1:
        raise ValueError(f"packed_attention: lengths={list(lengths)[:8]}: needs sequences of at least 1 row each")
    if sum(lengths) != q.shape[0]:
        raise ValueError(f"packed_attention: lengths sum to {sum(lengths)}, but q has {q.shape[0]} rows")
