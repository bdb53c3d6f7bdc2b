"""What objectives show to telemetry: queries are rows that a loss reads, features are others."""

from __future__ import annotations

import pytest
import torch

from fastmoco.objectives.build import build_objective
from fastmoco.objectives.interface import START
from fastmoco.recipes import get_recipe


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ("mae_digits", "features"),
        ("maskfeat_digits", "features"),
        ("mp3_digits", "features"),
        ("fcmae_micro_e60_b256", "features"),
        ("cmae_digits", "queries"),
        ("macrl_digits", "queries"),
        ("extrema_digits", "queries"),
        ("quickstart_digits", "queries"),
        ("dino_digits", "queries"),
    ],
)
def test_rows_that_no_loss_reads_are_no_queries(recipe: str, name: str) -> None:
    config = get_recipe(recipe)
    objective = build_objective(config, torch.device("cpu")).train()
    torch.manual_seed(0)
    side = config.data.view1.size
    views = [torch.randn(4, 3, side, side) for _ in range(objective.view_count or 2)]
    watch = objective(*views, at=START).watch
    assert {"queries", "features"} & watch.keys() == {name}
    assert watch[name].ndim == 3
    assert len(watch[name][0]) == 4


@pytest.mark.parametrize("recipe", ["swav_digits", "dino_digits", "esvit_digits"])
def test_methods_with_targets_show_their_entropy(recipe: str) -> None:
    config = get_recipe(recipe)
    objective = build_objective(config, torch.device("cpu")).train()
    torch.manual_seed(0)
    views = [torch.randn(8, 3, 8, 8) for _ in range(2)]
    output = objective(*views, at=START, accuracy=True)
    most = objective.uninformed_loss(8)
    assert most is not None
    assert 0 < output.watch["target_entropy"].item() <= most + 1e-5
