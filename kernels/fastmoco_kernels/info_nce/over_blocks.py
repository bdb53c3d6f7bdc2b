"""InfoNCE over keys that arrive in blocks, as from the other ranks of a ring: `info_nce_over_blocks`.

A block adds to running sums from which the positives are left out, and is not needed again. The
end brings in the positives, the loss, and the gradient through the normalisation. See
kernels/README.md, "Design notes".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmoco_kernels.backends import accumulation_dtype
from fastmoco_kernels.info_nce.chunked import ChunkedBlocks, OnePass, Request
from fastmoco_kernels.info_nce.op import (
    InfoNCEResult,
    check_arguments,
    chosen_backend,
    chosen_precision,
    inner_scale,
    wants_gradient,
)
from fastmoco_kernels.info_nce.operator import kept_dtype, once_differentiable
from fastmoco_kernels.info_nce.reference import info_nce_reference, positive_ranks_reference

NAME = "info_nce_over_blocks"


class KeyBlock(NamedTuple):
    """Some of the keys."""

    first: int
    """Number of the first row among all keys."""
    keys: tuple[Tensor, ...]
    """[n, D] raw keys for each direction, constants."""


def info_nce_over_blocks(
    queries: Sequence[Tensor],
    blocks: Iterable[KeyBlock],
    *,
    temperature: float | Tensor,
    positive_offset: int = 0,
    scale: float | None = None,
    precision: str = "auto",
    backend: str = "auto",
    accuracy: bool = False,
) -> InfoNCEResult:
    """`info_nce_loss`, added over one direction or two, of keys that are never all in memory.

    Each block is used as soon as it is taken from the iterator and let go before the next is asked
    for, except the first one. So the iterator can receive the next block while this one is
    computed.

    Args:
        queries: one or two [B, D] floating point, any stride, raw; of equal shape and dtype.
        blocks: the keys, every row once, in blocks of any lengths and in any order, but the first
            block must hold the positives of all queries. Taken once, also where no gradient is
            wanted.
        temperature: as for `info_nce_loss`.
        positive_offset: number of the key that is the positive of query 0.
        scale: factor of the mean of each direction; None for 2 * temperature (MoCo v3).
        precision: as for `info_nce_loss`.
        backend: as for `info_nce_loss`; "reference" keeps all blocks.
        accuracy: as for `symmetric_info_nce_loss`.

    Returns:
        The loss, differentiable once in the queries and in a temperature that is a tensor; top-1
        and top-5 shares, or None.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, no block, a first block without
            the positives, and as `info_nce_loss`.

    Numerics: as `info_nce_loss`. The order of the blocks is the order of the sums: the same blocks
        in the same order give the same bits, one block gives those of `symmetric_info_nce_loss`,
        and other divisions differ by rounding only.
    Memory and cost: FLOPs of `info_nce_loss`. `O(S (B + n) D)` for S directions and blocks of n
        keys, whatever the number of blocks. With the kernels every block after the first also
        reads and writes its parts of the sums, about `8 S B D` bytes a part.
    Distributed: none; the iterator may communicate. Not for torch.compile, whose graph holds no
        iterator.

    Example:
        >>> import torch
        >>> from fastmoco_kernels import KeyBlock, info_nce_over_blocks
        >>> q, k = torch.eye(8, requires_grad=True), torch.eye(8)
        >>> blocks = (KeyBlock(start, (k[start : start + 4],)) for start in (4, 0))
        >>> result = info_nce_over_blocks((q[4:],), blocks, temperature=0.2, positive_offset=4)
        >>> round(result.loss.item(), 4)
        0.0185
    """
    if len(queries) not in (1, 2):
        raise ValueError(f"{NAME}: queries for {len(queries)} directions; takes 1 or 2")
    source = iter(blocks)
    first = next(source, None)
    if first is None:
        raise ValueError(f"{NAME}: blocks is empty; the first block holds the positives")
    _checked(first, queries, first)
    for q, k in zip(queries, first.keys, strict=True):
        check_arguments(q, k, temperature, positive_offset - first.first, precision, NAME)
    chosen = chosen_backend(queries[0], temperature, precision, backend, NAME)

    # Not a generator, which would hold the last block while the next one arrives.
    rest = map(partial(_checked, queries=queries, first=first), source)
    if chosen == "reference":
        every = (first, *rest)
        return _reference(queries, every, temperature, positive_offset, scale, accuracy)
    request = Request(
        temperature=temperature,
        scale=inner_scale(temperature, scale),
        positive_offset=positive_offset,
        gradient=wants_gradient(*queries, temperature),
        accuracy=accuracy,
        precision=chosen_precision(temperature, precision),
    )
    learnt = temperature if isinstance(temperature, Tensor) else None
    loss, hits = _OverBlocks.apply(  # type: ignore[no-untyped-call]
        request, first, rest, chosen == "triton", learnt, *queries
    )
    if learnt is not None and scale is None:
        loss = loss * (2 * learnt)
    return InfoNCEResult(loss, hits[0], hits[1]) if accuracy else InfoNCEResult(loss, None, None)


class _OverBlocks(torch.autograd.Function):
    """The pass, with the gradient computed in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        request: Request,
        first: KeyBlock,
        rest: Iterator[KeyBlock],
        triton: bool,
        temperature: Tensor | None,
        *queries: Tensor,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(queries[0].device.type, enabled=False):
            if temperature is not None:
                wide = temperature.detach().to(accumulation_dtype(queries[0]))
                request = replace(request, temperature=wide)
            found = _pass(queries, request, first, rest, triton=triton)
        ctx.save_for_backward(found.dq.to(kept_dtype(queries[0])), found.dtemperature)
        ctx.dtypes = (None if temperature is None else temperature.dtype, queries[0].dtype)
        ctx.mark_non_differentiable(found.hits)
        return found.loss, found.hits

    @staticmethod
    def backward(ctx: Any, incoming: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        dq, dtemperature = ctx.saved_tensors
        temperature_dtype, dtype = ctx.dtypes
        wanted = ctx.needs_input_grad

        def scaled(gradient: Tensor, dtype: torch.dtype) -> Tensor:
            result = (incoming * gradient).to(dtype)
            if not torch.is_grad_enabled():
                return result
            return once_differentiable(result, "info_nce_over_blocks")

        return (
            *[None] * 4,
            scaled(dtemperature, temperature_dtype) if wanted[4] else None,
            *(
                scaled(part, dtype) if want else None
                for part, want in zip(dq, wanted[5:], strict=True)
            ),
        )


def _pass(
    queries: Sequence[Tensor],
    request: Request,
    first: KeyBlock,
    rest: Iterator[KeyBlock],
    *,
    triton: bool,
) -> OnePass:
    """All blocks added, and the end."""
    sums: Any
    if triton:
        from fastmoco_kernels.info_nce.launch import TritonBlocks

        sums = TritonBlocks(queries, request)
    else:
        sums = ChunkedBlocks(queries, request)
    sums.add(first.keys, request.positive_offset - first.first)
    for block in rest:
        sums.add(block.keys, request.positive_offset - block.first)
        del block  # its memory may be what the iterator needs next
    found: OnePass = sums.finish()
    return found


def _reference(
    queries: Sequence[Tensor],
    blocks: Sequence[KeyBlock],
    temperature: float | Tensor,
    positive_offset: int,
    scale: float | None,
    accuracy: bool,
) -> InfoNCEResult:
    """From the definition, with all keys in one tensor."""
    loss, ranks = queries[0].new_zeros((), dtype=accumulation_dtype(queries[0])), []
    offset = positive_offset - blocks[0].first
    for s, q in enumerate(queries):
        keys = torch.cat([block.keys[s] for block in blocks])
        loss = loss + info_nce_reference(
            q, keys, temperature=temperature, positive_offset=offset, scale=scale
        )
        if accuracy:
            ranks.append(positive_ranks_reference(q, keys, positive_offset=offset))
    if not accuracy:
        return InfoNCEResult(loss, None, None)
    every = torch.cat(ranks)
    return InfoNCEResult(loss, *((every < top).to(loss.dtype).mean() for top in (1, 5)))


def _checked(block: KeyBlock, queries: Sequence[Tensor], first: KeyBlock) -> KeyBlock:
    """The block; refuses one that does not fit, in words with both values."""
    if len(block.keys) != len(queries):
        raise ValueError(
            f"{NAME}: a block has keys for {len(block.keys)} directions but there are queries "
            f"for {len(queries)}"
        )
    expected = (queries[0], first.keys[0])
    for s, (q, k) in enumerate(zip(queries, block.keys, strict=True)):
        known = expected[0]
        if (q.shape, q.dtype, q.device) != (known.shape, known.dtype, known.device):
            raise ValueError(
                f"{NAME}: queries[{s}] is {_described(q)} but queries[0] is {_described(known)}"
            )
        known, rows = expected[1], block.keys[0].shape[:1]
        alike = (k.shape[1:], k.dtype, k.device) == (known.shape[1:], known.dtype, known.device)
        if k.dim() != 2 or k.shape[:1] != rows or not alike:
            raise ValueError(
                f"{NAME}: keys[{s}] of the block at row {block.first} are {_described(k)} but "
                f"keys[0] of the first block are {_described(known)}; all keys of a block are "
                f"[{rows.numel()}, D] and all blocks have one D, dtype and device"
            )
    return block


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
