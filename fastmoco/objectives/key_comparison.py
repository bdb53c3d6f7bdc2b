"""Queries of each view compared with the keys of the other view of all ranks, which are gathered or
come in a ring; or those of one view alone. The references are written out.

A part of MoCo v3 and of methods built on it: they differ in what makes the keys.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from fastmoco.distributed.gather import gather_keys, start_gathering
from fastmoco.distributed.mesh import group_rank
from fastmoco.distributed.ring import start_ring
from fastmoco_kernels import info_nce_loss
from fastmoco_kernels.info_nce.op import InfoNCEResult, symmetric_info_nce_loss
from fastmoco_kernels.info_nce.over_blocks import KeyBlock, info_nce_over_blocks
from fastmoco_kernels.info_nce.reference import positive_ranks_reference


def start_comparing(
    keys: Tensor, *, temperature: float, ring: bool | None, accuracy: bool = False
) -> Callable[[Tensor], InfoNCEResult]:
    """Start to exchange the keys of two views, and return what compares queries with those of all
    ranks.

    Keys leave in this call: compute the queries after it.

    Args:
        keys: [2, B, D] of both views, raw, constants; B equal on all ranks.
        temperature: > 0, divides the cosines.
        ring: as `Objective.ring`; without it keys are gathered.
        accuracy: whether to count how the positives rank among all keys.

    Returns:
        From queries [2, B, D], raw, of the same images, to the loss and, if asked for, the shares
        of queries whose positive ranks first, and among the first five. The loss is the sum of
        `2 * temperature * CE(u(q) u(keys)^T / temperature, rank * B + i)` over both directions:
        queries of view 1 with keys of view 2, and the other way round.
    """
    sent = torch.cat(keys.unbind(), dim=1)
    offset = group_rank() * len(sent)
    if ring:
        blocks_of_all = start_ring(sent)

        def from_the_ring(queries: Tensor) -> InfoNCEResult:
            q1, q2 = queries.unbind()
            blocks = (
                KeyBlock(rank * len(q1), tuple(rows.chunk(2, dim=1))[::-1])
                for rank, rows in blocks_of_all
            )
            return info_nce_over_blocks(
                (q1, q2),
                blocks,
                temperature=temperature,
                positive_offset=offset,
                precision=_precision(queries),
                accuracy=accuracy,
            )

        return from_the_ring
    finish_gathering = start_gathering(sent)

    def from_all_ranks(queries: Tensor) -> InfoNCEResult:
        q1, q2 = queries.unbind()
        keys1, keys2 = finish_gathering().chunk(2, dim=1)
        return symmetric_info_nce_loss(
            q1,
            keys2,
            q2,
            keys1,
            temperature=temperature,
            positive_offset=offset,
            precision=_precision(queries),
            accuracy=accuracy,
        )

    return from_all_ranks


def start_comparing_one_way(
    keys: Tensor, *, temperature: float, accuracy: bool = False
) -> Callable[[Tensor], InfoNCEResult]:
    """`start_comparing` for queries of one view alone, with gathered keys of the other.

    Args:
        keys: [B, D], raw, constants; B equal on all ranks.
        temperature: > 0, divides the cosines.
        accuracy: whether to count how the positives rank, by a pass of its own with all cosines.

    Returns:
        From queries [B, D], raw, of the same images, to `2 * temperature * CE`, and the shares.
    """
    offset = group_rank() * len(keys)
    finish_gathering = start_gathering(keys)

    def against_all_ranks(queries: Tensor) -> InfoNCEResult:
        found = finish_gathering()
        loss = info_nce_loss(
            queries,
            found,
            temperature=temperature,
            positive_offset=offset,
            precision=_precision(queries),
        )
        if not accuracy:
            return InfoNCEResult(loss, None, None)
        ranks = positive_ranks_reference(queries, found, positive_offset=offset)
        return InfoNCEResult(loss, *((ranks < first).to(loss.dtype).mean() for first in (1, 5)))

    return against_all_ranks


def _precision(queries: Tensor) -> str:
    """Of the products of the loss: in a float32 run they are exact."""
    exact = queries.dtype == torch.float32 and not torch.is_autocast_enabled(queries.device.type)
    return "fp32" if exact else "auto"


def info_nce_reference(
    queries: Tensor, keys: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """`start_comparing` and its comparison written out: the loss, and [2] shares of queries whose
    positive ranks first, and among the first five."""
    found = [
        one_way_reference(q, k, temperature)
        for q, k in zip(queries.unbind(), keys.flip(0).unbind(), strict=True)
    ]
    (loss1, shares1), (loss2, shares2) = found
    return loss1 + loss2, (shares1 + shares2) / 2


def one_way_reference(q: Tensor, k: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """`start_comparing_one_way` and its comparison written out: the loss, and [2] shares."""
    logits = normalize(q, dim=1) @ gather_keys(normalize(k, dim=1)).T / temperature
    positives = group_rank() * q.shape[0] + torch.arange(q.shape[0], device=q.device)
    found = logits.topk(min(5, logits.shape[1]), dim=1).indices == positives[:, None]
    shares = torch.stack([found[:, :1].any(1).to(q.dtype).mean(), found.any(1).to(q.dtype).mean()])
    return 2 * temperature * cross_entropy(logits, positives), shares
