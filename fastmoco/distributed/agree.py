"""Decisions that must be the same on all ranks.

All ranks must call the same function at the same point of a run. Functions of numbers wait for the
device, functions of tensors do not. Without a process group each function returns its argument.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastmoco.distributed.mesh import group_size


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank.

    Args:
        flag: of this rank.
        device: where the process group communicates.
    """
    if group_size() == 1:
        return flag
    return bool(largest(torch.tensor(float(flag), device=device)).item())


def least(number: float, device: torch.device) -> float:
    """The least of the numbers of all ranks, in float64."""
    if group_size() == 1:
        return number
    numbers = torch.tensor(number, dtype=torch.float64, device=device)
    dist.all_reduce(numbers, op=dist.ReduceOp.MIN)
    return numbers.item()


def of_first_rank(number: int, device: torch.device) -> int:
    """The number of rank 0, for decisions by its clock or its files."""
    if group_size() == 1:
        return number
    shared = torch.tensor(number, dtype=torch.int64, device=device)
    dist.broadcast(shared, src=0)
    return int(shared)


def largest(numbers: Tensor) -> Tensor:
    """Elementwise largest over ranks, on the device; `numbers` is overwritten. No host sync."""
    if group_size() > 1:
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return numbers


def total(numbers: Tensor) -> Tensor:
    """Elementwise sum over ranks, on the device; `numbers` is overwritten. No host sync."""
    if group_size() > 1:
        dist.all_reduce(numbers)
    return numbers


def mean(numbers: Tensor) -> Tensor:
    """Elementwise mean over ranks, on the device; `numbers` is overwritten. No host sync."""
    if group_size() > 1:
        dist.all_reduce(numbers)
        numbers /= group_size()
    return numbers
