"""One of four real processes: rings over all of them, over pairs, and of one.

Started by test_ring_ranks.py as `python -m tests.distributed.run_ring OUT`.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from fastmoco.config import BatchConfig
from fastmoco.distributed import World, gather_keys
from fastmoco.distributed.mesh import lost_a_peer
from fastmoco.distributed.ring import start_ring
from fastmoco.planning.keys import GATHERED_SHARE
from fastmoco.planning.plan import HEADROOM
from fastmoco.training.trainer import Trainer
from fastmoco_kernels import KeyBlock, info_nce_over_blocks, symmetric_info_nce_loss
from tests.distributed.cases import run_cases
from tests.distributed.run_ranks import message_of, objective_and_views, part, record
from tests.distributed.run_trainer import CONFIG

RANKS = 4
SIZES = (1, 2, 4)
"""Ranks of a ring."""
CONFIG_OF_CHOICES = replace(CONFIG, batch=BatchConfig(chunk="none"))
ROWS, DIM = 5, 19
TEMPERATURES: dict[str, Any] = {"0.2": 0.2, "1": 1.0, "tiny": 0.003, "tensor": None}
DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def groups(world: World) -> dict[int, Any]:
    """A process group of this rank for each size; None: all ranks."""
    found: dict[int, Any] = {4: None}
    for size in (1, 2):
        for first in range(0, world.world_size, size):
            members = list(range(first, first + size))
            group = dist.new_group(members)
            if world.rank in members:
                found[size] = group
    return found


def sides(ranks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries and keys of both directions, of all ranks: q1, k2, q2, k1."""
    draws = torch.Generator().manual_seed(ranks)
    q1, k2, q2, k1 = torch.randn(
        4, ranks * ROWS, DIM, generator=draws, dtype=torch.float64
    ).unbind()
    return 3 * q1, k2 + 0.5 * q1, q2, k1 + 0.5 * q2


def run_orders(world: World) -> dict[str, Any]:
    """What each ring brings: ranks, first number of each row, and how many tensors it used."""
    found: dict[str, Any] = {}
    for size, group in groups(world).items():
        me = world.rank % size
        for name, dtype in DTYPES.items():
            rows = torch.full((3, 2), float(10 + me), dtype=dtype, requires_grad=True)
            ranks, values, places, tracked = [], [], set(), False
            for rank, block in start_ring(rows, group):
                ranks.append(rank)
                values.append(block.unique().tolist())
                places.add(block.data_ptr())
                tracked |= block.requires_grad or block.dtype != dtype
            found[f"{size} {name}"] = (ranks, values, len(places), tracked)
    return found


def run_losses(world: World) -> dict[str, Any]:
    """Loss, gradients and accuracy in a ring, twice, and of gathered keys."""
    found: dict[str, Any] = {}
    for size, group in groups(world).items():
        me = world.rank % size
        mine = slice(me * ROWS, (me + 1) * ROWS)
        for dtype in ("fp64", "fp32", "bf16"):
            q1, k2, q2, k1 = (side.to(DTYPES[dtype]) for side in sides(size))
            for name, temperature in TEMPERATURES.items():
                if temperature is None:
                    temperature = torch.tensor(0.2, dtype=torch.float64)

                def measure(ring: bool, how: dict[str, Any]) -> tuple[Tensor, ...]:
                    leaves = [q[mine].clone().requires_grad_() for q in (q1, q2)]  # noqa: B023
                    if ring:
                        keys = torch.cat([k1[mine], k2[mine]], dim=1)  # noqa: B023
                        blocks = (
                            KeyBlock(rank * ROWS, tuple(rows.chunk(2, dim=1))[::-1])
                            for rank, rows in start_ring(keys, group)  # noqa: B023
                        )
                        result = info_nce_over_blocks(leaves, blocks, accuracy=True, **how)
                    else:
                        result = symmetric_info_nce_loss(
                            leaves[0], k2, leaves[1], k1, accuracy=True, **how  # noqa: B023
                        )  # fmt: skip
                    result.loss.backward()
                    assert result.top1 is not None
                    assert result.top5 is not None
                    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
                    return (result.loss.detach(), *gradients, result.top1, result.top5)

                how = {"temperature": temperature, "positive_offset": mine.start}
                found[f"{size} {dtype} {name}"] = {
                    "ring": measure(True, how),
                    "again": measure(True, how),
                    "gathered": measure(False, how),
                    "definition": measure(False, how | {"backend": "reference"}),
                }
    return found


def run_objectives(world: World) -> dict[str, Any]:
    """A whole forward and backward of MoCo v3 on gathered keys and in a ring."""
    found = {}
    for ring in (False, True):
        objective, views = objective_and_views("patch", torch.float64)
        objective.ring = ring
        output = objective(*(part(view, world) for view in views), accuracy=True)
        output.loss.backward()
        found["ring" if ring else "gathered"] = record(objective, output)
    return found


def run_uneven(world: World) -> dict[str, str]:
    """The last rank has a row less."""
    rows = 4 - (world.rank == world.world_size - 1)
    return {
        "ring": message_of(lambda: start_ring(torch.ones(rows, 3))),
        "gathered": message_of(lambda: gather_keys(torch.ones(rows, 3))),
    }


def run_stopped(world: World) -> dict[str, Any]:
    """The last rank starts and passes nothing on; the others are not stuck."""
    dist.barrier()  # the time also limits how long ranks wait for each other to make the group
    group = dist.new_group(timeout=timedelta(seconds=5))
    ring = start_ring(torch.ones(2, 2), group)
    if world.rank == world.world_size - 1:
        dist.barrier()
        return {"ended": None}
    try:
        list(ring)
    except Exception as error:
        ended: object = (lost_a_peer(error), str(error))
    else:
        ended = "all blocks came"
    dist.barrier()
    return {"ended": ended}


def run_choices(world: World, out: Path) -> dict[str, Any]:
    """A step with the choice left to the plan, where the last rank alone has too little memory to
    gather, and where every rank has enough."""
    batch, width = CONFIG.global_batch_size // RANKS, CONFIG.model.projection_dim
    gathered = 2 * (RANKS - 1) * batch * 4 * width * 8
    edge = gathered / GATHERED_SHARE / HEADROOM
    last = world.rank == RANKS - 1
    found = {}
    for name, share in {"too little on one": 0.5 if last else 4.0, "enough": 4.0}.items():
        # A synthetic batch is in memory already: the plan counts it as free.
        shapes = 2 * batch * 3 * CONFIG.data.view1.size**2 * 4
        with mock.patch(
            "fastmoco.planning.choose.free_bytes", return_value=int(share * edge) - shapes
        ):
            trainer = Trainer.build(CONFIG_OF_CHOICES, out / name.replace(" ", "_"), world)
        try:
            loss = trainer.step(trainer.loader.next()).loss.item()
            plan = trainer.forward_backward.plan
            found[name] = (plan.keys, trainer.objective.ring, plan.keys_reason, loss)
        finally:
            trainer.close()
    return found


if __name__ == "__main__":
    run_cases(
        {
            "orders": run_orders,
            "losses": run_losses,
            "objectives": run_objectives,
            "uneven": run_uneven,
            "stopped": run_stopped,
            "choices": lambda world: run_choices(world, Path(sys.argv[1])),
        }
    )
