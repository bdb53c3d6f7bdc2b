"""Views on their way to the encoder."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from fastmoco.distributed import World
from fastmoco.objectives.build import build_objective
from fastmoco.objectives.prepare import view_preparation
from fastmoco.recipes import RECIPES
from fastmoco.training.forward_backward import ForwardBackward
from fastmoco_pipelines.spec import each_view, moco_v3_views

FROM_PIXELS = ("mae", "supmae", "cmae", "macrl", "maskfeat", "fcmae")
"""Methods whose targets are made of a view."""


def test_both_passes_over_a_chunk_share_one_compiled_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graphs = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
    specs = moco_v3_views(8)
    compiled = view_preparation(specs, "bf16", compiled=True)
    plain = view_preparation(specs, "bf16")
    noise = torch.Generator().manual_seed(2)
    levels = torch.randint(256, (2, 5, 3, 8, 8), generator=noise, dtype=torch.uint8).unbind()
    for with_gradient in (False, True):
        with torch.set_grad_enabled(with_gradient):
            views = compiled(levels)
            assert torch.is_grad_enabled() is with_gradient
        for view, expected in zip(views, plain(levels), strict=True):
            assert torch.equal(view, expected)
    assert graphs.frame_count == 1


@pytest.mark.parametrize(
    "recipe", [*(name for name in RECIPES if name.endswith("_digits")), "fcmae_micro_e60_b256"]
)
def test_views_of_which_targets_are_made_are_not_rounded_to_bf16(recipe: str) -> None:
    config = RECIPES[recipe]()
    if recipe in ("supervised_digits", "supmae_digits"):
        config = replace(config, objective=replace(config.objective, classes=10))
    objective = build_objective(config, torch.device("cpu"))
    assert objective.exact_views == (recipe.split("_")[0] in FROM_PIXELS)
    size = config.model.image_size
    levels = torch.arange(3 * size**2).view(1, 3, size, size).mul(37).to(torch.uint8)
    views = each_view(config.data.views)
    step = ForwardBackward(replace(config, device="cpu"), objective, World(), "bf16")
    same = (levels,) * len(views)
    prepared, wide, narrow = (
        prepare(same)[0]
        for prepare in (
            step.prepare,
            view_preparation(views, "fp32"),
            view_preparation(views, "bf16"),
        )
    )
    assert not torch.equal(wide, narrow.float())
    assert torch.equal(prepared, wide if objective.exact_views else narrow)
