"""Several real processes for the tests of ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.ranks import held_port

ROOT = Path(__file__).parents[2]
Results = list[dict[str, object]]


def launch(
    world_size: int,
    out: Path,
    *cases: str,
    debug: str = "INFO",
    module: str = "tests.distributed.run_ranks",
) -> Results:
    """Run cases in that many processes and return what each left behind.

    ``debug="DETAIL"`` lets torch compare every collective over the ranks, but torch 2.13 crashes in
    it as soon as DistributedDataParallel is built: only for cases without that.
    """
    with held_port() as port:
        shared = os.environ | {
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCH_DISTRIBUTED_DEBUG": debug,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "pipelines", ROOT / "kernels"))),
        }
        command = [sys.executable, "-m", module, str(out), *cases]
        ranks = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=shared | {"RANK": str(r), "LOCAL_RANK": str(r)},
                stderr=subprocess.PIPE,
            )
            for r in range(world_size)
        ]
        try:
            errors = [rank.communicate(timeout=300)[1].decode() for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * world_size, "\n".join(
        e[-3000:] for e in errors
    )
    return [torch.load(out / f"rank{r}.pt", weights_only=False) for r in range(world_size)]
