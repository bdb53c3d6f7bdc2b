"""Schedules that a run leaves unfinished are named; a trial of a few epochs is not refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fastmoco.config import ObjectiveConfig, resolve, schedule_notes
from fastmoco.recipes import get_recipe
from fastmoco.recipes.dino import DINOConfig
from fastmoco.recipes.swav import SwAVConfig


def notes_of(recipe: str, epochs: float, objective: ObjectiveConfig | None = None) -> list[str]:
    config = get_recipe(recipe)
    own = objective or config.objective
    optim = replace(config.optim, warmup_epochs=0)
    config = replace(config, epochs=epochs, optim=optim, objective=own, global_batch_size=256)
    return schedule_notes(config, resolve(config, world_size=1, sample_count=256 * 10))


@pytest.mark.parametrize(
    ("own", "epochs", "expected"),
    [
        (DINOConfig(), 1, ["freeze_last_layer_epochs=1: the run ends after epoch 1,"]),
        (DINOConfig(), 1.1, []),
        (DINOConfig(freeze_last_layer_epochs=1.5), 2, ["freeze_last_layer_epochs=1.5:"]),
        (DINOConfig(freeze_last_layer_epochs=0), 0.5, []),
        (DINOConfig(teacher_warmup_epochs=3), 2.5, ["teacher_warmup_epochs=3:"]),
        (DINOConfig(teacher_warmup_epochs=3), 3, []),
        (SwAVConfig(freeze_prototypes_steps=20), 2, ["freeze_prototypes_steps=20:"]),
        (SwAVConfig(freeze_prototypes_steps=19), 2, []),
        (SwAVConfig(), 0.1, []),
    ],
)
def test_a_schedule_that_the_run_leaves_unfinished_is_named(
    own: ObjectiveConfig, epochs: float, expected: list[str]
) -> None:
    found = notes_of("vit_nano7_e12_b256", epochs, own)
    assert len(found) == len(expected)
    for note, start in zip(found, expected, strict=True):
        assert note.startswith(f"objective.{start}")


@pytest.mark.parametrize(("epochs", "late"), [(200, ""), (160, "160"), (10, "120 and 160")])
def test_milestones_after_the_end_are_named(epochs: float, late: str) -> None:
    found: Any = notes_of("moco_v1_r50_e200_b256", epochs)
    assert len(found) == bool(late)
    assert not late or found[0].endswith(f"so the learning rate does not fall at {late}")
