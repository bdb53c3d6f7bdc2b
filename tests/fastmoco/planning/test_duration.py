"""The time of a step, estimated before the first one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastmoco.config import resolve
from fastmoco.objectives.build import build_objective
from fastmoco.planning.duration import (
    CPU_RECIPE,
    Duration,
    cpu_flops_per_s,
    estimate,
    slow_notes,
)
from fastmoco.recipes import get_recipe, with_image_size
from fastmoco.recipes.suggest import suggest


@pytest.fixture(scope="module")
def objective():
    return build_objective(get_recipe("vit_nano8_e60_b256"), torch.device("cpu"))


def test_the_flops_are_those_that_torch_counts(objective) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    deep = with_image_size(get_recipe("vit_s16_e300_b1024"), 64)
    deep = replace(deep, model=replace(deep.model, architecture="vit_tiny", hidden_dim=64))
    made = build_objective(deep, torch.device("cpu")).encoder
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        made(torch.zeros(1, 3, 64, 64))
    # A little above: of the last block only the class token is computed.
    assert 1 <= made.forward_flops(64) / counter.get_total_flops() < 1.15
    config = get_recipe("vit_nano8_e60_b256")
    encoder = objective.encoder
    found = estimate(config, objective, images=3, knn_images=5, flops_per_s=2.0)
    # Two views; forward, backward of twice that, and forward of the momentum encoder.
    assert found.step_s == pytest.approx(3 * 2 * 4 * encoder.forward_flops(32) / 2)
    assert found.knn_s == pytest.approx(5 * encoder.forward_flops(32) / 2)


def test_it_follows_images_and_speed(objective) -> None:
    config = get_recipe("vit_nano8_e60_b256")
    one = estimate(config, objective, images=1, knn_images=0, flops_per_s=1e9)
    many = estimate(config, objective, images=64, knn_images=0, flops_per_s=2e9)
    assert many.step_s == pytest.approx(32 * one.step_s)
    assert one.knn_s == 0
    assert cpu_flops_per_s(64, torch.float32) > 1e6


def test_a_masked_method_is_charged_for_what_its_networks_see() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = with_image_size(get_recipe("mae_vit_b16_e800_b4096"), 64)
    config = replace(config, model=replace(config.model, architecture="vit_tiny"))
    mae = build_objective(config, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        mae(torch.zeros(1, 3, 64, 64)).loss.backward()
    found = estimate(config, mae, images=1, knn_images=0, flops_per_s=1.0)
    assert 0.95 < found.step_s / counter.get_total_flops() < 1.1


def test_only_a_slow_run_is_announced() -> None:
    config = replace(get_recipe("vit_s16_e300_b1024"), global_batch_size=512)
    resolved = resolve(config, world_size=1, sample_count=3000)
    left = resolved.total_steps
    fast = Duration(step_s=19, knn_s=59)
    assert slow_notes(fast, config, resolved, steps_left=left) == []
    slow = Duration(step_s=240, knn_s=1200)
    step, knn = slow_notes(slow, config, resolved, steps_left=left)
    assert step.startswith("a step of 512 images takes about 4 min on this CPU, the 1500 steps")
    assert "about 4 days; use vit_" in step
    assert knn.startswith("kNN takes about 20 min before the first step")
    assert f"use {CPU_RECIPE}, or " in step
    assert suggest("cpu").recipe == CPU_RECIPE
    (own, _) = slow_notes(slow, replace(config, recipe=CPU_RECIPE), resolved, steps_left=left)
    assert CPU_RECIPE not in own
