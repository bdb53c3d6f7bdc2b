"""Rows of the other ranks, a block at a time from the neighbour rank, while others are computed.

In `gather.py` every rank holds the rows of all ranks; here it holds three blocks, whatever the
number of ranks: its own, one in use and one that arrives.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastmoco.distributed.gather import require_equal_counts
from fastmoco.distributed.mesh import group_rank, group_size


class Block(NamedTuple):
    """The rows of one rank."""

    rank: int
    """Whose rows they are."""
    rows: Tensor
    """[B, ...] without gradient. Valid until the next block is taken, except the first block."""


def start_ring(rows: Tensor, group: Any = None) -> Iterator[Block]:
    """Start to send rows around the ring, and return the blocks of all ranks, this rank's first.

    Rank r gets those of ranks r, r - 1, r - 2 and so on, modulo the number of ranks. The first
    exchange starts in this call. When a block is taken, the exchange that brings the next one has
    started, so it overlaps with the work on the block: on CUDA by the streams of NCCL, on the CPU
    by the threads of gloo. Take all blocks: another rank waits for those that pass here.

    Every exchange is one message to the next rank and one from the one before. A rank that fails
    ends the others with an error: at once where its connection breaks, else at the timeout of the
    process group.

    Args:
        rows: [B, ...] of any floating dtype, equal in shape on all ranks. Must not be written
            before the last block is taken.
        group: the process group; None: all ranks of the run.

    Returns:
        An iterator over as many blocks as there are ranks, to be used once.

    Raises:
        ValueError: if B differs between ranks, on the CPU only, as for `gather_keys`.
    """
    rows = rows.detach().contiguous()
    ranks = dist.get_world_size(group) if group is not None else group_size()
    if ranks == 1:
        return iter([Block(0, rows)])
    rank = dist.get_rank(group) if group is not None else group_rank()
    if rows.device.type == "cpu":
        require_equal_counts(rows, group)
    arriving = torch.empty_like(rows)
    work = _exchange(rows, arriving, rank, ranks, group)
    return _blocks(rows, arriving, work, rank, ranks, group)


def _blocks(
    own: Tensor, arriving: Tensor, work: list[Any], rank: int, ranks: int, group: Any
) -> Iterator[Block]:
    """The blocks; `work` brings the first of another rank into `arriving`."""
    yield Block(rank, own)
    free = None
    for step in range(1, ranks):
        for part in work:
            part.wait()
        current = arriving

        # What this rank has used and sent takes the next block. Its own rows stay as they are.
        if step < ranks - 1:
            arriving = torch.empty_like(own) if free is None else free
            work = _exchange(current, arriving, rank, ranks, group)
        yield Block((rank - step) % ranks, current)
        free = current


def _exchange(send: Tensor, receive: Tensor, rank: int, ranks: int, group: Any) -> list[Any]:
    """Start to send to the next rank and to receive from the one before."""
    following, before = (rank + 1) % ranks, (rank - 1) % ranks
    if group is not None:
        following = dist.get_global_rank(group, following)
        before = dist.get_global_rank(group, before)
    # Both in one batch: NCCL would otherwise wait for one before it starts the other.
    operations = [
        dist.P2POp(dist.isend, send, following, group),
        dist.P2POp(dist.irecv, receive, before, group),
    ]
    return list(dist.batch_isend_irecv(operations))
