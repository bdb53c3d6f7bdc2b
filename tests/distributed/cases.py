"""The main of every run_*.py here: one of several real processes, which runs
named cases in one process group.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from fastmoco.distributed import World, start_world, stop_world


def run_cases(cases: Mapping[str, Callable[[World], object]]) -> None:
    """Run the cases on the command line after the output folder, or all;
    results go to OUT/rank<r>.pt.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    out, names = Path(sys.argv[1]), sys.argv[2:] or list(cases)
    world = start_world("cpu", timeout_s=60)
    results: dict[str, object] = {name: cases[name](world) for name in names}
    torch.save(results | {"world": (world.rank, world.world_size)}, out / f"rank{world.rank}.pt")
    stop_world()
