"""Who is slow is told from the parts of a step that wait for nobody."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastmoco.distributed.mesh import World
from fastmoco.models.encoder import Parts
from fastmoco.telemetry import stragglers
from fastmoco.telemetry.stragglers import Stragglers

pytestmark = pytest.mark.faults


class Objective(nn.Module):
    """Two encoders with heads, which take the time that they are told to."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.encoder, self.momentum_encoder = nn.Sequential(), nn.Sequential()
        self.encoder.head, self.momentum_encoder.head = nn.Identity(), nn.Identity()

    def parts(self) -> dict[str, Parts]:
        networks = {"encoder": self.encoder, "momentum_encoder": self.momentum_encoder}
        return {name: Parts(heads={"head": network.head}) for name, network in networks.items()}

    def forward(self, seconds: float) -> None:
        self.now += seconds
        self.momentum_encoder.head(torch.zeros(1))
        self.now += 0.05  # behind the first exchange: everybody's
        self.encoder.head(torch.zeros(1))


def others(monkeypatch: pytest.MonkeyPatch, rows: list[list[float]]) -> None:
    """Peers whose seconds are known."""
    monkeypatch.setattr(
        stragglers,
        "gather_rows",
        lambda mine, device: torch.cat([mine, torch.tensor(rows, dtype=torch.float64)]),
    )


def test_the_slow_rank_is_named_once_with_its_section(monkeypatch: pytest.MonkeyPatch) -> None:
    others(monkeypatch, [[0.01, 0.01], [0.3, 0.01], [0.01, 0.01]])
    objective = Objective()
    times = SimpleNamespace(monotonic=lambda: objective.now)
    monkeypatch.setattr(stragglers, "time", times)
    watch = Stragglers(objective, World(rank=0, world_size=4))
    for _ in range(2):
        watch.begin(0.01)
        objective(0.1)
    lines = watch.report(2)
    assert len(lines) == 2
    assert lines[0].startswith("warning: step 2: rank 0 is slow, 0.100 s")
    assert "in the encoders, its peers take 0.010 s" in lines[0]
    assert "rank 2 is slow, 0.300 s per step waiting for data" in lines[1]
    watch.begin(0.01)
    objective(0.1)
    assert watch.report(3) == []
    watch.begin(0.01)
    objective(0.0)  # recovered
    assert watch.report(4) == []
    watch.begin(0.01)
    objective(0.1)
    assert len(watch.report(5)) == 1


def test_ranks_that_differ_little_are_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    others(monkeypatch, [[0.10, 0.20], [0.14, 0.28]])
    watch = Stragglers(Objective(), World(rank=0, world_size=3))
    for _ in range(2):
        watch.begin(0.12)
    watch._busy = 0.24
    assert watch.report(2) == []


def test_the_first_step_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    others(monkeypatch, [[0.01, 0.01], [0.01, 0.01]])
    objective = Objective()
    watch = Stragglers(objective, World(rank=0, world_size=3))
    watch.begin(60.0)
    objective(0.0)
    assert watch.report(1) == []
    watch.begin(60.0)
    assert len(watch.report(2)) == 1


def test_a_process_alone_measures_nothing() -> None:
    watch = Stragglers(Objective(), World())
    watch.begin(1.0)
    assert watch.report(1) == []
