"""Which gradient norm is a spike, how often a run goes back, and what of it is in a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastmoco.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from fastmoco.config import Config
from fastmoco.config.faults import FaultConfig
from fastmoco.distributed.mesh import World
from fastmoco.errors import RunError
from fastmoco.training.rollback import Rollback
from tests.checkpoint_content import content, save
from tests.spikes import EVERY, ROLLING

pytestmark = pytest.mark.faults
WORLD = World()


class Fake:
    """Stands for the saved state and the records; goes back to the last that was saved by steps."""

    def __init__(self, config: Config, state: dict[str, Any] | None = None) -> None:
        self.said: list[str] = []
        self.every = config.checkpoint.every_steps
        self.saved: dict[int, dict[str, Any]] = {}
        self.rollback = Rollback(config, WORLD, self, lambda checkpoint: None, state or {})  # type: ignore[arg-type]

    def go_back(self, before: int, take: Callable[[Any], None], paused: Any) -> Any:
        steps = [step for step in self.saved if step < before]
        state = {"rollback": self.saved[steps[-1]]} if steps else {}
        return SimpleNamespace(step=steps[-1], state=state, warnings=[]) if steps else None

    def last_committed(self) -> int:
        return max(self.saved, default=0)

    def event(self, text: str) -> None:
        self.said.append(text)

    def rolled_back(self, step: int, to: int) -> None:
        self.said.append(f"{step} -> {to}")

    def paused(self) -> None:
        raise AssertionError

    def steps(
        self, first: int, last: int, *, spikes: tuple[int, ...] = (), value: float = 100.0
    ) -> list[str]:
        """Take steps, saving by steps; the events of them."""
        before = len(self.said)
        for step in range(first, last + 1):
            norms = {"first_block": torch.tensor(1 + step % 3 / 4), "total": torch.tensor(2.0)}
            if step in spikes:
                norms["first_block"] = torch.tensor(value)
            self.rollback.record(step, norms)
            self.rollback.after_step(step, self, logged=step % 3 == 0)  # type: ignore[arg-type]
            if step % self.every == 0:
                self.saved[step] = json.loads(json.dumps(self.rollback.state_dict()))
        return self.said[before:]


def test_too_many_without_a_quiet_stretch_end_the_run() -> None:
    fake = Fake(replace(ROLLING, faults=FaultConfig(rollback_spike=10, max_rollbacks=2)))
    # 26 is seen at 27; 31 is within the four steps behind that, 41 is not.
    said = fake.steps(1, 33, spikes=(26, 31))
    assert [text for text in said if "->" in text] == ["27 -> 24", "32 -> 28"]
    assert "rollback 2 in a row, 2 in all" in said[-1]
    assert "rollback 1 in a row, 3 in all" in fake.steps(34, 42, spikes=(41,))[-1]
    text = r"step 49: .* 2 rollbacks in a row did not help .*max_rollbacks=2\)\. The checkpoints .*Lower --opt"
    with pytest.raises(RunError, match=text):
        fake.steps(43, 51, spikes=(45, 49))
    # Saved once more in each stretch, but without one quiet step of progress.
    fake = Fake(replace(ROLLING, faults=FaultConfig(rollback_spike=10, max_rollbacks=3)))
    with pytest.raises(RunError, match="step 37: "):
        fake.steps(1, 60, spikes=(25, 29, 33, 37, 41, 45))


def test_the_count_and_the_median_are_in_the_state() -> None:
    config = replace(ROLLING, faults=FaultConfig(rollback_spike=10, max_rollbacks=1))
    fake = Fake(config)
    fake.steps(1, 28, spikes=(26,))
    again = Fake(config, fake.saved[28])
    assert again.rollback.state_dict() == fake.saved[28]
    assert [row[0] for row in fake.saved[28]["history"][-4:]] == [
        22,
        23,
        24,
        28,
    ]  # 25 to 27 have never been
    with pytest.raises(RunError, match="1 rollbacks in a row"):
        again.steps(29, 30, spikes=(29,))


def test_what_is_no_spike_and_what_cannot_be_rolled_back() -> None:
    assert Fake(ROLLING).steps(1, 40, spikes=(5, 19, 20)) == []  # the median is not known yet
    assert Fake(ROLLING).steps(1, 40, spikes=(30,), value=12.0) == []
    for value in (float("nan"), float("inf")):  # such a step was skipped
        assert Fake(ROLLING).steps(1, 40, spikes=(30,), value=value) == []
    early = Fake(replace(ROLLING, checkpoint=replace(ROLLING.checkpoint, every_steps=1000)))
    (said,) = early.steps(1, 40, spikes=(30,))
    assert "no checkpoint by steps to roll back to yet, the run continues" in said


def test_rules_that_cannot_be_kept_are_refused() -> None:
    for spike_factor in (0.5, 1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"rollback_spike=.*must be 0 or a number above 1"):
            FaultConfig(rollback_spike=spike_factor)
    with pytest.raises(ValueError, match="max_rollbacks=-1"):
        FaultConfig(max_rollbacks=-1)
    with pytest.raises(
        ValueError, match=r"checkpoint.every_steps=0: must be set for faults.rollback_spike"
    ):
        replace(ROLLING, checkpoint=replace(ROLLING.checkpoint, every_steps=0))


def test_the_newest_by_steps_is_kept_besides_the_newest(tmp_path: Path) -> None:
    for step in range(1, 12):
        save_checkpoint(
            tmp_path, step=step, tensors=content(step), state={}, keep=2, keep_multiple=EVERY
        )
        kept = [load_checkpoint(path).step for path in list_checkpoints(tmp_path)]
        newest = list(range(max(1, step - 1), step + 1))
        regular = [step // EVERY * EVERY] if step >= EVERY else []
        assert kept == sorted({*newest, *regular})
    save(tmp_path, 12, keep=2)
    assert len(list_checkpoints(tmp_path)) == 2
