"""Several real processes for the tests of ranks."""

from __future__ import annotations

import os
import shutil
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
START = """
import gc, runpy, sys
gc.disable()  # looking for garbage while all is imported takes a tenth of the start
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
"""A rank: a module, as if by `python -m`."""


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
    before = set(out.iterdir())

    def start() -> Completed:
        for path in set(out.iterdir()) - before:  # of a start that crashed
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return completed_ranks(
            [sys.executable, "-X", "faulthandler", "-c", START, module, str(out), *cases],
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

    done = again_after_a_crash(start)
    codes = [rank.returncode for rank in done]
    assert codes == [0] * world_size, "\n".join(
        [f"ranks ended with {codes}", *(rank.stderr.decode()[-3000:] for rank in done)]
    )
    return [torch.load(out / f"rank{r}.pt", weights_only=False) for r in range(world_size)]


def again_after_a_crash(start: Callable[[], Completed]) -> Completed:
    """What became of some ranks, which are started once more if one of them was ended by SIGSEGV in
    a thread that runs no Python.

    gloo's threads are such, and one of them has crashed between correct collectives (docs/LOG.md).
    Every other end, and a second crash, is an answer.
    """
    done = start()
    crashed = [rank.stderr.decode() for rank in done if rank.returncode == -signal.SIGSEGV]
    if not crashed or any("Current thread" in stack for stack in crashed):
        return done
    warnings.warn(
        f"a rank crashed outside Python, all are started again: {crashed[0][-3000:]}", stacklevel=2
    )
    return start()
