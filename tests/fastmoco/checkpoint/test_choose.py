"""Which checkpoint a name means, and which of them survive the removal of old ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastmoco.checkpoint import (
    CheckpointError,
    Score,
    find_checkpoint,
    list_checkpoints,
    save_checkpoint,
    score_in,
)
from fastmoco.errors import RunError
from tests.checkpoint_content import flip_bit


def save(
    root: Path, step: int, knn: float | None, *, keep: int = 2, keep_best: bool = True
) -> None:
    state = {} if knn is None else {"score": Score("knn", "kNN", knn).to_json()}
    tensors = {"w": torch.full((2,), float(step))}
    save_checkpoint(root, step=step, tensors=tensors, state=state, keep=keep, keep_best=keep_best)


def steps(root: Path) -> list[int]:
    return [int(path.name[5:]) for path in list_checkpoints(root)]


def test_the_best_stays_beside_the_newest_until_a_better_one_is_committed(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    kept = []
    for step, knn in enumerate((0.5, 0.7, None, 0.6, 0.7, None, 0.8, None, 0.1), start=1):
        save(root, step, knn)
        kept.append(steps(root))
    # Of two equal ones (steps 2 and 5) the earlier one.
    assert kept[3:] == [[2, 3, 4], [2, 4, 5], [2, 5, 6], [6, 7], [7, 8], [7, 8, 9]]
    assert find_checkpoint(tmp_path, best=True).step == 7
    assert find_checkpoint(tmp_path).step == find_checkpoint(root).step == 9
    assert find_checkpoint(root / "step_00000008").step == 8
    save(root, 10, None, keep_best=False)
    assert steps(root) == [9, 10]


def test_a_damaged_best_is_passed_over_with_its_name(tmp_path: Path) -> None:
    for step, knn in ((1, 0.9), (2, 0.8), (3, None)):
        save(tmp_path, step, knn, keep=9)
    flip_bit(tmp_path / "step_00000001" / "tensors.safetensors", 90)
    found = find_checkpoint(tmp_path, best=True)
    assert found.step == 2
    assert [path.name for path, _ in found.skipped] == ["step_00000001"]

    # A damaged state has no score; the folder stays, but not as the best.
    flip_bit(tmp_path / "step_00000002" / "state.json", 9)
    with pytest.raises(CheckpointError, match="no checkpoint with a kNN accuracy can be trusted"):
        find_checkpoint(tmp_path, best=True)
    save(tmp_path, 4, 0.1)
    assert find_checkpoint(tmp_path, best=True).step == 4


def test_best_without_a_measurement_and_of_one_checkpoint_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1, None)
    with pytest.raises(CheckpointError, match="none is known to be the best"):
        find_checkpoint(tmp_path, best=True)
    with pytest.raises(CheckpointError, match="is one checkpoint already"):
        find_checkpoint(tmp_path / "step_00000001", best=True)
    for nothing in (tmp_path / "step_00000002", tmp_path / "x"):
        with pytest.raises(RunError, match="contains no checkpoint"):
            find_checkpoint(nothing)


@pytest.mark.parametrize(
    "odd", [None, 3, {}, {"name": "knn", "label": "kNN"}, {"name": "", "label": "", "value": "x"}]
)
def test_an_odd_score_is_no_score(odd: object) -> None:
    assert score_in({"score": odd}) is None
    assert score_in({"score": {"name": "knn", "label": "kNN", "value": float("nan")}}) is None
