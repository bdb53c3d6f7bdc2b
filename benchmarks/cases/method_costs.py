"""Training steps of several methods on the same encoder: images per CPU-second, in turns, beside the
FLOPs that are counted for a step.

Each recipe keeps its views, heads, loss and optimizer; architecture, size of the large views and
batch are the same for all. Batches are synthetic and made beforehand, so that loading has no part
in it. FLOPs are those of the planner: forward and backward of everything, once.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.case import chosen_words
from benchmarks.measure import interleave, ratios
from benchmarks.shown import markdown, number
from benchmarks.step_sides import trainer_of
from fastmoco.config import Config, KnnConfig
from fastmoco.models.precision import choose_precision
from fastmoco.planning.costs import measure_costs
from fastmoco.recipes import RECIPES, get_recipe
from fastmoco.training.trainer import Trainer

NAME = "method_costs"
DEFAULTS = {
    "recipes": "mae_vit_b16_e800_b4096,vit_b16_e300_b4096",
    "architecture": "vit_base",
    "batch": 4,
    "threads": 1,
    "rounds": 5,
    "steps": 1,
}
"""`recipes`, the first one the subject; `architecture` of all; images of a `batch`; `threads` of
torch; `rounds` of `steps` steps."""
QUICK = {
    "recipes": "mae_nano7_e12_b256,vit_nano7_e12_b256",
    "architecture": "vit_micro",
    "batch": 16,
    "rounds": 3,
}


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Measure, and count.

    Returns:
        By recipe: `images_per_cpu_s` of each round, `gflops` of an image, `mb_per_image` that a
        whole batch keeps for its backward; `speedup` of the subject over the others, and
        `flop_ratio`, the FLOPs of the others over its own.
    """
    names = chosen_words(options, "recipes", RECIPES)
    configs = {name: config_of(name, options) for name in names}
    before = torch.get_num_threads()
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, before)
        torch.set_num_threads(options["threads"])
        measures = {}
        for name, config in configs.items():
            trainer = stack.enter_context(trainer_of(config))
            measures[name] = partial(_images_per_cpu_second, trainer, options["steps"])
            measures[name]()  # creates the optimizer's state
        figures = interleave(measures, rounds=options["rounds"])

    precision = choose_precision("auto", torch.device("cpu"))
    costs = {name: measure_costs(config, precision) for name, config in configs.items()}
    subject = names[0]
    return {
        "subject": subject,
        "failed": {},
        "precision": precision,
        "images_per_cpu_s": {
            name: [float(f"{x:.4g}") for x in values] for name, values in figures.items()
        },
        "gflops": {name: round(cost.step_flops / 1e9, 3) for name, cost in costs.items()},
        "mb_per_image": {name: round(cost.graph.at(1) / 1e6, 2) for name, cost in costs.items()},
        "speedup": {
            name: {kind: round(x, 3) for kind, x in ratios(figures[subject], figures[name]).items()}
            for name in names[1:]
        },
        "flop_ratio": {
            name: round(costs[name].step_flops / costs[subject].step_flops, 3) for name in names[1:]
        },
    }


def config_of(name: str, options: dict[str, Any]) -> Config:
    """A recipe on the common encoder, on synthetic images of the CPU."""
    config = get_recipe(name)
    return replace(
        config,
        model=replace(config.model, architecture=options["architecture"]),
        device="cpu",
        threads=1,
        global_batch_size=options["batch"],
        epochs=1e6,
        log_every_steps=10**6,
        data=replace(config.data, synthetic=True),
        knn=KnnConfig(every_epochs=0),
    )


def table(result: dict[str, Any]) -> str:
    """Rates, FLOPs and memory by recipe, with the measured and the counted ratio."""
    if "images_per_cpu_s" not in result:
        return ""
    head = (
        *("recipe", "images per CPU-second", f"speed-up of {result['subject']}"),
        *("GFLOPs an image", "its FLOPs over those of the subject", "MB kept an image"),
    )
    rows = []
    for name, values in result["images_per_cpu_s"].items():
        speedup = result["speedup"].get(name)
        rows.append(
            (
                name,
                number(sorted(values)[len(values) // 2]),
                f"{speedup['median']} ({speedup['q20']} to {speedup['q80']})" if speedup else "",
                number(result["gflops"][name]),
                str(result["flop_ratio"].get(name, "")),
                number(result["mb_per_image"][name]),
            )
        )
    return markdown(head, rows)


def _images_per_cpu_second(trainer: Trainer, steps: int) -> float:
    batches = [trainer.loader.next() for _ in range(steps)]
    began = time.process_time()
    for batch in batches:
        trainer.step(batch)
    return steps * trainer.config.global_batch_size / (time.process_time() - began)
