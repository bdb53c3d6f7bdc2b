"""Accuracies of a run are shares of the images that were classified, not of the set."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastmoco.checkpoint import CheckpointError
from fastmoco.evaluation.confidence import wilson
from fastmoco.training.accuracies import read_accuracies


def test_counts_and_intervals_are_those_of_the_images_that_decode(tmp_path: Path) -> None:
    lines = [
        {"step": 0, "top1": 1.0, "top5": 1.0},
        {"step": 5, "top1": 5 / 7, "top5": 6 / 7},
        {"step": 10, "top1": 3 / 7, "top5": 1.0},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    state: dict[str, Any] = {"resolved": {"steps_per_epoch": 5}, "monitors": {}}
    checkpoint: Any = SimpleNamespace(state=state)
    with pytest.raises(CheckpointError, match="has no accuracy after its first step"):
        read_accuracies(tmp_path, checkpoint)
    state["monitors"]["accuracy"] = {"classified": 7}
    found = read_accuracies(tmp_path, checkpoint)
    assert (found.last, found.best) == (10, 5)
    assert found.of(5)["epoch"] == 1
    assert found.of(10)["top1"] == round(3 / 7, 6)
    assert found.of(10)["top1_interval"] == pytest.approx(wilson(3, 7), abs=1e-6)
