"""FLOPs of a step by part, as a profile shows them: those of the planner, in every way that a step
is computed."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from fastmoco.config import Config
from fastmoco.objectives.build import build_model
from fastmoco.objectives.interface import Progress
from fastmoco.planning.costs import measure_costs
from fastmoco.planning.plan import StepPlan
from fastmoco.recipes import get_recipe, with_image_size
from fastmoco.training.profiling.profile import _flops
from fastmoco_pipelines.loading.step_parts import LOSS

IMAGES, KEPT = 24, 14
OTHERS = IMAGES - KEPT
WHOLE = StepPlan(chunk=0, kept=0, chunks=1, overhead=0.0, peak_bytes=0.0, fits=True, reason="")
CHUNKS = replace(WHOLE, chunk=6, kept_images=KEPT)


def small(recipe: str, **model: Any) -> Config:
    config = with_image_size(get_recipe(recipe), 16, patch_size=4)
    small_heads = {"hidden_dim": 32, "projection_dim": 16, "compile": False}
    config = replace(config, precision="fp32", model=replace(config.model, **small_heads, **model))
    if config.objective.label_count == 0:
        config = replace(config, objective=replace(config.objective, classes=10))  # type: ignore[call-arg]
    return config


def flops(config: Config, plan: StepPlan) -> dict[str, float]:
    trainer = SimpleNamespace(
        forward_backward=SimpleNamespace(plan=plan),
        resolved=SimpleNamespace(local_batch_size=IMAGES),
        objective=build_model(config),
        progress=lambda step: Progress(step, 10),
        step_count=0,
        precision="fp32",
        attention=SimpleNamespace(backend="explicit"),
    )
    return _flops(config, trainer)  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", ["simclr_digits", "supervised_digits"])
def test_a_second_pass_of_micro_batches_is_counted_where_there_is_one(recipe: str) -> None:
    config = small(recipe)
    costs = measure_costs(config, "fp32", attention="explicit")
    whole, chunks = (sum(flops(config, plan).values()) for plan in (WHOLE, CHUNKS))
    twice = 0.0 if costs.separate else OTHERS * costs.query_flops
    assert chunks - whole == pytest.approx(twice)
    assert costs.separate == (recipe == "supervised_digits")


def test_fused_blocks_that_keep_less_compute_more_in_the_backward() -> None:
    config = small("vit_nano8_e60_b256", blocks="fused")
    costs = measure_costs(config, "fp32", attention="explicit")
    whole, lean = (
        sum(flops(config, plan).values()) for plan in (WHOLE, replace(CHUNKS, lean=True))
    )
    assert lean - whole == pytest.approx(OTHERS * costs.lean_flops)
    assert lean > whole


def test_keys_in_a_ring_have_the_flops_of_gathered_ones() -> None:
    config = small("vit_nano8_e60_b256")
    ring = replace(config, objective=replace(config.objective, keys="ring"))  # type: ignore[call-arg]
    assert flops(ring, WHOLE)[LOSS] == flops(config, WHOLE)[LOSS] > 0


def test_a_profile_counts_the_tokens_of_its_phase() -> None:
    dropping = small("vit_nano8_e60_b256", keep_tokens="0.5@0,1@0.5")
    first = sum(flops(dropping, WHOLE).values())
    whole = sum(flops(small("vit_nano8_e60_b256"), WHOLE).values())
    assert 0.5 * whole < first < 0.75 * whole
