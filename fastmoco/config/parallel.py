"""How a model is spread over the processes of a run. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from fastmoco_pipelines.spec import require

Strategy = Literal["auto", "ddp", "fsdp", "hsdp"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """Several processes and one model; one process ignores this. docs/distributed.md says when to take which."""

    strategy: Strategy = "auto"
    """``ddp``: every process holds the whole state. ``fsdp``: each holds a part of every tensor, and a block is put together
    while it computes. ``hsdp``: that among ``shard_size`` processes, whose groups are copies. ``auto``: ``ddp`` where the
    state takes at most a quarter of a GPU, else ``fsdp``. All train to the same losses, within rounding."""
    shard_size: int = 0
    """Processes that hold one copy under ``hsdp``; 0: those of one machine."""
    verify_replicas_every: int = 100
    """Steps between two comparisons of all that processes hold in common, bit by bit; 0: never."""

    def __post_init__(self) -> None:
        require(self.strategy in get_args(Strategy), "strategy", self.strategy, f"must be one of {get_args(Strategy)}")
        size, rule = self.shard_size, "must be 0 or at least 2"
        require(size == 0 or size >= 2, "shard_size", size, rule)
        given_for = self.strategy == "hsdp" or size == 0
        require(given_for, "shard_size", size, f"is for strategy hsdp, not {self.strategy}")
        every = self.verify_replicas_every
        require(every >= 0, "verify_replicas_every", every, "must not be negative")
