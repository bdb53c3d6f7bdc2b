"""Runs under a real SLURM: preempted by the end of their time, requeued, and started by srun
alone."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastmoco.run.folder import RunFolder
from tests.fault_runs import ROOT, assert_same_end, environment, start_command
from tests.slurm.cluster import Cluster, why_not

pytestmark = [
    pytest.mark.faults,
    pytest.mark.long,
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "SLURM is here"),
]
SLOW = """#!{python}
# As `python -m fastmoco`, with steps long enough for a time limit of SLURM.
import sys, time
from fastmoco.cli.main import main
from fastmoco.training import trainer
step = trainer.Trainer.step
def slower(self, *arguments, **more):
    time.sleep(0.4)
    return step(self, *arguments, **more)
trainer.Trainer.step = slower
sys.argv[1:3] = []
sys.exit(main())
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # a short path: sockets are in it
    one = Cluster(folder)
    one.environment |= environment(PYTHON=sys.executable, FASTMOCO_LAUNCH=str(ROOT / "launch"))
    try:
        one.start()
        yield one
    finally:
        one.stop()
        shutil.rmtree(folder, ignore_errors=True)


def words(digits: tuple[str, str], out: Path, epochs: int) -> list[str]:
    """Recipe, folder and overrides: 22 steps per epoch."""
    return [
        "quickstart_digits",
        "--out",
        str(out),
        "--data.shards",
        digits[0],
        "--global-batch-size=64",
        f"--epochs={epochs}",
        "--optim.warmup-epochs=1",
        "--knn.every-epochs=0",
        "--log-every-steps=1",
        "--threads=1",
    ]


def test_a_run_that_is_longer_than_its_time_is_requeued_and_ends_in_the_same_bits(
    cluster: Cluster, digits: tuple[str, str], tmp_path: Path
) -> None:
    """launch/slurm.sh on two nodes, with one minute for a run of more."""
    slow = cluster.folder / "python"
    slow.write_text(SLOW.format(python=sys.executable))
    slow.chmod(0o755)
    cluster.environment["PYTHON"] = str(slow)
    out, log = tmp_path / "run", tmp_path / "job.log"
    small = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
    job = cluster.run(
        "sbatch",
        "--parsable",
        *small,
        "--time=1",
        "--signal=USR1@8",
        f"--output={log}",
        str(ROOT / "launch" / "slurm.sh"),
        *words(digits, out, 5),
        check=True,
    )

    # Undisturbed and without SLURM, while the job runs.
    whole = start_command(
        [sys.executable, "-m", "fastmoco", "train", *words(digits, tmp_path / "whole", 5)]
        + ["--gpus", "2"],
        tmp_path / "whole",
    )
    try:
        assert whole.end() == 0, whole.text()
    finally:
        whole.close()

    until = time.monotonic() + 400
    while not (out / "DONE").exists():
        text = log.read_text() if log.exists() else ""
        assert time.monotonic() < until, text + cluster.run("scontrol", "show", "job", job)
        cluster.run("scontrol", "update", f"jobid={job}", "starttime=now")  # SLURM waits 2 minutes
        time.sleep(1)
    text = log.read_text()
    assert "SIGUSR1: saved step" in text
    assert "continuing from" in text
    assert "batch 64 on 2 x cpu" in text
    restarts = cluster.run("scontrol", "show", "job", job).partition("Restarts=")[2].split()[0]
    assert int(restarts) >= 1
    losses = [RunFolder(folder).read_metric("loss") for folder in (out, tmp_path / "whole")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 110
    assert_same_end(out, tmp_path / "whole")


def test_srun_alone_starts_the_ranks_and_a_batch_step_trains_alone(
    cluster: Cluster, digits: tuple[str, str], tmp_path: Path
) -> None:
    train = [sys.executable, "-m", "fastmoco", "train"]
    srun = ["srun", "--nodes=2", "--ntasks=2", *train]
    text = cluster.run(*srun, *words(digits, tmp_path / "two", 1), check=True)
    assert "batch 64 on 2 x cpu" in text
    assert (tmp_path / "two" / "DONE").exists()

    # Two nodes, and one process in the shell of the job.
    script = tmp_path / "job.sh"
    script.write_text('#!/bin/sh\nexec "$@"\n')
    log = tmp_path / "log"
    alone = ["sbatch", "--wait", "--nodes=2", "--ntasks=2", f"--output={log}", str(script), *train]
    cluster.run(*alone, *words(digits, tmp_path / "one", 1), check=True)
    assert "batch 64 on 1 x cpu" in log.read_text()

    text = cluster.run(*srun, *words(digits, tmp_path / "none", 1), "--gpus", "2")
    assert "--gpus starts the processes itself, but srun has started 2 tasks" in text
    assert not (tmp_path / "none").exists()
