"""Find the rank that slows down the others.

A step takes the same time on all ranks, because they wait for each other. Therefore only the part
of a step before the first collective is measured: the wait for data, and the trunks up to the
heads.

Under FSDP the trunks gather weights, so a rank with a slow trunk slows all of them, and only the
wait for data identifies a slow rank.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import nn

from fastmoco.distributed.gather import gather_rows
from fastmoco.distributed.mesh import World

SECTIONS = ("waiting for data", "in the encoders")
FACTOR = 1.5
LEAST_SECONDS = 0.02
"""A rank is reported if a section takes more than `FACTOR` times the median of its peers plus
`LEAST_SECONDS` per step."""


class Stragglers:
    """Call `begin` between a step's data and its forward, and `report` at log steps, on all ranks.

    Args:
        objective: an `Objective`; the first call of one of its heads ends the part of a step
            without collectives.
        world: this process among its peers; with a single process nothing is measured.
    """

    def __init__(self, objective: Any, world: World) -> None:
        self._world = world
        self._is_first = True
        self._steps = 0
        self._waited = 0.0
        self._busy = 0.0
        self._begun: float | torch.cuda.Event | None = None
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._known: set[tuple[int, int]] = set()
        if world.world_size > 1:
            heads: list[nn.Module] = [
                head for parts in objective.parts().values() for head in parts.heads.values()
            ]
            for head in heads:  # the first call counts
                head.register_forward_pre_hook(lambda *_: self._reached_head())

    def begin(self, wait_seconds: float) -> None:
        """Count a step, and the seconds for which it waited for data. The first one does not count:
        imports, compilation and a loader that has nothing yet take other times on each rank."""
        if self._is_first:
            self._is_first = False
            return
        self._steps += 1
        self._waited += wait_seconds
        self._begun = self._mark()

    def report(self, step: int) -> list[str]:
        """The ranks that have become slow since the last call; one collective, one host sync."""
        if self._world.world_size == 1 or not self._steps:
            return []

        # Seconds per step of every rank.
        for start, end in self._spans:
            end.synchronize()
            self._busy += start.elapsed_time(end) / 1000
        mine = torch.tensor([[self._waited, self._busy]], dtype=torch.float64) / self._steps
        rows = gather_rows(mine, self._world.device).tolist()
        self._steps = 0
        self._waited = 0.0
        self._busy = 0.0
        self._spans = []

        # Compare each with the median of its peers, and report what is new.
        slow: dict[tuple[int, int], tuple[float, float]] = {}
        for rank, row in enumerate(rows):
            for part in range(len(SECTIONS)):
                others = [other[part] for peer, other in enumerate(rows) if peer != rank]
                usual = statistics.median(others)
                if usual * FACTOR + LEAST_SECONDS < row[part]:
                    slow[rank, part] = (row[part], usual)

        fresh = slow.keys() - self._known
        self._known = set(slow)
        return [
            f"warning: step {step}: rank {rank} is slow, {slow[rank, part][0]:.3f} s per step "
            f"{SECTIONS[part]}, its peers take {slow[rank, part][1]:.3f} s"
            for rank, part in sorted(fresh)
        ]

    def _reached_head(self) -> None:
        begun = self._begun
        self._begun = None
        if isinstance(begun, float):
            self._busy += time.monotonic() - begun
        elif begun is not None:
            end = self._mark()
            assert not isinstance(end, float)  # noqa: S101 - a type: marks of one device are of one kind
            self._spans.append((begun, end))

    def _mark(self) -> float | torch.cuda.Event:
        if self._world.device.type != "cuda":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
