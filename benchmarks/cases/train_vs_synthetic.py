"""Images/s of training from shards through DALI over images/s of training on one constant batch.

Two trainers of the same recipe alternate in one process. The ratio is the cost of the data path of
a training run; it is at most
1. kNN and checkpoints are off.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import interleave, ratios
from benchmarks.shown import Bars, Chart, low_high, markdown, number
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
        `failed`, for a side whose batches or loss are not those of a run, and then nothing else;
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
        trainers: dict[str, Trainer] = {}
        for name, synthetic in (("dali", False), ("synthetic", True)):
            side = replace(config, data=replace(config.data, synthetic=synthetic))
            trainer = Trainer.build(side, folder / name, start_world(side.device))
            stack.callback(trainer.close)
            trainers[name] = trainer
            measures[name] = _images_per_s(trainer, side, options["steps"], options["warm_steps"])
            measures[name]()
        figures = interleave(measures, rounds=options["rounds"])
        failed = {name: fault for name, each in trainers.items() if (fault := _fault(each))}
    if failed:
        return {"failed": failed}
    return {
        "failed": failed,
        "images_per_s": {name: [round(x, 1) for x in values] for name, values in figures.items()},
        "dali_over_synthetic": ratios(figures["dali"], figures["synthetic"]),
    }


def _fault(trainer: Trainer) -> str:
    """What is wrong with the next batches of a trainer, or with their loss; "" if nothing."""
    one, two = (trainer.loader.next().views[0].float() for _ in range(2))
    if torch.equal(one, two) != trainer.config.data.synthetic:
        return "one batch again and again" if torch.equal(one, two) else "no constant batch"
    if not 0.05 < float(one.std()) < 300:
        return f"views of deviation {float(one.std()):.3g} are not those of pictures"
    loss = float(trainer.step(trainer.loader.next()).loss)
    return "" if math.isfinite(loss) else f"the loss is {loss}"


def table(result: Mapping[str, Any]) -> str:
    """The one ratio."""
    rows = [
        (
            "images/s from shards over those of a constant batch",
            number(ratio["median"]),
            " to ".join(map(number, low_high(ratio))),
        )
        for ratio in _ratio(result)
    ]
    return markdown(("ratio", "median", "range"), rows)


def charts(result: Mapping[str, Any]) -> list[Chart]:
    """The one ratio."""
    title = "Images/s relative to a constant batch"
    return [
        Bars(title=title, unit="", bars={"from shards": (r["median"], *low_high(r))}, equal=1.0)
        for r in _ratio(result)
    ]


def _ratio(result: Mapping[str, Any]) -> list[dict[str, float]]:
    """None, after a failed check."""
    return [result["dali_over_synthetic"]] if "dali_over_synthetic" in result else []


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
