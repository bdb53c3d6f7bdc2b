"""The main of every run_*.py here: one of several real processes, which runs
named cases in one process group.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastmoco.distributed import World, start_world, stop_world


def be_impatient(group: dist.ProcessGroup | None, seconds: float) -> None:
    """From now on ranks of a group wait so long for each other. They meet before, with the patience
    that the group was made with."""
    dist.barrier(group)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def be_exact() -> None:
    """One thread, deterministic algorithms, and NaN in uninitialised memory."""
    torch.set_num_threads(1)
    # `torch.use_deterministic_algorithms` would import the compiler too, half of a rank's start.
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the whole tensors, put together of all ranks' parts, which cross ranks at once:
    `full_tensor` of each takes longer than a small step.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    shards = {n: t.detach() for n, t in tensors.items() if isinstance(t, DTensor)}
    every: list[Any] = [{}] * (dist.get_world_size() if dist.is_initialized() else 1)
    if shards:
        dist.all_gather_object(every, {n: t.to_local() for n, t in shards.items()})
    found = {n: t.detach().clone() for n, t in tensors.items() if n not in shards}
    for name, shard in shards.items():
        *others, last = shard.placements
        assert all(isinstance(placement, Replicate) for placement in others)
        group = dist.get_process_group_ranks(shard.device_mesh.get_group(len(others)))
        parts = [every[rank][name] for rank in group]
        found[name] = torch.cat(parts, last.dim) if isinstance(last, Shard) else parts[0]
        assert found[name].shape == shard.shape, name
    return {name: found[name] for name in tensors}


def run_cases(cases: Mapping[str, Callable[[World], object]]) -> None:
    """Run the cases on the command line after the output folder, or all;
    results go to OUT/rank<r>.pt.
    """
    be_exact()
    out, names = Path(sys.argv[1]), sys.argv[2:] or list(cases)
    world = start_world("cpu", timeout_s=60)
    results: dict[str, object] = {name: cases[name](world) for name in names}
    torch.save(results | {"world": (world.rank, world.world_size)}, out / f"rank{world.rank}.pt")
    stop_world()
