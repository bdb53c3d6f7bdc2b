"""Several real processes for the tests of ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.ranks import completed_ranks

ROOT = Path(__file__).parents[2]
Results = list[dict[str, object]]
Completed = list[subprocess.CompletedProcess[bytes]]


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
    done = again_after_a_crash(
        lambda: completed_ranks(
            [sys.executable, "-X", "faulthandler", "-m", module, str(out), *cases],
            world_size,
            variables={
                "TORCH_DISTRIBUTED_DEBUG": debug,
                "PYTHONPATH": os.pathsep.join(
                    map(str, (ROOT, ROOT / "pipelines", ROOT / "kernels"))
                ),
            },
            timeout_s=300,
            cwd=ROOT,
            stderr=subprocess.PIPE,
        )
    )
    codes = [rank.returncode for rank in done]
    assert codes == [0] * world_size, "\n".join(
        [f"ranks ended with {codes}", *(rank.stderr.decode()[-3000:] for rank in done)]
    )
    return [torch.load(out / f"rank{r}.pt", weights_only=False) for r in range(world_size)]


def again_after_a_crash(start: Callable[[], Completed]) -> Completed:
    """What became of some ranks, which are started once more if one of them was ended by SIGSEGV.

    torch 2.13 crashes now and then in a thread of gloo, between correct collectives (docs/LOG.md). A
    fault of ours would do so again. Every other end is the launch's own.
    """
    done = start()
    if -signal.SIGSEGV not in [rank.returncode for rank in done]:
        return done
    crashed = next(rank for rank in done if rank.returncode == -signal.SIGSEGV)
    warnings.warn(
        f"a rank crashed, all are started again: {crashed.stderr.decode()[-3000:]}", stacklevel=2
    )
    return start()
