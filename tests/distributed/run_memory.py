"""Memory of one of several real processes for its shards and one step; started by
test_memory_ranks.py.
"""

from __future__ import annotations

import functools
import gc
from dataclasses import replace
from pathlib import Path

import torch

from fastmoco.config import BatchConfig, Config, ParallelConfig
from fastmoco.distributed import World
from fastmoco.objectives.build import build_objective
from fastmoco.recipes import quickstart_digits
from fastmoco.training.forward_backward import ForwardBackward
from tests.distributed.cases import run_cases
from tests.distributed.some_costs import with_some_costs

IMAGES = {"chunks": 48, "blocks": 32, "heads in bf16": 64}
"""Of one process. Each case takes 80 megabytes and more, "chunks" in three chunks."""


def config_of(name: str) -> Config:
    """A wide head over few blocks, or many blocks."""
    recipe = quickstart_digits()
    wide = name.startswith("heads")
    model = replace(
        recipe.model,
        architecture="vit_micro" if wide else "vit_tiny",
        hidden_dim=2048 if wide else 64,
        projection_dim=32,
        attention="sdpa",
    )
    return replace(
        recipe,
        precision="bf16" if wide else "fp32",
        model=model,
        batch=BatchConfig(chunk=16, kept=1) if name == "chunks" else BatchConfig(chunk="none"),
        parallel=ParallelConfig(strategy="fsdp"),
    )


def run_memory(world: World, name: str) -> dict[str, object]:
    """Growth of the resident set from before there is a model to the peak of a step."""
    config = config_of(name)
    small = replace(config, model=replace(config.model, architecture="vit_nano", hidden_dim=16))
    _step(_spread(small, world), small, 4)  # loads libraries
    gc.collect()
    before = _status("VmRSS:")
    forward_backward = _spread(config, world)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    _step(forward_backward, config, IMAGES[name])
    return {"peak": _status("VmHWM:") - before}


def _spread(config: Config, world: World) -> ForwardBackward:
    with with_some_costs():  # of any model: none are asked for
        return ForwardBackward(
            config, build_objective(config, world.device), world, config.precision
        )


def _step(forward_backward: ForwardBackward, config: Config, images: int) -> None:
    side = config.model.image_size
    forward_backward(*torch.randn(2, images, 3, side, side).unbind())


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


if __name__ == "__main__":
    run_cases({name: functools.partial(run_memory, name=name) for name in IMAGES})
