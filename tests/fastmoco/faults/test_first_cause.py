"""Two real processes of which one fails: both end within seconds, and whatever is read first names
the cause."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from fastmoco.cli.train import train
from fastmoco.config.serial import to_json
from fastmoco.distributed.mesh import World
from fastmoco.errors import RunError
from fastmoco.faults import first_cause
from fastmoco_pipelines.sampling.order import epoch_order
from tests.distributed.launching import forked_ranks
from tests.pipelines.damage import damage

pytestmark = pytest.mark.faults

LAUNCHER = (
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "--no-python",
    sys.executable,
)
PROGRAM = """
import json, sys
from pathlib import Path
from fastmoco.config.serial import from_json
from fastmoco.cli import train as train_command
{before}
sys.exit(train_command.train(from_json(json.loads(sys.argv[1])), Path(sys.argv[2])))
"""


TO_THE_END = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
"""
"""The launcher asks what is left of a start to end, which may be before a rank has said why it does;
so here a rank ends by itself."""


def run(config, out: Path, before: str = "") -> tuple[int, str]:
    """Exit code and all that was printed. Without a first cause peers wait for 10 minutes."""
    command = [
        sys.executable,
        *LAUNCHER,
        "-c",
        PROGRAM.format(before=before),
        json.dumps(to_json(config)),
        str(out),
    ]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout


def run_without_launcher(config, out: Path, before: str) -> tuple[list[int], str]:
    """`run` in forked ranks: each one's exit code, and all that was printed."""
    program = Path(f"{out}.py")
    program.write_text(PROGRAM.format(before=before))
    words = ["tests.distributed.run_file", str(program), json.dumps(to_json(config)), str(out)]
    done = forked_ranks(words, 2, {})
    return [rank.returncode for rank in done], "".join(rank.stderr.decode() for rank in done)


def errors(text: str) -> list[str]:
    """The lines about what went wrong, in their order."""
    return [line for line in text.splitlines() if line.startswith("fastmoco: ")]


@pytest.fixture
def digits_copy(small_run, digits, tmp_path):
    import shutil

    source = Path(digits[0]).parent
    folder = Path(shutil.copytree(source, tmp_path / "digits"))
    shards = str(folder / Path(digits[0]).name)
    return replace(
        small_run, data=replace(small_run.data, shards=shards, max_bad_share=0.0)
    ), folder


@pytest.mark.slow
def test_one_ranks_bad_data_ends_both(digits_copy, tmp_path):
    config, folder = digits_copy
    batch = config.global_batch_size
    victim = int(epoch_order(config.seed, 0, 1437)[2 * batch - 1])  # the last of step 1: rank 1's
    train = tmp_path / "train"
    train.mkdir()
    for path in folder.glob("train-*"):
        path.rename(train / path.name)
    config = replace(config, data=replace(config.data, shards=str(train)))
    name = damage(train, victim, "changed")
    code, text = run(config, tmp_path / "run", TO_THE_END)
    assert code != 0
    lines = errors(text)
    assert any(name in line and "0 are allowed" in line for line in lines), text
    # Rank 1 meets it and writes it into the run's list; rank 0 may read it there and be the first
    # to stop.
    told = re.compile(r"fastmoco: ended by the failure of rank [01]: ")
    assert any(told.match(line) and name in line for line in lines), text
    assert text.index(name) < text.index("Traceback"), text  # the launcher's own, when all is over
    assert name in text[text.index("ChildFailedError") :], (
        text
    )  # the launcher's own report quotes it too


@pytest.mark.long
@pytest.mark.slow
def test_a_rank_that_hangs_in_a_read_ends_both(digits_copy, tmp_path):
    config, _ = digits_copy
    config = replace(config, data=replace(config.data, timeout_s=6.0))
    before = """
import os, time
from fastmoco_pipelines.loading import loader
from fastmoco_pipelines.sets import local_files
loader._REPORT_SECONDS = 2.0
read, reads = local_files.LocalFiles.read, []
def hang(self, places):
    reads.append(1)
    if os.environ["RANK"] == "1" and len(reads) > 3:
        self.reading = places[0][:2]
        time.sleep(1000)
    return read(self, places)
local_files.LocalFiles.read = hang
"""
    code, text = run(config, tmp_path / "run", TO_THE_END + before)
    assert code != 0
    assert "fastmoco: rank 1: warning: waiting for the data of step" in text, text
    lines = errors(text)
    assert any("ended by the failure of rank 1: no data for step" in line for line in lines), text
    assert any("reading the shards for step" in line and "train-" in line for line in lines), text


@pytest.mark.long
@pytest.mark.slow
def test_a_rank_that_is_refused_before_the_first_step_ends_both(digits_copy, tmp_path):
    config, _ = digits_copy
    before = """
import os
from fastmoco.training import setup
build = setup.build_train_loader
def refuse(*args, **more):
    if os.environ["RANK"] == "1":
        raise ValueError("this rank has no data")
    return build(*args, **more)
setup.build_train_loader = refuse
"""
    code, text = run(config, tmp_path / "run", before)
    assert code != 0
    assert "fastmoco: this rank has no data" in text, text
    assert (
        "Connection" not in text
    )  # rank 0 says the same, if the launcher has not ended it before it could


@pytest.mark.long
@pytest.mark.slow
def test_a_rank_that_hears_nothing_is_ended_by_its_watcher(digits_copy, tmp_path):
    """As on a GPU whose exchange waits for the lost peer: here it sleeps instead."""
    config, _ = digits_copy
    before = """
import os, time
from fastmoco.faults import first_cause
from fastmoco.training import trainer
first_cause.GRACE_SECONDS = 1.0
def step(self, *args, **more):
    if os.environ["RANK"] == "1":
        raise MemoryError("no room")
    time.sleep(1000)
trainer.Trainer.step = step
"""
    code, text = run(config, tmp_path / "run", before)
    assert code != 0
    assert "fastmoco: ended by the failure of rank 1: MemoryError: no room" in text, text


FAILING_KNN = """
import functools, os, time
from fastmoco.evaluation import monitor
from fastmoco_pipelines import ShardError
joined = train_command.start_world
train_command.start_world = lambda device, **_: joined(device, timeout_s=20)
embed_part = monitor.embed_part
def broken(*args, **more):
    if os.environ["RANK"] == "1":
        raise ShardError("train-000000.tar: the tar ends inside it")
    {rank_0}
    return embed_part(*args, **more)
monitor.embed_part = broken
"""


FAILING_EVALUATION = """
import os
from fastmoco.cli import knn
from fastmoco.training import embed_run
from fastmoco_pipelines import ShardError
embed_missing = embed_run.embed_missing
def broken(*args, **more):
    if os.environ["RANK"] == "1":
        raise ShardError("train-000000.tar: the tar ends inside it")
    return embed_missing(*args, **more)
embed_run.embed_missing = broken
sys.exit(knn.eval_knn(Path(sys.argv[2]), *{sets!r}, ks=(5,), temperatures=(0.07,)))
"""


@pytest.mark.slow
def test_a_rank_that_cannot_embed_ends_one_that_embeds_longer_than_a_collective_waits(
    digits_copy, digits, tmp_path
):
    config, _ = digits_copy
    config = replace(config, knn=replace(config.knn, every_epochs=1, test_shards=digits[1]))
    before = FAILING_KNN.format(rank_0="time.sleep(60)")
    codes, text = run_without_launcher(config, tmp_path / "run", before)
    assert all(codes), text
    cause = "rank 1: train-000000.tar: the tar ends inside it"
    assert any(f"ended by the failure of {cause}" in line for line in errors(text)), text
    assert "Timed out" not in text


@pytest.mark.slow
def test_the_launchers_report_quotes_the_cause_of_a_failed_eval_knn(digits_copy, digits, tmp_path):
    config, _ = digits_copy
    config = replace(config, epochs=1, optim=replace(config.optim, warmup_epochs=0))
    assert train(config, tmp_path / "run") == 0
    before = FAILING_EVALUATION.format(sets=digits)
    code, text = run(config, tmp_path / "run", before)
    assert code != 0
    assert "rank 1: train-000000.tar: the tar ends inside it" in text[text.index("Failures:") :], (
        text
    )


def test_the_name_of_a_file_that_is_not_utf8_reaches_the_others(monkeypatch):
    """The store refuses it as it is; a rank that raised there would leave the others waiting."""
    store = dist.HashStore()
    monkeypatch.setattr(first_cause, "connect", lambda _: store)
    with (
        pytest.raises(RunError, match="ends inside it"),
        first_cause.first_cause(World(rank=1, world_size=2)),
    ):
        raise RunError("bad-\udcff.tar: ends inside it")
    assert store.get("first-cause") == rb"rank 1: bad-\udcff.tar: ends inside it"
