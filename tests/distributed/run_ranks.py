"""One of several real processes: every case of tests/distributed in one process group.

Started by test_ranks.py as `python -m tests.distributed.run_ranks OUT CASES` under torchrun's
environment variables. Results go to OUT/rank<r>.pt; the test computes the expected values in one
process.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from fastmoco.distributed import BatchNorm, World, gather_keys, parallelize
from fastmoco.errors import RunError
from fastmoco.objectives import MoCoV3, Output
from fastmoco.objectives.reference import plain_forward
from fastmoco.optim import build_adamw
from fastmoco_kernels import info_nce_loss
from tests.distributed.cases import run_cases
from tests.golden_objective import build_golden, random_views, rough_objective, train_step

GOLDEN = Path(__file__).parents[1] / "golden"
GLOBAL_BATCH = 12
UNEVEN = (5, 2, 1, 4)


def objective_and_views(stem: str, dtype: torch.dtype) -> tuple[MoCoV3, tuple[Tensor, Tensor]]:
    """The same objective and global batch in every process."""
    torch.manual_seed(20)
    objective = rough_objective(stem=stem)
    view1, view2 = random_views(objective, GLOBAL_BATCH)
    return objective.to(dtype), (view1.to(dtype), view2.to(dtype))


def norm_and_inputs(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A norm, a global batch in uneven parts, and the weights of the sum that is differentiated."""
    torch.manual_seed(21)
    norm = BatchNorm(3, affine="affine" in kind).double()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn_like(parameter))
    shape = (GLOBAL_BATCH, 3, 4, 5) if "2d" in kind else (GLOBAL_BATCH, 3)
    x = torch.randn(shape, dtype=torch.float64) * 3 + 100
    return norm, x, torch.randn(shape, dtype=torch.float64)


def part(tensor: Tensor, world: World) -> Tensor:
    """This rank's rows of a global batch."""
    return tensor.chunk(world.world_size)[world.rank]


def rows_of(output: Output) -> tuple[Tensor, ...]:
    """The loss, queries of both views, keys of both views, and what else there is."""
    watch = dict(output.watch)
    queries, keys = watch.pop("queries"), watch.pop("keys")
    return (output.loss.detach(), *queries, *keys, *watch.values())


def record(module: nn.Module, output: Output) -> dict[str, object]:
    """Loss, outputs, gradients and buffers after a backward pass."""
    return {
        "output": rows_of(output),
        "gradients": {n: p.grad for n, p in module.named_parameters() if p.grad is not None},
        "buffers": {n: b.clone() for n, b in module.named_buffers()},
    }


def run_objective(
    world: World, stem: str = "patch", dtype: torch.dtype = torch.float64
) -> dict[str, object]:
    """One forward and backward on this rank's part."""
    objective, (view1, view2) = objective_and_views(stem, dtype)
    wrapped = parallelize(
        objective, world
    )  # kept until after backward: its hooks average the gradients
    output = wrapped(part(view1, world), part(view2, world))
    output.loss.backward()
    return record(objective, output)


def run_plain(world: World) -> dict[str, object]:
    """The reference forward with the same collectives; gradients stay local."""
    objective, (view1, view2) = objective_and_views("patch", torch.float64)
    output = plain_forward(objective, part(view1, world), part(view2, world))
    output.loss.backward()
    return record(objective, output)


def run_wrong_offset(world: World) -> dict[str, object]:
    """Mutant: every rank takes the first rank's keys for its positives."""
    with mock.patch("fastmoco.objectives.key_comparison.group_rank", return_value=0):
        return run_objective(world)


def run_local_norms(world: World) -> dict[str, object]:
    """Mutant: batch statistics of one rank only."""
    with mock.patch("fastmoco.distributed.sync_batch_norm.group_size", return_value=1):
        return run_objective(world)


def message_of(action: Callable[[], object]) -> str:
    """The text of the error that an action must raise."""
    try:
        action()
    except (ValueError, RunError) as error:
        return str(error)
    return "no error"


def run_rank_dependent_start(world: World) -> dict[str, object]:
    """Mutant: the last rank starts from another seed."""
    torch.manual_seed(int(world.rank == world.world_size - 1))
    return {"message": message_of(lambda: parallelize(rough_objective(), world))}


def run_foreign_norm(world: World) -> dict[str, object]:
    """Mutant: torch's own batch norm somewhere inside."""
    objective = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    return {"message": message_of(lambda: parallelize(objective, world))}


def run_uneven_keys(world: World) -> dict[str, object]:
    """Mutant: the last rank has one row less; afterwards equal parts must still work."""
    rows = 4 - int(world.rank == world.world_size - 1)
    message = message_of(lambda: gather_keys(torch.ones(rows, 3)))
    mine = torch.full((2, 3), float(world.rank), requires_grad=True)
    return {"message": message, "gathered": gather_keys(mine)}


def run_norms(world: World) -> dict[str, object]:
    """Values, gradients, buffers and dtypes of the norm alone, on parts of different sizes."""
    results: dict[str, object] = {}
    ends = np.cumsum(UNEVEN[: world.world_size])
    rows = slice(int(ends[world.rank]) - UNEVEN[world.rank], int(ends[world.rank]))
    for kind in ("1d", "1d affine", "2d affine"):
        norm, x, weight = norm_and_inputs(kind)
        mine = x[rows].clone().requires_grad_()
        y = norm(mine)
        (y * weight[rows]).sum().backward()
        gradients = [p.grad for p in norm.parameters()]
        results[kind] = (
            y.detach(),
            mine.grad,
            gradients,
            [b.clone() for b in norm.buffers()],
            norm.eval()(mine).detach(),
        )
    norm = BatchNorm(3)
    half = part(norm_and_inputs("1d")[1], world).bfloat16()
    results["bf16"] = (norm(half), norm.running_mean.clone())
    return results


def run_golden_loss(world: World) -> dict[str, object]:
    """The multi-rank losses of loss.npz made for this number of ranks."""
    with np.load(GOLDEN / "loss.npz", allow_pickle=False) as data:
        results: dict[str, object] = {}
        for j in range(int(data["num_mr"])):
            if data[f"mr{j}_loss"].shape[0] != world.world_size:
                continue
            q1, q2, k1, k2 = (
                torch.from_numpy(data[f"mr{j}_{n}"][world.rank]).double()
                for n in ("q1", "q2", "k1", "k2")
            )
            q1.requires_grad_()
            q2.requires_grad_()
            where = {
                "temperature": float(data[f"mr{j}_tau"]),
                "positive_offset": world.rank * q1.shape[0],
            }
            loss = info_nce_loss(q1, gather_keys(k2), **where) + info_nce_loss(
                q2, gather_keys(k1), **where
            )  # type: ignore[arg-type]
            loss.backward()
            results[f"mr{j}"] = (loss.detach(), q1.grad, q2.grad)
    return results


def run_golden_steps(world: World) -> dict[str, object]:
    """The three steps of step.npz, its batch split over the ranks."""
    with np.load(GOLDEN / "step.npz", allow_pickle=False) as archive:
        data = {key: archive[key] for key in archive.files}
    objective = build_golden(data)
    wrapped = parallelize(objective, world)
    batch = (
        part(torch.from_numpy(data["x1"]).double(), world),
        part(torch.from_numpy(data["x2"]).double(), world),
    )
    optimizer = build_adamw(
        objective.named_parameters(), lr=0.0, weight_decay=float(data["weight_decay"])
    )
    losses = [
        train_step(
            objective, optimizer, batch, lr=float(lr), ema_momentum=float(m), forward=wrapped
        )
        for lr, m in zip(data["lr"], data["m"], strict=True)
    ]
    return {"losses": torch.stack(losses), "state": objective.state_dict()}


CASES: dict[str, Callable[[World], dict[str, object]]] = {
    "patch fp64": run_objective,
    "patch fp32": lambda world: run_objective(world, dtype=torch.float32),
    "conv fp64": lambda world: run_objective(world, stem="conv"),
    "conv fp32": lambda world: run_objective(world, stem="conv", dtype=torch.float32),
    "plain": run_plain,
    "wrong offset": run_wrong_offset,
    "local norms": run_local_norms,
    "rank-dependent start": run_rank_dependent_start,
    "foreign norm": run_foreign_norm,
    "uneven keys": run_uneven_keys,
    "norms": run_norms,
    "golden loss": run_golden_loss,
    "golden steps": run_golden_steps,
}


if __name__ == "__main__":
    run_cases(CASES)
