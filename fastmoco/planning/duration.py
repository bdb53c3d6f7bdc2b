"""How long a step and a measurement of kNN take on a CPU, before the first one: FLOPs by
arithmetic, over the speed of a product that is measured in a fraction of a second.

The result is right within a factor of two or so, which is enough to tell a user that a run needs
another machine or another recipe.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from fastmoco.config import Config, Resolved
from fastmoco.objectives.interface import Objective
from fastmoco_pipelines.spec import each_view
from fastmoco_pipelines.text import spoken

SLOW_STEP_S = 20.0
"""From this time on, the time of a step is announced."""
SLOW_KNN_S = 60.0
"""From this time on, the time of the first measurement of kNN is announced."""
SHARE = 0.5
"""Speed of a whole step as a share of that of one large product."""
ROWS = 2048
WIDEST = 768
"""Largest width of that product; a wider one takes longer and is no faster."""
CPU_RECIPE = "vit_nano8_e60_b256"
"""The recipe that fits a CPU (`recipes.suggest`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Duration:
    """Seconds of a mean step of the run, and of one measurement of kNN; 0 without kNN."""

    step_s: float
    knn_s: float


def estimate(
    config: Config,
    objective: Objective,
    *,
    images: int,
    knn_images: int,
    flops_per_s: float,
) -> Duration:
    """The duration at a speed.

    Args:
        config: of the run.
        objective: whose encoder is trained; it counts what a view costs.
        images: of a step on this process.
        knn_images: that this process embeds for one measurement.
        flops_per_s: of this process; a multiply-add counts as two.
    """
    model = config.model
    whole = objective.encoder.forward_flops(model.image_size)
    step = 0.0
    for share, phase in zip(model.phases.shares(), model.phases.items, strict=True):
        for number, view in enumerate(each_view(config.data.views)):
            side = view.size * model.patch_size // (phase.patch_size or model.patch_size)
            step += share * objective.view_flops(number, side, phase.keep)
    return Duration(step_s=images * step / flops_per_s, knn_s=knn_images * whole / flops_per_s)


def cpu_flops_per_s(width: int, dtype: torch.dtype) -> float:
    """Speed of a step on this CPU by one product of the encoder's width, tried three times."""
    width = min(width, WIDEST)
    left, right = torch.ones(ROWS, width, dtype=dtype), torch.ones(width, 4 * width, dtype=dtype)
    fastest = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        torch.mm(left, right)
        fastest = min(fastest, time.perf_counter() - began)
    return SHARE * 2 * ROWS * width * 4 * width / max(fastest, 1e-9)


def slow_notes(
    duration: Duration, config: Config, resolved: Resolved, *, steps_left: int
) -> list[str]:
    """What to tell the user before a slow run; empty for a fast one.

    Args:
        duration: estimated.
        config: of the run.
        resolved: of the run.
        steps_left: of the run.
    """
    notes = []
    if duration.step_s >= SLOW_STEP_S:
        other = f"use {CPU_RECIPE}, or " if config.recipe != CPU_RECIPE else ""
        notes.append(
            f"a step of {config.global_batch_size} images takes about {spoken(duration.step_s)} on "
            f"this CPU, the {steps_left} steps of the run about "
            f"{spoken(duration.step_s * steps_left)}; {other}use a GPU, a smaller "
            "--model.image-size, --global-batch-size or --epochs"
        )
    if duration.knn_s >= SLOW_KNN_S:
        notes.append(
            f"kNN takes about {spoken(duration.knn_s)} before the first step, and again every "
            f"{config.knn.every_epochs:g} epochs; a smaller --knn.max-train-images shortens it"
        )
    return notes
