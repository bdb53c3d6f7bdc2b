"""Run by test_agree_ranks.py on several ranks: every decision of `distributed/agree.py`, each rank
with its own word."""

from __future__ import annotations

import torch

from fastmoco.distributed import World, agree
from tests.distributed.cases import run_cases


def decisions(world: World) -> dict[str, object]:
    device, rank = world.device, world.rank
    numbers = torch.tensor([float(rank), -float(rank)])
    return {
        "any, one says yes": agree.any_rank(rank == world.world_size - 1, device),
        "any, all say no": agree.any_rank(False, device),
        "least": agree.least(1.0 / 3.0 - rank, device),
        "first": agree.of_first_rank(10 + rank, device),
        "first of a bool": agree.of_first_rank(rank == 0, device),
        "largest": agree.largest(numbers.clone()).tolist(),
        "total": agree.total(numbers.clone()).tolist(),
        "mean": agree.mean(numbers.double()).tolist(),
    }


if __name__ == "__main__":
    run_cases({"decisions": decisions})
