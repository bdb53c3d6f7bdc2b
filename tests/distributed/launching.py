"""Several real processes for the tests of ranks.

They are forked from one process a worker that has imported torch and what its optimizers, FSDP2 and
deterministic algorithms import: that costs each rank more than most of its tests.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import time
from pathlib import Path

import torch

from benchmarks.ranks import held_port

Results = list[dict[str, object]]
IMPORTED = ("torch", "torch._dynamo", "torch.distributed.fsdp", "fastmoco.objectives.build")
TIMEOUT_S = 300


def launch(
    world_size: int,
    out: Path,
    *cases: str,
    debug: str = "INFO",
    module: str = "tests.distributed.run_ranks",
    fresh: bool = False,
) -> Results:
    """Run cases in that many processes and return what each left behind.

    ``debug="DETAIL"`` lets torch compare every collective over the ranks, but torch 2.13 crashes in
    it as soon as DistributedDataParallel is built: only for cases without that. With `fresh` each
    process starts an interpreter of its own, for cases that measure its memory.
    """
    context = multiprocessing.get_context("spawn" if fresh else "forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    with held_port() as port:
        shared = {
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCH_DISTRIBUTED_DEBUG": debug,
            "OMP_NUM_THREADS": "1",
        }
        errors = [out / f"rank{r}.stderr" for r in range(world_size)]
        ranks = [
            context.Process(
                target=run_rank,
                args=(
                    module,
                    (str(out), *cases),
                    {**os.environ, **shared, "RANK": str(r), "LOCAL_RANK": str(r)},
                    errors[r],
                ),
            )
            for r in range(world_size)
        ]
        until = time.monotonic() + TIMEOUT_S
        try:
            for rank in ranks:
                rank.start()
            for rank in ranks:
                rank.join(max(0.0, until - time.monotonic()))
        finally:
            for rank in ranks:
                if rank.is_alive():
                    rank.kill()
                    rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * world_size, "\n".join(
        path.read_text(errors="replace")[-3000:] for path in errors if path.exists()
    )
    return [torch.load(out / f"rank{r}.pt", weights_only=False) for r in range(world_size)]


def run_rank(module: str, words: tuple[str, ...], variables: dict[str, str], errors: Path) -> None:
    """In a new process: run a module as `python -m` does, with its stderr in a file."""
    errors.parent.mkdir(parents=True, exist_ok=True)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 2)
    os.environ.clear()
    os.environ.update(variables)
    torch.distributed.set_debug_level_from_env()
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
