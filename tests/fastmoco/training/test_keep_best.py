"""The checkpoint of the highest accuracy is saved when it is measured, and kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from fastmoco.checkpoint import list_checkpoints
from fastmoco.checkpoint import saver as checkpoint_saver
from fastmoco.config import Config
from fastmoco.distributed.mesh import World
from fastmoco.evaluation.interface import Monitor
from fastmoco.training import setup
from fastmoco.training.load_run import load_run
from fastmoco.training.trainer import Trainer

SCRIPT = (0.9, 0.2, 0.5, 0.4, float("nan"), 0.5, 0.7, 0.1, 0.2, 0.3, 0.3)
"""Accuracy by step; the encoder of step 0 is untrained and is not saved."""


class Scripted(Monitor):
    name = "knn"
    figures: ClassVar[Mapping[str, str]] = {"knn": "kNN"}

    def __init__(self, first: int) -> None:
        super().__init__(World(), every_epochs=0.2, max_share=1.0)
        self.step = first - 1

    def evaluate(self, encoder: torch.nn.Module) -> Mapping[str, float]:
        self.step += 1
        return {"knn": SCRIPT[self.step]}


@pytest.fixture
def config(brief_run: Config) -> Config:
    """Ten steps, each measured, and saves by nothing else than accuracy and the end."""
    return replace(
        brief_run,
        epochs=2,
        optim=replace(brief_run.optim, warmup_epochs=0),
        checkpoint=replace(brief_run.checkpoint, every_steps=0, every_minutes=1e6, keep=1),
    )


def train(
    config: Config, out: Path, monkeypatch: pytest.MonkeyPatch, *, first: int = 0, stop: int = 0
) -> Trainer:
    """Train; `stop`: as if killed after this many steps."""
    monkeypatch.setattr(setup, "build_monitors", lambda *_, **__: [Scripted(first)])
    trainer = Trainer.build(config, out, World())
    try:
        if not stop:
            assert trainer.run() == 0
        else:
            trainer._measure(force=trainer.step_count == 0)
            while trainer.step_count < stop:
                trainer._one_step()
                trainer._measure(force=False)
                trainer._save(force=False)
    finally:
        trainer.close()
    return trainer


def steps(out: Path) -> list[int]:
    return [int(path.name[5:]) for path in list_checkpoints(out / "checkpoints")]


def test_the_best_is_kept_over_kills_and_named_at_the_end(
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train(config, tmp_path / "a", monkeypatch)
    assert "best kNN 70.0%: step_00000006 there (--best)" in capsys.readouterr().out
    assert steps(tmp_path / "a") == [6, 10]
    assert load_run(tmp_path / "a", best=True)[2].step == 6

    # Killed after step 4: continued from the best of then, with the same bits at the end.
    train(config, tmp_path / "b", monkeypatch, stop=4)
    assert steps(tmp_path / "b") == [2]
    train(config, tmp_path / "b", monkeypatch, first=3)
    assert steps(tmp_path / "b") == [6, 10]

    # No save changes a number of the run.
    none = replace(config, checkpoint=replace(config.checkpoint, keep_best=False))
    train(none, tmp_path / "c", monkeypatch)
    assert steps(tmp_path / "c") == [10]
    ends = [load_run(tmp_path / name)[2].tensors for name in "abc"]
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name
        assert torch.equal(tensor, ends[2][name]), name


def test_a_best_that_could_not_be_saved_does_not_cost_the_one_before(
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save = checkpoint_saver.save_checkpoint

    def full_at_step_6(root: Path, *, step: int, **more: object) -> Path:
        if step == 6:
            raise OSError("no space left on device")
        return save(root, step=step, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint_saver, "save_checkpoint", full_at_step_6)
    train(config, tmp_path, monkeypatch)
    assert "! warning: the save in the background failed" in capsys.readouterr().out
    assert steps(tmp_path) == [2, 10]
    assert load_run(tmp_path, best=True)[2].step == 2
