"""One large batch in three ways: whole, in chunks, and in chunks over four
processes; losses and memory of each.

Every side is a separate run in new processes, with the step of the trainer, on the same images:
noise around a pattern of each image, drawn from the number of the step, so that each rank takes its
part of the same global batch. Memory is the growth of the peak resident set since before the first
step, of the largest process.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.ranks import run_ranks, status_bytes
from benchmarks.shown import Bars, Chart, markdown, number
from fastmoco.config import BatchConfig, Config, KnnConfig, MoCoV3Config, OptimConfig
from fastmoco.distributed.mesh import start_world, stop_world
from fastmoco.recipes import quickstart_digits
from fastmoco.training.trainer import Trainer
from fastmoco_pipelines.loading.batch import Batch

NAME = "large_batch"
DEFAULTS = {
    "batch": 4096,
    "chunk": 64,
    "steps": 30,
    "processes": 4,
    "precision": "fp32",
    "lr": 1.5e-4,
    "eps": 1e-8,
    "epochs": 300.0,
    "warmup_epochs": 40.0,
}
LIMITS = {"fp32": 1e-5, "fp64": 1e-9, "bf16": 1e-2, "fp16": 1e-2}
"""Largest difference of a loss from that of the whole batch, by precision."""
QUICK = {"batch": 64, "chunk": 16, "steps": 2, "processes": 2}


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Measure.

    Args:
        options: `batch` images over all processes; `chunk` images at a time; `steps`; `processes`
            of the third side; `precision`; base `lr`, `eps` of AdamW, `epochs` and `warmup_epochs`,
            which determine how fast rounding errors grow. Defaults are the first steps of the
            paper's schedule; a short warm-up needs `precision=fp64`.

    Returns:
        By side: losses, peak bytes of a process, seconds per step. The largest difference of a loss
        from that of the whole batch, `failed` where it is above its limit, and otherwise the peak of each
        side as a share of the whole batch's.
    """
    sides = {
        "whole": _side(options, 1, "none"),
        "chunks": _side(options, 1, options["chunk"]),
        f"chunks, {options['processes']} processes": _side(
            options, options["processes"], options["chunk"]
        ),
    }
    losses, peak = sides["whole"]["losses"], sides["whole"]["peak_bytes"]
    largest = {
        name: max(abs(a - b) for a, b in zip(side["losses"], losses, strict=True))
        for name, side in sides.items()
    }
    limit = LIMITS[options["precision"]]
    failed = {
        name: f"a loss differs by {value:.3g} > {limit:.3g}"
        for name, value in largest.items()
        if not value <= limit
    }
    result = {"sides": sides, "largest_loss_difference": largest, "failed": failed}
    if failed:
        return result
    return {
        **result,
        "peak_share": {name: round(side["peak_bytes"] / peak, 4) for name, side in sides.items()},
    }


def table(result: Mapping[str, Any]) -> str:
    """A row for each side."""
    shares = result.get("peak_share", {})
    rows = [
        (
            name,
            number(side["peak_bytes"] / 1e6),
            number(shares[name]) if name in shares else "",
            f"{result['largest_loss_difference'][name]:.1e}",
        )
        for name, side in result["sides"].items()
    ]
    head = ("side", "peak MB of a process", "share of the whole batch's", "largest loss difference")
    return markdown(head, rows)


def charts(result: Mapping[str, Any]) -> list[Chart]:
    """The peak of each side."""
    peaks = {name: side["peak_bytes"] / 1e6 for name, side in result["sides"].items()}
    bars = {name: (peak, peak, peak) for name, peak in peaks.items()}
    return [Bars(title="Peak memory of a process", unit="MB", bars=bars)]


def _side(options: dict[str, Any], processes: int, chunk: int | str) -> dict[str, Any]:
    """Run the processes of one side and collect their results."""
    found = run_ranks(
        "benchmarks.cases.large_batch",
        options | {"chunk": chunk},
        processes,
        # Return freed memory to the system at once, so that the peak does not
        # depend on the allocator.
        MALLOC_MMAP_THRESHOLD_="65536",
        MALLOC_TRIM_THRESHOLD_="65536",
    )
    return {**found[0], "peak_bytes": max(rank["peak_bytes"] for rank in found)}


def _config(options: dict[str, Any]) -> Config:
    """A small vision transformer: 17 tokens of width 64, two blocks, narrow heads."""
    recipe = quickstart_digits()
    chunk = options["chunk"]
    return replace(
        recipe,
        recipe="large_batch",
        epochs=options["epochs"],
        global_batch_size=options["batch"],
        precision=options["precision"],
        device="cpu",
        threads=1,
        batch=BatchConfig(chunk=chunk, kept=0) if chunk != "none" else BatchConfig(chunk="none"),
        model=replace(recipe.model, hidden_dim=64, projection_dim=32),
        objective=MoCoV3Config(temperature=0.2),
        optim=OptimConfig(
            lr=options["lr"], eps=options["eps"], warmup_epochs=options["warmup_epochs"]
        ),
        data=replace(recipe.data, synthetic=True),
        knn=KnnConfig(every_epochs=0),
    )


def _global_batch(
    step: int, images: int, side: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two views of the given number of images, the same in every process."""
    draws = torch.Generator().manual_seed(step)
    pattern = torch.randn(images, 3, side, side, generator=draws)
    view1, view2 = (pattern + 0.5 * torch.randn(pattern.shape, generator=draws) for _ in range(2))
    return view1.to(dtype), view2.to(dtype)


def _child(options: dict[str, Any]) -> None:
    """Train one rank of one side and print its results as one JSON line."""
    world = start_world("cpu")
    config = _config(options)
    losses = []
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer.build(config, Path(out), world)
        try:
            local = config.global_batch_size // world.world_size
            mine = slice(world.rank * local, (world.rank + 1) * local)
            dtype = trainer.objective.encoder.pos_embed.dtype
            _load_kernels(trainer, dtype)
            before = _reset_peak()
            began = time.perf_counter()
            for step in range(options["steps"]):
                views = _global_batch(
                    step, config.global_batch_size, config.model.image_size, dtype
                )
                local_views = tuple(view[mine].clone() for view in views)
                del views
                batch = Batch(views=local_views, sample_ids=torch.arange(local).numpy(), step=step)
                loss = trainer.step(batch).loss.detach().double()
                if world.world_size > 1:
                    dist.all_reduce(loss)
                losses.append(loss.item() / world.world_size)
            seconds = (time.perf_counter() - began) / options["steps"]
            peak = status_bytes("VmHWM") - before
        finally:
            trainer.close()
    stop_world()
    print(json.dumps({"peak_bytes": peak, "seconds_per_step": round(seconds, 3), "losses": losses}))


def _load_kernels(trainer: Trainer, dtype: torch.dtype) -> None:
    """Take a small step with a copy, so that libraries loaded at first use do
    not count as memory of the batch.
    """
    encoder = copy.deepcopy(
        trainer.objective.encoder
    )  # without heads, which would wait for the other ranks
    encoder(_global_batch(0, 8, trainer.config.model.image_size, dtype)[0]).sum().backward()


def _reset_peak() -> int:
    """Reset the peak; returns the resident bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


if __name__ == "__main__":
    _child(json.loads(sys.argv[1]))
