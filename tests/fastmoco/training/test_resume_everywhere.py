"""A run continues from every step bit for bit, on other numbers of ranks to rounding, and under no
other config."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fastmoco.checkpoint import list_checkpoints, load_checkpoint
from fastmoco.cli.train import train
from fastmoco.config import Config
from fastmoco.config.serial import differences
from fastmoco.distributed.mesh import World
from fastmoco.run.folder import RunFolder
from fastmoco.training.trainer import Trainer
from tests.checkpoint_content import assert_same
from tests.fastmoco.training.test_trainer import _command, _losses, _train
from tests.fault_runs import start_command

pytestmark = pytest.mark.faults

WORLD = World()
TORCHRUN = (
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "{ranks}",
    "--no-python",
    sys.executable,
)


@pytest.mark.long
@pytest.mark.slow
def test_every_cut_of_twenty_steps_continues_bit_for_bit(small_run: Config, tmp_path: Path) -> None:
    """A whole run saves after each of its steps, in the background; from each of these, one step
    must give the next."""
    rules = replace(small_run.checkpoint, every_steps=1, keep=100, async_save=True)
    config = replace(small_run, epochs=4, checkpoint=rules)
    assert _train(config, tmp_path / "whole") == 0
    saved = {
        load_checkpoint(path).step: path
        for path in list_checkpoints(tmp_path / "whole" / "checkpoints")
    }
    assert list(saved) == list(range(1, 21))
    for cut in range(1, 20):
        out = tmp_path / f"cut{cut}"
        (out / "checkpoints").mkdir(parents=True)
        shutil.copytree(saved[cut], out / "checkpoints" / saved[cut].name)
        trainer = Trainer.build(config, out, WORLD, trust=True)
        try:
            assert trainer.step_count == cut
            trainer.step(trainer.loader.next())
            trainer._save(force=True)
        finally:
            trainer.close()
        ours, truth = (
            load_checkpoint(out / "checkpoints" / saved[cut + 1].name),
            load_checkpoint(saved[cut + 1]),
        )
        assert_same(ours.tensors, truth.tensors)
        assert ours.state["data"] == truth.state["data"]
    assert _train(config, tmp_path / "whole") == 0  # the twentieth cut has nothing left to do


@pytest.mark.long
@pytest.mark.slow
def test_two_ranks_are_continued_by_one_and_by_four(small_run: Config, tmp_path: Path) -> None:
    """The learning rate is too small for AdamW to turn rounding into whole steps, as in
    test_trainer.py. In float64: float32 alone is off by up to 3e-6 on some CPUs, and bf16, which
    some multiply natively, by thousandths."""
    config = replace(small_run, precision="fp64", optim=replace(small_run.optim, lr=1e-6))
    assert _train(config, tmp_path / "whole") == 0
    two = tmp_path / "two"
    command = _command(config, two, *(word.format(ranks=2) for word in TORCHRUN), hold=4)
    run = start_command(command, two)
    try:
        run.wait_for_step(2)
        run.process.send_signal(signal.SIGTERM)  # torchrun passes it on
        run.end()
    finally:
        run.close()
    (folder,) = list_checkpoints(two / "checkpoints")[-1:]
    checkpoint = load_checkpoint(folder)
    assert checkpoint.metadata is not None, "two ranks wrote one file"
    assert 2 <= checkpoint.step <= 5, run.text()
    expected = dict(_losses(tmp_path / "whole"))
    for ranks in (1, 4):
        out = tmp_path / f"on {ranks}"
        shutil.copytree(two, out)
        if ranks == 1:
            assert _train(config, out) == 0
        else:
            words = _command(config, out, *(word.format(ranks=ranks) for word in TORCHRUN))
            run = start_command(words, out)
            try:
                assert run.end(seconds=240) == 0, run.text()
            finally:
                run.close()
            assert "world_size 2 -> 4" in " ".join(run.text().split())
        continued = [(step, loss) for step, loss in _losses(out) if step > checkpoint.step]
        assert [step for step, _ in continued] == list(range(checkpoint.step + 1, 16))
        assert max(abs(loss - expected[step]) for step, loss in continued[:5]) <= 1e-9


def changed(group: str, **fields: object) -> Callable[[Config], Config]:
    return lambda config: replace(config, **{group: replace(getattr(config, group), **fields)})


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda config: replace(config, global_batch_size=64), "global_batch_size"),
        (lambda config: replace(config, epochs=7), "epochs"),
        (lambda config: replace(config, precision="fp64"), "precision"),
        (changed("optim", lr=1.0), "optim.lr"),
        (changed("optim", weight_decay=0.5), "optim.weight_decay"),
        (changed("optim", name="lars"), "optim.name"),
        (changed("model", architecture="vit_micro"), "model.architecture"),
        (changed("model", hidden_dim=17), "model.hidden_dim"),
        (changed("objective", temperature=0.5), "objective.temperature"),
        (changed("objective", ema_momentum=0.5), "objective.ema_momentum"),
        (
            lambda c: changed("data", view1=replace(c.data.view1, flip_probability=0.9))(c),
            "data.view1.flip_probability",
        ),
    ],
)
def test_what_a_step_computes_may_not_change(
    small_run: Config, change: Callable[[Config], Config], name: str
) -> None:
    (line,) = differences(small_run, change(small_run))
    assert line.startswith(f"{name}: ")
    assert " -> " in line


@pytest.mark.parametrize(
    "change",
    [
        changed("checkpoint", every_minutes=1, every_steps=7, keep=5, async_save=False),
        changed("data", shards="elsewhere", prefetch=1, timeout_s=5),
        lambda config: replace(config, threads=3, log_every_steps=7),
    ],
)
def test_what_no_step_depends_on_may(small_run: Config, change: Callable[[Config], Config]) -> None:
    assert differences(small_run, change(small_run)) == []


def test_everything_a_run_writes_is_its_owners_alone(small_run: Config, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        optim = replace(small_run.optim, warmup_epochs=0)
        assert train(replace(small_run, epochs=0.4, optim=optim), tmp_path / "run") == 0
    finally:
        os.umask(before)
    assert {
        path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*") if path.is_file()
    } == {0o600}
    folders = [path for path in (tmp_path / "run").rglob("*") if path.is_dir()]
    assert {path.stat().st_mode & 0o777 for path in [tmp_path / "run", *folders]} == {0o700}


def test_the_lock_is_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        folder = RunFolder(tmp_path / "run")
        folder.acquire()
        folder.release()
    finally:
        os.umask(before)
    assert (tmp_path / "run" / "lock").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
