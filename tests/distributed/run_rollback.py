"""One of two real processes: a run that rolls back, and one without the steps
that were rolled back.

Started by test_rollback_ranks.py as
`python -m tests.distributed.run_rollback OUT`; results go to OUT/rank<r>.pt.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.tensor import DTensor

from fastmoco.config import ParallelConfig
from fastmoco.distributed import World
from fastmoco.run.folder import RunFolder
from fastmoco.training import state as training_state
from fastmoco.training.trainer import Trainer
from tests.distributed.cases import run_cases
from tests.distributed.run_ranks import message_of
from tests.distributed.run_sharded import whole
from tests.spikes import LOGGED, ROLLING, SPIKE, skip, spike


def build(strategy: str, out: Path, world: World) -> Trainer:
    return Trainer.build(replace(ROLLING, parallel=ParallelConfig(strategy=strategy)), out, world)  # type: ignore[arg-type]


def state_of(trainer: Trainer) -> dict[str, Any]:
    tensors = training_state.collect(trainer.objective, trainer.optimizer)
    sharded = sum(isinstance(tensor, DTensor) for tensor in tensors.values())
    return {
        "state": whole({n: t for n, t in tensors.items() if "rng" not in n}),
        "sharded": sharded,
    }


def run(strategy: str, out: Path, world: World) -> dict[str, Any]:
    """A whole run with a spike in the first rank's gradients; under DDP no
    other rank sees it, and all must follow.
    """
    trainer = build(strategy, out / f"{strategy} run", world)
    if world.rank == 0:
        spike(trainer, SPIKE)
    try:
        code = trainer.run()
        identity = trainer.identity.run_id
        found = state_of(trainer)
    finally:
        trainer.close()
    dist.barrier()
    back = RunFolder(out / f"{strategy} run").read_metric("rolled_back_to")
    return found | {"code": code, "back": back, "identity": identity}


def run_never(strategy: str, out: Path, world: World) -> dict[str, Any]:
    """The same run without the steps that were rolled back."""
    trainer = build(strategy, out / f"{strategy} never", world)
    try:
        skip(trainer, 25, LOGGED)
        return state_of(trainer)
    finally:
        trainer.close()


def run_foreign(out: Path, world: World) -> dict[str, Any]:
    """A folder whose config.json is gone: no rank continues from its
    checkpoints, and with trust every rank does.
    """
    folder = out / "ddp run"
    if world.rank == 0:
        (folder / "config.json").unlink()
    dist.barrier()
    message = message_of(lambda: Trainer.build(ROLLING, folder, world))
    dist.barrier()
    trainer = Trainer.build(ROLLING, folder, world, trust=True)
    trainer.close()
    return {"message": message, "step": trainer.step_count}


def cases_in(out: Path) -> dict[str, Callable[[World], dict[str, Any]]]:
    """Every case, in the order of their dependencies."""
    cases: dict[str, Callable[[World], dict[str, Any]]] = {}
    for strategy in ("ddp", "fsdp"):
        cases[f"{strategy} run"] = lambda world, strategy=strategy: run(strategy, out, world)  # type: ignore[misc]
        cases[f"{strategy} never"] = lambda world, strategy=strategy: run_never(
            strategy, out, world
        )  # type: ignore[misc]
    return cases | {"foreign": lambda world: run_foreign(out, world)}


if __name__ == "__main__":
    run_cases(cases_in(Path(sys.argv[1])))
