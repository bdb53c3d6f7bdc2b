"""Exchange of rows among ranks: keys and features of all ranks, in rank order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastmoco.distributed.mesh import group_rank, group_size

# torch renamed this function in 2.13, and every process warns of the old name.
all_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Gather tensors of the same shape from all ranks into one tensor, in rank order."""


def gather_keys(keys: Tensor) -> Tensor:
    """Concatenate the keys of all ranks; row `rank * B + i` is row i of that rank.

    Keys come from the momentum encoder and have no gradient, nor does the result (Chen, Xie, He
    2021). The positives of this rank's queries are the rows `rank * B + i`.

    Args:
        keys: [B, D], any dtype; B and D must be equal on all ranks.

    Returns:
        [N, D] with N = B * world size; with one process `keys` itself, detached.

    Raises:
        ValueError: if B differs between ranks, on the CPU only. There gloo would return rows of
            zeros without an error. On CUDA the check would wait for the device in every step; the
            loader gives equal parts by construction.
    """
    return start_gathering(keys)()


def start_gathering(keys: Tensor) -> Callable[[], Tensor]:
    """Start `gather_keys`, and return a function that waits for the result.

    Work in between overlaps with communication.
    """
    keys = keys.detach()
    world_size = group_size()
    if world_size == 1:
        return lambda: keys
    if keys.device.type == "cpu":
        require_equal_counts(keys)
    gathered = keys.new_empty((world_size * keys.shape[0], *keys.shape[1:]))
    work = all_gather_single(gathered, keys.contiguous(), async_op=True)

    def finish() -> Tensor:
        work.wait()
        return gathered

    return finish


def gather_rows(rows: Tensor, device: torch.device) -> Tensor:
    """Concatenate tensors of different lengths from all ranks, in rank order, on every rank.

    Args:
        rows: [n, ...] on the CPU; all but n must be equal on all ranks.
        device: on which the process group communicates.

    Returns:
        [sum of n, ...] on the CPU, without gradient; with one process `rows` itself, detached.
    """
    rows = rows.detach()
    if group_size() == 1:
        return rows
    counts = _counts(rows.to(device))
    padded = rows.new_zeros((max(counts), *rows.shape[1:]), device=device)
    padded[: rows.shape[0]] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)]).cpu()


def gather_numbers(numbers: Tensor) -> Tensor:
    """The numbers [c] of every rank, [ranks, c], on every rank; they must be on the device on which
    the process group communicates.
    """
    if group_size() == 1:
        return numbers[None]
    gathered = [torch.empty_like(numbers) for _ in range(group_size())]
    dist.all_gather(gathered, numbers)
    return torch.stack(gathered)


def fill_parts_(whole: Tensor, counts: Sequence[int]) -> None:
    """Fill in, in place, the parts of the other ranks of a tensor in which every rank has written
    its own part. Takes no further memory, unlike `gather_rows`.

    Args:
        whole: [sum of counts, ...], contiguous, equal in shape on all ranks, on the device on which
            the process group communicates. Parts are in rank order.
        counts: rows of each rank, equal on all ranks.
    """
    if group_size() == 1:
        return
    for rank, part in enumerate(torch.split(whole, list(counts))):
        if len(part):
            dist.broadcast(part, src=rank)


def exchange_rows(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Give each rank what all ranks have computed for it.

    Args:
        rows: [sum of counts, ...], contiguous, on the device on which the process group
            communicates; the first `counts[0]` rows are for rank 0, and so on.
        counts: rows for each rank, equal on all ranks.

    Returns:
        [ranks, counts[rank], ...]: the rows for this rank from each rank, in rank order.
    """
    if group_size() == 1:
        return rows[None]
    ranks, mine = group_size(), counts[group_rank()]
    received = rows.new_empty((ranks, mine, *rows.shape[1:]))
    flat = received.view(ranks * mine, *rows.shape[1:])
    dist.all_to_all_single(flat, rows, [mine] * ranks, list(counts))
    return received


def require_equal_counts(keys: Tensor, group: Any = None) -> None:
    """Refuse numbers of rows that differ between ranks; the host waits for the device.

    Raises:
        ValueError: on every rank, with all numbers.
    """
    rows = _counts(keys, group)
    if set(rows) != {keys.shape[0]}:
        raise ValueError(
            f"keys per rank={rows}: every rank must have the same number of images in a step"
        )


def _counts(rows: Tensor, group: Any = None) -> list[int]:
    """Length of every rank's tensor."""
    mine = torch.tensor([rows.shape[0]], dtype=torch.int64, device=rows.device)
    ranks = group_size() if group is None else dist.get_world_size(group)
    counts = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(counts, mine, group=group)
    return [int(count) for count in counts]
