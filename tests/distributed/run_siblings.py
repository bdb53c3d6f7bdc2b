"""What one of two real processes does with the golden traces of siblings of MoCo v3, and
a run of MoCo on a ResNet.

Started by test_siblings_ranks.py as `python -m tests.distributed.run_siblings OUT`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmoco.config import OptimConfig, ParallelConfig
from fastmoco.distributed import World
from fastmoco.recipes.moco import MoCoConfig
from fastmoco.training.trainer import Trainer
from tests.distributed.cases import run_cases
from tests.distributed.run_trainer import STEPS
from tests.fastmoco.objectives import test_byol as byol
from tests.fastmoco.objectives import test_dino as dino
from tests.fastmoco.objectives import test_moco as moco
from tests.fastmoco.objectives import test_projector_momentum as projector_momentum
from tests.fastmoco.objectives import test_sdssl as sdssl
from tests.fastmoco.objectives import test_simclr as simclr
from tests.fastmoco.objectives import test_simsiam as simsiam
from tests.fastmoco.objectives import test_swav as swav
from tests.fastmoco.objectives.test_conformance import RESNET, config_of


def run_byol(world: World, prefix: str) -> dict[str, Any]:
    """Three steps on this rank's part of each batch."""
    return byol.run(byol.read(), prefix, world)


def run_simclr(world: World, prefix: str) -> dict[str, Any]:
    """Three steps on this rank's part of each batch."""
    return simclr.run(simclr.read(), prefix, world)


def run_swav(world: World, prefix: str) -> dict[str, Any]:
    """All steps on this rank's part of each batch."""
    return swav.run(swav.read(), prefix, world)


def run_moco(world: World) -> dict[str, Any]:
    """The three steps, and those of the queue alone."""
    data = moco.read()
    return {"trace": moco.run(data, world), "queue": moco.run_queue(data, "mr", world)}


def moco_run(world: World) -> dict[str, Any]:
    """A run of MoCo with a ResNet, in which replicas are compared before every step."""
    base = config_of(MoCoConfig, RESNET)
    shards = str(Path(sys.argv[1]) / "digits" / "train-*.tar")
    config = replace(
        base,
        epochs=STEPS / (1437 // 16),
        data=replace(base.data, synthetic=False, shards=shards),
        parallel=ParallelConfig(verify_replicas_every=1),
        optim=OptimConfig(name="sgd", lr=0.05, weight_decay=1e-4, warmup_epochs=0),
    )
    trainer = Trainer.build(config, Path(sys.argv[1]) / "moco", world)
    try:
        assert trainer.run() == 0
        return {"config": config, "state": dict(trainer.objective.state_dict())}
    finally:
        trainer.close()


def run_simsiam(world: World, prefix: str) -> dict[str, Any]:
    """Three steps on this rank's part of each batch."""
    return simsiam.run(simsiam.read(), prefix, world)


def run_projector_momentum(world: World, ring: bool) -> dict[str, Any]:
    """Three steps on this rank's part of each batch."""
    return projector_momentum.run(projector_momentum.read(), world, ring=ring)


def swav_codes(world: World) -> Tensor:
    """Codes of this rank's scores in the file that was made on two ranks."""
    data = swav.read()
    scores = torch.from_numpy(data["mr0_scores"][world.rank])
    return swav.codes_of(data, "mr0", scores, torch.float64)


def run_dino(world: World, strategy: str) -> dict[str, Any]:
    """Three steps on this rank's part of each batch, whole or sharded."""
    return dino.run(dino.read(), world, strategy=strategy)


def dino_centre(world: World) -> tuple[Tensor, ...]:
    """Losses, gradients and centres of this rank in the file that was made on two ranks."""
    return dino.on_rank(dino.read(), world.rank)


CASES: dict[str, Callable[[World], object]] = {
    f"{name} {prefix}": partial(run, prefix=prefix)
    for name, run, prefixes in (
        ("byol", run_byol, byol.CASES),
        ("simclr", run_simclr, simclr.CASES),
        ("swav", run_swav, swav.CASES),
        ("simsiam", run_simsiam, simsiam.CASES),
    )
    for prefix in prefixes
} | {
    "moco": run_moco,
    "moco run": moco_run,
    "swav codes": swav_codes,
    "swav with a queue": swav.steps_with_queue,
    "projector_momentum gathered": partial(run_projector_momentum, ring=False),
    "projector_momentum ring": partial(run_projector_momentum, ring=True),
    "dino ddp": partial(run_dino, strategy="ddp"),
    "dino fsdp": partial(run_dino, strategy="fsdp"),
    "dino centre": dino_centre,
    "sdssl moco": sdssl.run_moco,
    "sdssl simclr": partial(sdssl.run_simclr, local_gradient=True),
    "sdssl simclr, true": partial(sdssl.run_simclr, local_gradient=False),
}


if __name__ == "__main__":
    run_cases(CASES)
