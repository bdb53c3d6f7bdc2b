"""One of several real processes: a step in chunks, and its mutants, in one process group.

Started by test_chunked_ranks.py as
`python -m tests.distributed.run_chunked OUT`; results go to OUT/rank<r>.pt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from unittest import mock

import torch
import torch.distributed as dist

from fastmoco.config import BatchConfig, Config, DataConfig, ModelConfig, OptimConfig
from fastmoco.distributed import World
from fastmoco.distributed.gradient_average import GradientAverage
from fastmoco.distributed.parallelize import parallelize
from fastmoco.objectives.build import build_objective
from fastmoco.objectives.chunked import ChunkedStep
from fastmoco.planning.choose import choose_plan
from fastmoco_pipelines.spec import ViewSpec
from tests.distributed.cases import run_cases
from tests.distributed.run_ranks import message_of, objective_and_views, part, record
from tests.distributed.some_costs import with_some_costs


def run_step(
    world: World,
    *,
    chunk: int = 2,
    kept: int = 0,
    dtype: torch.dtype = torch.float64,
    uneven: bool = False,
) -> dict[str, object]:
    """One step in chunks on this rank's part, and the number of collectives with gradients."""
    objective, (view1, view2) = objective_and_views("patch", dtype)
    assert parallelize(objective, world, average_gradients=False) is objective
    step = ChunkedStep(
        objective, chunk=chunk + (world.rank if uneven else 0), kept=world.rank if uneven else kept
    )
    sizes: list[int] = []
    all_reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: object, **options: object) -> object:
        sizes.append(tensor.numel())
        return all_reduce(tensor, *args, **options)  # type: ignore[arg-type]

    with mock.patch("torch.distributed.all_reduce", counted):
        output = step(part(view1, world), part(view2, world), accuracy=True)
    trainable = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    return record(objective, output) | {"sizes": sizes, "trainable": trainable}


def run_small_buckets(world: World) -> dict[str, object]:
    """Gradients in many messages, some tensors larger than one."""
    with mock.patch("fastmoco.distributed.gradient_average.BUCKET_BYTES", 2000):
        return run_step(world)


def run_unsynced(world: World) -> dict[str, object]:
    """Mutant: gradients are not averaged."""
    with mock.patch.object(GradientAverage, "last", return_value=contextlib.nullcontext()):
        return run_step(world)


def run_local_norms(world: World) -> dict[str, object]:
    """Mutant: batch statistics of one rank only."""
    with mock.patch("fastmoco.distributed.sync_batch_norm.group_size", return_value=1):
        return run_step(world)


def run_wrong_offset(world: World) -> dict[str, object]:
    """Mutant: every rank takes the first rank's keys for its positives."""
    with mock.patch("fastmoco.objectives.key_comparison.group_rank", return_value=0):
        return run_step(world)


def run_averaged_per_chunk(world: World) -> dict[str, object]:
    """Mutant: an average after every backward, as in a data-parallel wrapper."""
    with mock.patch.object(GradientAverage, "local", GradientAverage.last):
        return {"message": _runtime_message(lambda: run_step(world))}


def _runtime_message(action: Callable[[], object]) -> str:
    try:
        action()
    except RuntimeError as error:
        return str(error)
    return "no error"


def run_mixed_start(world: World) -> dict[str, object]:
    """Mutant: the last rank starts from other weights; chunks bypass the
    wrapper, but not this check.
    """
    objective, _ = objective_and_views("patch", torch.float64)
    if world.rank == world.world_size - 1:
        with torch.no_grad():
            objective.predictor[0].weight[0, 0] += 1e-7
    return {"message": message_of(lambda: parallelize(objective, world, average_gradients=False))}


def run_plan(world: World) -> dict[str, object]:
    """Ranks with different free memory use the plan of the smallest."""
    config = Config(
        global_batch_size=1024,
        model=ModelConfig(
            architecture="vit_nano", image_size=8, patch_size=2, hidden_dim=32, projection_dim=8
        ),
        data=DataConfig(view1=ViewSpec(size=8), view2=ViewSpec(size=8)),
        optim=OptimConfig(warmup_epochs=0),
        batch=BatchConfig(chunk="auto"),
    )

    objective = build_objective(config, world.device)
    free = (40 - 8 * world.rank) * 10**6
    with with_some_costs(), mock.patch("fastmoco.planning.choose.free_bytes", return_value=free):
        return {"plan": choose_plan(config, objective, world, "fp32").to_json()}


CASES: dict[str, Callable[[World], dict[str, object]]] = {
    "fp64": run_step,
    "fp64 kept 1": lambda world: run_step(world, kept=1),
    "fp64 kept all": lambda world: run_step(world, kept=9),
    "fp64 ragged": lambda world: run_step(world, chunk=5),
    "fp64 ranks differ": lambda world: run_step(world, chunk=1, uneven=True),
    "fp32": lambda world: run_step(world, dtype=torch.float32),
    "fp32 kept 1": lambda world: run_step(world, kept=1, dtype=torch.float32),
    "small buckets": run_small_buckets,
    "unsynced": run_unsynced,
    "local norms": run_local_norms,
    "wrong offset": run_wrong_offset,
    "averaged per chunk": run_averaged_per_chunk,
    "mixed start": run_mixed_start,
    "plan": run_plan,
}


if __name__ == "__main__":
    run_cases(CASES)
