"""Accuracies of a classifier, with their intervals: of one measurement, and of the epochs of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmoco.checkpoint import Checkpoint, CheckpointError
from fastmoco.evaluation.confidence import wilson
from fastmoco.run.folder import RunFolder

FIGURES = ("top1", "top5")


def accuracies(top1: int, top5: int, images: int) -> dict[str, Any]:
    """Shares of images that are right, with their intervals of 95 %, for JSON."""
    found: dict[str, Any] = {}
    for name, right in zip(FIGURES, (top1, top5), strict=True):
        found[name] = round(right / images, 6)
        found[f"{name}_interval"] = [round(bound, 6) for bound in wilson(right, images)]
    return found


@dataclass(frozen=True, kw_only=True)
class RunAccuracies:
    """What the accuracy monitor of a run has measured.

    Attributes:
        history: of each figure, the share by step; the one before the first step is left out.
        images: that were classified: those of the test set that decode.
        steps_per_epoch: of the run.
    """

    history: Mapping[str, Mapping[int, float]]
    images: int
    steps_per_epoch: int

    @property
    def last(self) -> int:
        """The last step that was measured."""
        return max(self.history["top1"])

    @property
    def best(self) -> int:
        """The step with the highest top-1, of equals the first."""
        top1 = self.history["top1"]
        return max(top1, key=lambda step: (top1[step], -step))

    def of(self, step: int) -> dict[str, Any]:
        """Both accuracies after a step, and its epoch, for JSON."""
        top1, top5 = (round(self.history[name][step] * self.images) for name in FIGURES)
        epoch = round(step / self.steps_per_epoch, 3)
        return {"epoch": epoch, **accuracies(top1, top5, self.images)}


def read_accuracies(out: Path, checkpoint: Checkpoint) -> RunAccuracies:
    """The accuracies of a run.

    Args:
        out: folder of the run.
        checkpoint: its newest one.

    Raises:
        CheckpointError: if none was measured after the first step.
    """
    images = checkpoint.state["monitors"].get("accuracy", {}).get("classified")
    folder = RunFolder(out)
    history = {
        name: {step: value for step, value in folder.read_metric(name) if step and 0 <= value <= 1}
        for name in FIGURES
    }
    both = history["top1"].keys() & history["top5"].keys()
    history = {
        name: {step: found[step] for step in sorted(both)} for name, found in history.items()
    }
    if not both or not images:
        raise CheckpointError(
            f"{out}: the run has no accuracy after its first step; delete it and begin again"
        )
    return RunAccuracies(
        history=history,
        images=images,
        steps_per_epoch=checkpoint.state["resolved"]["steps_per_epoch"],
    )
