"""One of two real processes: runs of the trainer under DDP and FSDP2, and one
continued as the other.

Started by test_trainer_ranks.py as
`python -m tests.distributed.run_trainer OUT`; results go to OUT/rank<r>.pt.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.baseline.trainer import Baseline
from fastmoco.checkpoint import list_checkpoints
from fastmoco.config import (
    BatchConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
)
from fastmoco.distributed import World
from fastmoco.run.folder import RunFolder
from fastmoco.training.trainer import Trainer
from fastmoco_pipelines.spec import ViewSpec
from tests.distributed.cases import run_cases
from tests.distributed.run_initial_weights import starts
from tests.distributed.run_ranks import message_of
from tests.distributed.some_costs import with_some_costs

STEPS, CUT = 6, 3
CONFIG = Config(
    epochs=STEPS / (1_281_167 // 16),
    global_batch_size=16,
    precision="fp64",
    threads=1,
    log_every_steps=1,
    model=ModelConfig(
        architecture="vit_nano", image_size=8, patch_size=2, hidden_dim=32, projection_dim=8
    ),
    data=DataConfig(synthetic=True, view1=ViewSpec(size=8), view2=ViewSpec(size=8)),
    optim=OptimConfig(warmup_epochs=0, lr=1e-2),
    checkpoint=CheckpointConfig(every_steps=CUT, keep=9),
)


def with_strategy(strategy: str, chunk: int = 0, **parallel: Any) -> Config:
    batch = BatchConfig(chunk=chunk or "none", kept=1 if chunk else "auto")
    return replace(CONFIG, batch=batch, parallel=ParallelConfig(strategy=strategy, **parallel))  # type: ignore[arg-type]


def run(config: Config, out: Path, world: World, *, trust: bool = False) -> dict[str, Any]:
    """A run to its end, new or continued; the losses that it logged."""
    trainer = Trainer.build(config, out, world, trust=trust)
    try:
        code = trainer.run()
        kinds = {type(tensor).__name__ for tensor in trainer.objective.predictor.parameters()}
        optimizer = type(trainer.optimizer.inner).__module__
    finally:
        trainer.close()
    dist.barrier()
    return {
        "code": code,
        "losses": RunFolder(out).read_metric("loss"),
        "kinds": kinds,
        "optimizer": optimizer,
    }


def run_continued(config: Config, before: Path, out: Path, world: World) -> dict[str, Any]:
    """Continue a run that has ended from its checkpoint at `CUT`."""
    if world.rank == 0:
        first = list_checkpoints(before / "checkpoints")[0]
        shutil.copytree(first, out / "checkpoints" / first.name)
    dist.barrier()
    with with_some_costs():  # "fsdp chunked" counts its own
        return run(config, out, world, trust=True)


def run_flipped_bit(out: Path, world: World) -> dict[str, Any]:
    """A bit of the last rank flips after the second step, high enough to survive the rounding of
    the next momentum update; ranks are compared before every third step."""
    trainer = Trainer.build(with_strategy("ddp", verify_replicas_every=3), out, world)
    try:
        for _ in range(2):
            trainer.step(trainer.loader.next())
        if world.rank == 1:
            trainer.objective.momentum_encoder.cls_token.data.view(torch.int64)[0, 0, 7] ^= 1 << 52
        trainer.step(trainer.loader.next())
        message = message_of(lambda: trainer.step(trainer.loader.next()))
        return {"message": message, "steps": trainer.step_count}
    finally:
        trainer.close()


def run_beside_baseline(out: Path, world: World) -> dict[str, Any]:
    """Losses of this rank, and those of the plain PyTorch trainer on the same batches."""
    trainer = Trainer.build(with_strategy("ddp"), out, world)
    try:
        baseline = Baseline(trainer.config, world.device, sample_count=trainer.loader.sample_count)
        baseline.load_from(trainer.objective)
        losses, plain = [], []
        for _ in range(CUT):
            batch = trainer.loader.next()
            losses.append(trainer.step(batch).loss.item())
            plain.append(baseline.step(*batch.views).item())
        return {"losses": losses, "plain": plain}
    finally:
        trainer.close()


def cases_in(out: Path) -> dict[str, Callable[[World], dict[str, Any]]]:
    """Every case, in the order of their dependencies."""
    return {
        "ddp": lambda world: run(with_strategy("ddp"), out / "ddp", world),
        "fsdp": lambda world: run(with_strategy("fsdp"), out / "fsdp", world),
        "fsdp chunked": lambda world: run(with_strategy("fsdp", 2), out / "chunked", world),
        "fsdp as ddp": lambda world: run_continued(
            with_strategy("ddp"), out / "fsdp", out / "as ddp", world
        ),
        "ddp as fsdp": lambda world: run_continued(
            with_strategy("fsdp", 2), out / "ddp", out / "as fsdp", world
        ),
        "baseline": lambda world: run_beside_baseline(out / "baseline", world),
        "flipped bit": lambda world: run_flipped_bit(out / "flipped", world),
        "initial weights": lambda world: starts(out, world),
    }


if __name__ == "__main__":
    run_cases(cases_in(Path(sys.argv[1])))
