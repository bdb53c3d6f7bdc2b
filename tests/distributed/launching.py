"""Several real processes for the tests of ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.ranks import completed_ranks

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
    done = completed_ranks(
        [sys.executable, "-m", module, str(out), *cases],
        world_size,
        variables={
            "TORCH_DISTRIBUTED_DEBUG": debug,
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "pipelines", ROOT / "kernels"))),
        },
        timeout_s=300,
        cwd=ROOT,
        stderr=subprocess.PIPE,
    )
    assert [rank.returncode for rank in done] == [0] * world_size, "\n".join(
        rank.stderr.decode()[-3000:] for rank in done
    )
    return [torch.load(out / f"rank{r}.pt", weights_only=False) for r in range(world_size)]
