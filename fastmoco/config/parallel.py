"""Config of how a model is distributed over the processes of a run. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from fastmoco_pipelines.spec import require

Strategy = Literal["auto", "ddp", "fsdp", "hsdp"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How several processes share one model; a single process ignores this. docs/distributed.md
    explains which strategy to choose."""

    strategy: Strategy = "auto"
    """`ddp`: every process holds the whole state. `fsdp`: each holds a part of every tensor, and a
    block is gathered while it computes. `hsdp`: `fsdp` within groups of `shard_size` processes, and
    each group holds a copy. `auto`: `ddp` if the state takes at most a quarter of a GPU, else
    `fsdp`. All give the same losses up to rounding."""
    shard_size: int = 0
    """Processes that share one copy with `hsdp`; 0: those of one machine."""
    verify_replicas_every: int = 100
    """Steps between two bitwise comparisons of the state that all processes share; 0: never."""

    def __post_init__(self) -> None:
        require(
            self.strategy in get_args(Strategy),
            "strategy",
            self.strategy,
            f"must be one of {get_args(Strategy)}",
        )
        size = self.shard_size
        rule = "must be 0 or at least 2"
        require(size == 0 or size >= 2, "shard_size", size, rule)
        given_for = self.strategy == "hsdp" or size == 0
        require(given_for, "shard_size", size, f"is for strategy hsdp, not {self.strategy}")
        every = self.verify_replicas_every
        require(every >= 0, "verify_replicas_every", every, "must not be negative")
