"""Images/s of training from shards through DALI over images/s of training on one constant batch.

Two trainers of the same recipe alternate in one process. The ratio is the cost of the data path of
a training run; it is at most
1. kNN and checkpoints are off.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.measure import interleave, ratios
from fastmoco.config import Config, KnnConfig
from fastmoco.distributed.mesh import start_world
from fastmoco.recipes import get_recipe
from fastmoco.training.trainer import Trainer
from fastmoco_pipelines import pack_digits

NAME = "train_vs_synthetic"
DEFAULTS = {"recipe": "quickstart_digits", "shards": "", "rounds": 7, "steps": 40, "warm_steps": 5}
QUICK = {"rounds": 2, "steps": 3, "warm_steps": 1}


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Measure.

    Args:
        options: `recipe`; `shards` (empty: the digits, packed here); `rounds`; `steps` of a
            segment; `warm_steps` before each segment, which use up batches that were prefetched
            while the other trainer ran.

    Returns:
        images/s of each side by round, and their ratios.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        shards = options["shards"] or pack_digits(folder / "data")[0]
        config = get_recipe(options["recipe"])
        config = replace(
            config,
            epochs=1e6,
            log_every_steps=1000,
            knn=KnnConfig(every_epochs=0),
            data=replace(config.data, shards=shards),
        )
        measures: dict[str, Callable[[], float]] = {}
        for name, synthetic in (("dali", False), ("synthetic", True)):
            side = replace(config, data=replace(config.data, synthetic=synthetic))
            trainer = Trainer.build(side, folder / name, start_world(side.device))
            stack.callback(trainer.close)
            measures[name] = _images_per_s(trainer, side, options["steps"], options["warm_steps"])
            measures[name]()
        figures = interleave(measures, rounds=options["rounds"])
    return {
        "images_per_s": {name: [round(x, 1) for x in values] for name, values in figures.items()},
        "dali_over_synthetic": ratios(figures["dali"], figures["synthetic"]),
    }


def _images_per_s(
    trainer: Trainer, config: Config, steps: int, warm_steps: int
) -> Callable[[], float]:
    """One segment of a trainer."""

    def measure() -> float:
        trainer.run(max_steps=warm_steps)
        began = time.perf_counter()
        trainer.run(max_steps=steps)
        return steps * config.global_batch_size / (time.perf_counter() - began)

    return measure
