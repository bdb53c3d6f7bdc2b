"""Choose a checkpoint by what a person names: a run, one folder of it, or its best accuracy.

A checkpoint that was saved at the step of a measurement contains its score. The best checkpoint is
the one with the highest score, so it needs no pointer that could be lost or wrong.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fastmoco.checkpoint.errors import CheckpointError
from fastmoco.checkpoint.folder import MARKER, list_checkpoints, read_state
from fastmoco.checkpoint.loading import Checkpoint, load_checkpoint, load_latest
from fastmoco.errors import no_checkpoint

KEY = "score"
"""Entry of the JSON state of a checkpoint."""


@dataclass(frozen=True, slots=True)
class Score:
    """An accuracy that was measured at the step of a checkpoint.

    Attributes:
        name: of the metric, `knn`.
        label: for people, `kNN`.
        value: a share in [0, 1].
    """

    name: str
    label: str
    value: float

    def to_json(self) -> dict[str, Any]:
        """As the state of a checkpoint stores it."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.label} {self.value:.1%}"


def score_in(state: Mapping[str, Any]) -> Score | None:
    """The score in the JSON state of a checkpoint; None if none was measured at its step."""
    saved = state.get(KEY)
    try:
        score = Score(str(saved["name"]), str(saved["label"]), float(saved["value"]))  # type: ignore[index]
    except (KeyError, TypeError, ValueError):
        return None
    return score if math.isfinite(score.value) else None


def score_of(path: Path) -> Score | None:
    """The score of a committed folder, without reading its tensors.

    Its state is compared with the marker before it is parsed; a damaged one has no score.
    """
    try:
        return score_in(read_state(path))
    except CheckpointError:
        return None


def by_score(paths: Iterable[Path]) -> list[Path]:
    """Folders with a score, the best first; among equal scores the one of the earlier step."""
    scores = {path: score.value for path in paths if (score := score_of(path)) is not None}
    return sorted(scores, key=lambda path: (-scores[path], path.name))


def load_best(root: Path) -> Checkpoint:
    """The checkpoint with the highest score that verifies.

    Args:
        root: folder of the run's checkpoints.

    Returns:
        The checkpoint; `skipped` lists better ones that failed to verify, with the reason.

    Raises:
        CheckpointError: if none has a score, or none of them verifies.
    """
    ranked = by_score(list_checkpoints(root))
    if not ranked:
        raise CheckpointError(
            f"{root}: no checkpoint was saved at the step of a kNN measurement, so none is known to "
            "be the best; train with --knn.test-shards, or leave out --best for the newest one"
        )
    skipped: list[tuple[Path, str]] = []
    for path in ranked:
        try:
            return replace(load_checkpoint(path), skipped=tuple(skipped))
        except CheckpointError as error:
            skipped.append((path, str(error)))
    reasons = "\n  ".join(reason for _, reason in skipped)
    raise CheckpointError(f"{root}: no checkpoint with a kNN accuracy can be trusted:\n  {reasons}")


def find_checkpoint(path: Path | str, *, best: bool = False) -> Checkpoint:
    """The checkpoint that a person names.

    Args:
        path: folder of a run, of its checkpoints, or of one checkpoint.
        best: the one with the highest accuracy, in place of the newest.

    Returns:
        A verified checkpoint; `skipped` lists those that were preferred but cannot be trusted.

    Raises:
        RunError: if there is no checkpoint.
        CheckpointError: if none verifies, or `best` is set for the folder of one checkpoint.
    """
    folder = Path(os.path.abspath(path))  # "." and a trailing slash have a name too
    if folder.name.startswith("step_") or (folder / MARKER).is_file():
        if best:
            raise CheckpointError(
                f"{path} is one checkpoint already; --best needs the folder of a run"
            )
        if not folder.is_dir():
            raise no_checkpoint(path)
        return load_checkpoint(folder)
    inner = Path(path) / "checkpoints"
    root = inner if inner.is_dir() else Path(path)
    if not list_checkpoints(root):
        raise no_checkpoint(path)
    found = load_best(root) if best else load_latest(root)
    assert found is not None  # noqa: S101 - a type: else the error above is raised
    return found
