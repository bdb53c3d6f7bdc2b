"""Several real processes for the tests of ranks."""

from __future__ import annotations

import faulthandler
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.ranks import completed_ranks, held_port, variables_of_ranks
from tests import forks

ROOT = Path(__file__).parents[2]
Results = list[dict[str, object]]
Completed = list[subprocess.CompletedProcess[bytes]]
TIMEOUT_S = 300


def launch(
    world_size: int,
    out: Path,
    *cases: str,
    debug: str = "INFO",
    module: str = "tests.distributed.run_ranks",
    fork: bool = True,
) -> Results:
    """Run cases in that many processes and return what each left behind.

    ``debug="DETAIL"`` lets torch compare every collective over the ranks, but torch 2.13 crashes in
    it as soon as DistributedDataParallel is built: only for cases without that. Without ``fork``
    ranks are commands, for variables of the environment that are read as a process starts.
    """
    before = set(out.iterdir())
    run = forked_ranks if fork else started_ranks

    def start() -> Completed:
        for path in set(out.iterdir()) - before:  # of a start that crashed
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return run([module, str(out), *cases], world_size, {"TORCH_DISTRIBUTED_DEBUG": debug})

    done = again_after_a_crash(start)
    codes = [rank.returncode for rank in done]
    assert codes == [0] * world_size, "\n".join(
        [f"ranks ended with {codes}", *(rank.stderr.decode()[-3000:] for rank in done)]
    )
    return [torch.load(out / f"rank{r}.pt", weights_only=False) for r in range(world_size)]


def started_ranks(words: Sequence[str], ranks: int, variables: Mapping[str, str]) -> Completed:
    """Run `python -m` with these words in that many processes, and wait for all."""
    return completed_ranks(
        [sys.executable, "-X", "faulthandler", "-m", *words],
        ranks,
        variables={
            **variables,
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "pipelines", ROOT / "kernels"))),
        },
        timeout_s=TIMEOUT_S,
        cwd=ROOT,
        stderr=subprocess.PIPE,
    )


def forked_ranks(words: Sequence[str], ranks: int, variables: Mapping[str, str]) -> Completed:
    """`started_ranks` by processes that are forked; all that they print is kept as their standard
    error.
    """
    with held_port() as port, tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(rank) for rank in range(ranks)]
        for log in logs:
            log.touch()  # a rank may end before it can print
        processes = [
            forks.CONTEXT.Process(target=be_rank, args=(list(words), environment, log, ROOT))
            for environment, log in zip(
                variables_of_ranks(port, ranks, variables), logs, strict=True
            )
        ]
        for process in processes:
            process.start()
        end = time.monotonic() + TIMEOUT_S
        try:
            for process in processes:
                process.join(max(0.0, end - time.monotonic()))
            late = any(process.exitcode is None for process in processes)
        finally:
            for process in processes:
                process.kill()
        printed = [log.read_bytes() for log in logs]
    if late:
        raise subprocess.TimeoutExpired(list(words), TIMEOUT_S, stderr=b"\n".join(printed))
    return [
        subprocess.CompletedProcess(words, process.exitcode or 0, None, text)
        for process, text in zip(processes, printed, strict=True)
    ]


def be_rank(words: list[str], environment: Mapping[str, str], log: Path, root: Path) -> None:
    """What a forked process does: a module, as if by `python -m` in a process that starts."""
    forks.print_to(log)
    faulthandler.enable()
    os.environ.clear()
    os.environ.update(environment)
    dist.set_debug_level_from_env()
    torch.set_num_threads(1)
    os.chdir(root)
    sys.path.insert(0, str(root))
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


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
