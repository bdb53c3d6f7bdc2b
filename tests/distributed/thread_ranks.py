"""Threads that stand for ranks, for functions that ask little of their peers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor


class ThreadRanks:
    """A number of ranks, and the collectives among them, to be put in place of real ones.

    Every rank must call a collective; a rank that waits for a minute fails.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._own = threading.local()
        self._barrier = threading.Barrier(count, timeout=60)
        self._given: list[Tensor] = [torch.empty(0)] * count

    def rank(self) -> int:
        """The rank of the calling thread."""
        return int(self._own.rank)

    def size(self) -> int:
        """The number of ranks."""
        return self.count

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, in their order."""
        return torch.cat(self._exchanged(rows))

    def total(self, numbers: Tensor) -> Tensor:
        """Sums over ranks."""
        return torch.stack(self._exchanged(numbers)).sum(0)

    def largest(self, numbers: Tensor) -> Tensor:
        """Largest over ranks."""
        return torch.stack(self._exchanged(numbers)).amax(0)

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """Results of `work(rank)` of all ranks."""

        def started(rank: int) -> Any:
            self._own.rank = rank
            return work(rank)

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(started, range(self.count)))

    def _exchanged(self, tensor: Tensor) -> list[Tensor]:
        self._given[self.rank()] = tensor.detach().clone()
        self._barrier.wait()
        every = list(self._given)
        self._barrier.wait()
        return every
