"""Losses of fastmoco and of the baseline over the same steps: same shards, samples, draws and start
weights, in float64, float32 and under bf16 autocast.

Both train on the views of the baseline, because rounding of the views would hide that of the
training; how far fastmoco's own views are from them is reported apart. The limits are 1e-9, 1e-5
and 1e-3.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, redirect_stdout
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from benchmarks.baseline import data
from benchmarks.baseline.trainer import Baseline
from benchmarks.baseline.views import library
from benchmarks.case import chosen_device, chosen_words
from benchmarks.photos import sample_shards
from benchmarks.shown import Chart, Lines, markdown
from fastmoco.config import (
    Config,
    DataConfig,
    KnnConfig,
    MoCoV3Config,
    ModelConfig,
    OptimConfig,
)
from fastmoco.distributed.mesh import start_world
from fastmoco.training.trainer import Trainer
from fastmoco_pipelines import Batch
from fastmoco_pipelines.spec import moco_v3_views

NAME = "equality"
DEFAULTS = {
    "shards": "",
    "device": "cpu",
    "precisions": "fp64,fp32,bf16",
    "architecture": "vit_nano",
    "size": 32,
    "patch": 8,
    "batch": 256,
    "hidden": 1024,
    "steps": 200,
    "lr": 1.5e-4,
    "eps": 1e-8,
    "warmup_steps": 200,
    "total_steps": 1500,
    "loader_steps": 10,
    "distinct": 0,
    "workers": 0,
    "threads": 1,
}
QUICK = {"batch": 32, "hidden": 64, "steps": 4, "loader_steps": 2, "precisions": "fp64,fp32"}
LIMITS = {"fp64": 1e-9, "fp32": 1e-5, "bf16": 1e-3}
"""Largest difference of a loss, by precision."""
Precision = Literal["fp64", "fp32", "bf16"]


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Train both side by side.

    Args:
        options: `shards` (empty: cut from sample photographs); `device`, cpu or cuda; `precisions`,
            with a comma between them; `architecture`, `size` of the images, `patch` and `hidden` width of the heads;
            images of a `batch`; `steps`; base `lr`, `eps` of AdamW, `warmup_steps` and
            `total_steps` of the schedule, which determine how fast rounding errors grow; `loader_steps`, the first
            steps, in which fastmoco's own loader is compared; `distinct` batches, which are
            repeated (0: a new one in each step); `workers`, processes that make them, and `threads`
            of fastmoco's loader.

    Returns:
        By precision: `largest_difference` of a loss and its `limit`, `differences` of all steps,
        `losses` of both in every tenth step. `failed` with the precisions beyond their limits.
        `views`: whether fastmoco's loader gave the same samples, and how far its views are from
        those of the baseline.

    Raises:
        ValueError: for an unknown precision.
    """
    precisions = chosen_words(options, "precisions", LIMITS)
    device = chosen_device(options["device"])
    with ExitStack() as stack:
        # torch lets convolutions of float32 round to TF32, though not its products of matrices.
        stack.enter_context(torch.backends.cudnn.flags(enabled=True, allow_tf32=False))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        shards = options["shards"] or sample_shards(folder, options["batch"])
        configs = [config_of(options, shards, cast(Precision, each)) for each in precisions]
        # Workers are forked, so start them before anything has threads.
        batches = data.batches(configs[0], options["workers"])
        pairs = {}
        for precision, config in zip(precisions, configs, strict=True):
            with redirect_stdout(sys.stderr):  # the output has the result alone
                trainer = Trainer.build(config, folder / precision, start_world(config.device))
            stack.callback(trainer.close)
            baseline = Baseline(config, device, sample_count=trainer.loader.sample_count)
            baseline.load_from(trainer.objective)
            pairs[precision] = trainer, baseline
        if options["distinct"]:
            batches = cycle(list(islice(batches, options["distinct"])))
        return _train(pairs, batches, options)


def table(result: Mapping[str, Any]) -> str:
    """A row for each precision."""
    rows = [
        (
            name,
            str(len(part["differences"])),
            f"{part['largest_difference']:.1e}",
            f"{part['limit']:.0e}",
        )
        for name, part in _precisions(result).items()
    ]
    return markdown(("precision", "steps", "largest difference of a loss", "limit"), rows)


def charts(result: Mapping[str, Any]) -> list[Chart]:
    """The difference of the losses by step."""
    lines = {
        name: [(i, d) for i, d in enumerate(part["differences"], start=1) if d > 0]
        for name, part in _precisions(result).items()
    }
    lines = {name: points for name, points in lines.items() if points}
    for name in tuple(lines):
        part = result[name]
        lines[f"limit of {name}"] = [(1, part["limit"]), (len(part["differences"]), part["limit"])]
    title = "Difference of the loss from the baseline's"
    return [Lines(title=title, x="step", y="difference", lines=lines, log=True)] if lines else []


def _precisions(result: Mapping[str, Any]) -> dict[str, Any]:
    parts = {name: part for name, part in result.items() if isinstance(part, Mapping)}
    return {name: part for name, part in parts.items() if "differences" in part}


def config_of(options: dict[str, Any], shards: str, precision: Precision) -> Config:
    """A small ViT on the views of MoCo v3, with a schedule of whole steps."""
    size, batch = options["size"], options["batch"]
    view1, view2 = moco_v3_views(size)
    # The schedule is given in steps; the config counts epochs of the set.
    epoch = max(1, _count(shards) // batch)
    return Config(
        recipe="equality",
        device="cpu" if options["device"] == "cpu" else "gpu",
        threads=1,
        precision=precision,
        epochs=options["total_steps"] / epoch,
        global_batch_size=batch,
        log_every_steps=10**6,
        model=ModelConfig(
            architecture=options["architecture"],
            image_size=size,
            patch_size=options["patch"],
            hidden_dim=options["hidden"],
            projection_dim=256,
            compile=False,  # the baseline is not compiled
        ),
        objective=MoCoV3Config(),
        optim=OptimConfig(
            lr=options["lr"], eps=options["eps"], warmup_epochs=options["warmup_steps"] / epoch
        ),
        data=DataConfig(
            shards=shards,
            view1=view1,
            view2=view2,
            device="cpu",  # as the baseline's views are made
            threads=options["threads"],
            view_dtype="float32",
        ),
        knn=KnnConfig(every_epochs=0),
    )


def _count(shards: str) -> int:
    """Images of some shards."""
    return data.sample_count(Config(data=DataConfig(shards=shards)))


def _train(
    pairs: dict[str, tuple[Trainer, Baseline]],
    batches: Iterator[tuple[Tensor, Tensor, Tensor]],
    options: dict[str, Any],
) -> dict[str, Any]:
    """All steps of all precisions on the same batches."""
    first = next(iter(pairs.values()))[0]
    losses: dict[str, list[tuple[float, float]]] = {precision: [] for precision in pairs}
    apart = Apart()
    for step in range(options["steps"]):
        view1, view2, ids = next(batches)
        if step < options["loader_steps"]:
            apart.add(first.loader.next(), (view1, view2), ids, first.config)
        for precision, (trainer, baseline) in pairs.items():
            batch = Batch(views=(view1, view2), sample_ids=ids.numpy(), step=step)
            ours = trainer.step(batch).loss.item()
            losses[precision].append((ours, baseline.step(view1, view2).item()))

    result: dict[str, Any] = {"failed": {}, "views": apart.to_json()}
    for precision, of_both in losses.items():
        differences = [abs(ours - plain) for ours, plain in of_both]
        largest, limit = max(differences), LIMITS[precision]
        if not largest <= limit:
            result["failed"][precision] = f"a loss differs by {largest:.2g}, limit {limit}"
        result[precision] = {
            "largest_difference": largest,
            "limit": limit,
            "differences": [float(f"{value:.3g}") for value in differences],
            "losses": {
                name: [of_step[side] for of_step in of_both[::10]]
                for side, name in enumerate(("fastmoco", "baseline"))
            },
        }
    if not apart.same_samples:
        result["failed"]["samples"] = "fastmoco's loader delivers other samples than the baseline's"
    return result


class Apart:
    """How far fastmoco's own views are from those of the baseline, in levels of 255."""

    def __init__(self) -> None:
        self.same_samples = True
        self._views = self._other_views = self._pixels = self._other_pixels = 0
        self._largest = 0.0

    def add(self, batch: Batch, pair: tuple[Tensor, Tensor], ids: Tensor, config: Config) -> None:
        """Compare a batch of both."""
        self.same_samples &= batch.sample_ids.tolist() == ids.tolist()
        for ours, plain, spec in zip(batch.views, pair, config.data.views, strict=True):
            std = torch.tensor(spec.std).view(3, 1, 1)
            levels = ((ours - plain) * 255 * std).abs().round()
            self._views += len(levels)
            self._other_views += int((levels.flatten(1) > 0).any(1).sum())
            self._pixels += levels.numel()
            self._other_pixels += int((levels > 0).sum())
            self._largest = max(self._largest, float(levels.max()))

    def to_json(self) -> dict[str, Any]:
        """The figures."""
        return {
            "library": library(),
            "same_samples": self.same_samples,
            "compared": self._views,
            "views_that_differ": self._other_views,
            "share_of_levels_that_differ": self._other_pixels / max(1, self._pixels),
            "largest_difference_in_levels": self._largest,
        }
