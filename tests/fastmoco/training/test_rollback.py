"""After a gradient spike a run has the bits of one that never took the steps since its checkpoint,
killed in between or not."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmoco.checkpoint import (
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    save_checkpoint,
)
from fastmoco.config import Config
from fastmoco.config.faults import FaultConfig
from fastmoco.distributed.mesh import World
from fastmoco.errors import EXIT_STOPPED, RunError
from fastmoco.run.folder import RunFolder
from fastmoco.training import state as training_state
from fastmoco.training.trainer import Trainer
from tests.checkpoint_content import assert_same, flip_bit
from tests.fault_runs import assert_same_end, start
from tests.spikes import LOGGED, ROLLING, SPIKE, TOTAL, skip, spike

pytestmark = pytest.mark.faults
WORLD = World()


def long(case: object) -> Any:
    """A case that runs in `make faults` alone."""
    return pytest.param(case, marks=pytest.mark.long)


@pytest.fixture(scope="module")
def rolling() -> Config:
    return ROLLING


def run(
    config: Config,
    out: Path,
    *spikes: int,
    before: Callable[[Trainer, int], None] | None = None,
    **options: Any,
) -> int:
    """Train with spikes; ``before`` is called with the number of each step that is about to
    begin."""
    trainer = spike(Trainer.build(config, out, WORLD, **options), *spikes)
    plain = trainer.step

    def step(batch: Any, **more: Any) -> Any:
        if before is not None:
            before(trainer, batch.step + 1)
        return plain(batch, **more)

    trainer.step = step  # type: ignore[method-assign]
    try:
        return trainer.run()
    finally:
        trainer.close()


def ending(out: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    saved = load_latest(out / "checkpoints")
    assert saved is not None
    return saved.tensors, saved.state


@pytest.fixture(scope="module")
def whole(rolling: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one spike that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    assert run(rolling, out, SPIKE) == 0
    return out


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sweep": {"fused_backend": "fastmoco"},
    "torch": {"fused_backend": "torch"},
    "lars": {"name": "lars", "lr": 0.3},
}


@pytest.mark.parametrize(
    "optim", [OPTIMIZERS["sweep"], *map(long, list(OPTIMIZERS.values())[1:])], ids=OPTIMIZERS
)
def test_the_steps_since_the_checkpoint_have_never_been(
    rolling: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], optim: dict[str, Any]
) -> None:
    config = replace(rolling, optim=replace(rolling.optim, **optim))
    never = Trainer.build(config, tmp_path / "never", WORLD)
    try:
        skip(never, 25, LOGGED)
        expected = {
            n: t.clone()
            for n, t in training_state.collect(never.objective, never.optimizer).items()
        }
    finally:
        never.close()
    assert run(config, tmp_path / "run", SPIKE) == 0
    tensors, state = ending(tmp_path / "run")
    assert_same(tensors, expected)
    assert all(tensors[name] == TOTAL - 3 for name in tensors if name.endswith(".step"))
    assert state["rollback"]["last"] == [LOGGED, 24]
    assert (state["rollback"]["total"], state["rollback"]["row"]) == (1, 1)
    assert RunFolder(tmp_path / "run").read_metric("rolled_back_to") == [(LOGGED, 24)]
    said = " ".join(capsys.readouterr().out.split())
    assert "step 26: a gradient norm above 10 times its running median" in said
    assert (
        "those of step 24 again, as if steps 25 to 27 had been skipped (rollback 1 in a row, 1 in all)"
        in said
    )


def test_without_rollback_a_spike_leaves_its_trace(
    rolling: Config, whole: Path, tmp_path: Path
) -> None:
    """The negative control: what is rolled back would matter. And without a spike nothing is rolled
    back."""
    assert run(replace(rolling, faults=FaultConfig()), tmp_path / "off", SPIKE) == 0
    tensors, state = ending(tmp_path / "off")
    assert state["rollback"] == {}
    assert not torch.equal(
        tensors["model.predictor.0.weight"], ending(whole)[0]["model.predictor.0.weight"]
    )
    assert run(rolling, tmp_path / "calm") == 0
    assert ending(tmp_path / "calm")[1]["rollback"]["total"] == 0


class Killed(Exception):
    """The process is gone: nothing is saved."""


# Before the spike; with the spike not seen yet; right behind the rollback; behind the save after
# it.
@pytest.mark.parametrize("at", [long(26), 27, 28, long(30)])
def test_killed_and_continued_it_ends_in_the_same_bits(
    rolling: Config, whole: Path, tmp_path: Path, at: int
) -> None:
    def kill(trainer: Trainer, number: int) -> None:
        if number == at:
            raise Killed

    with pytest.raises(Killed):
        run(rolling, tmp_path, SPIKE, before=kill)
    assert run(rolling, tmp_path, SPIKE) == 0
    assert_same_end(tmp_path, whole)
    assert ending(tmp_path)[1]["rollback"] == ending(whole)[1]["rollback"]
    assert RunFolder(tmp_path).read_metric("loss") == RunFolder(whole).read_metric("loss")


# A signal in step 25 saves before the spike; in 26 inside it, unseen; in 27 behind the rollback; in
# 28 by steps anyway.
@pytest.mark.parametrize("at", [long(25), 26, long(27), long(28)])
def test_stopped_by_a_signal_it_ends_in_the_same_bits(
    rolling: Config, whole: Path, tmp_path: Path, at: int
) -> None:
    def stop(trainer: Trainer, number: int) -> None:
        if number == at:
            os.kill(os.getpid(), signal.SIGTERM)

    assert run(rolling, tmp_path, SPIKE, before=stop) == EXIT_STOPPED
    saved = load_latest(tmp_path / "checkpoints")
    assert saved is not None
    assert saved.step == at
    assert bool(saved.state["rollback"]["pending"]) == (at in (25, 26))
    assert run(rolling, tmp_path, SPIKE) == 0
    assert_same_end(tmp_path, whole)
    assert RunFolder(tmp_path).read_metric("loss") == RunFolder(whole).read_metric("loss")


def test_what_the_clock_saves_is_neither_gone_back_to_nor_in_the_way(
    rolling: Config, whole: Path, tmp_path: Path
) -> None:
    """Every step is saved and two are kept: step 26 inside the spike, and step 24 besides, for the
    rollback."""
    rules = replace(rolling.checkpoint, every_minutes=1e-9, keep=1)
    folders: list[list[int]] = []

    def look(trainer: Trainer, number: int) -> None:
        if number == LOGGED:
            trainer.saving.last_committed()
            folders.append(
                [load_checkpoint(path).step for path in list_checkpoints(tmp_path / "checkpoints")]
            )

    assert run(replace(rolling, checkpoint=rules), tmp_path, SPIKE, before=look) == 0
    assert folders == [[24, 26]]
    assert_same_end(tmp_path, whole)


def test_a_save_in_flight_is_waited_for_and_gone_back_to(
    rolling: Config, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*arguments: Any, **more: Any) -> Path:
        time.sleep(1.0 if more["step"] == 24 else 0.0)
        return save_checkpoint(*arguments, **more)

    monkeypatch.setattr("fastmoco.checkpoint.saver.save_checkpoint", slow)
    assert run(rolling, tmp_path, SPIKE) == 0
    assert_same_end(tmp_path, whole)


@pytest.mark.parametrize("async_save", [True, long(False)])
def test_a_spike_in_the_step_of_a_save_is_seen_before_it(
    rolling: Config, tmp_path: Path, async_save: bool
) -> None:
    """No step from 21 to 24 is logged; the save of step 24 already holds the state of step 20."""
    rules = replace(rolling.checkpoint, keep=9, async_save=async_save)
    assert run(replace(rolling, log_every_steps=100, checkpoint=rules), tmp_path, 24) == 0
    saved = {
        load_checkpoint(path).step: load_checkpoint(path)
        for path in list_checkpoints(tmp_path / "checkpoints")
    }
    assert_same(saved[24].tensors, saved[20].tensors)
    assert saved[24].state["rollback"]["last"] == [24, 20]
    assert saved[24].state["rollback"]["history"] == saved[20].state["rollback"]["history"]


def test_what_a_signal_saved_inside_a_spike_is_not_gone_back_to_under_another_rhythm(
    rolling: Config, tmp_path: Path
) -> None:
    """Step 26, saved on a signal inside the spike, is a multiple of the next start's two steps; 24
    is the one to go back to."""

    def stop(trainer: Trainer, number: int) -> None:
        if number == SPIKE:
            os.kill(os.getpid(), signal.SIGTERM)

    assert run(rolling, tmp_path, SPIKE, before=stop) == EXIT_STOPPED
    often = replace(rolling, checkpoint=replace(rolling.checkpoint, every_steps=2))
    assert run(often, tmp_path, SPIKE) == 0
    assert RunFolder(tmp_path).read_metric("rolled_back_to") == [(LOGGED, 24)]


def test_given_up_with_a_checkpoint_inside_the_spike_it_says_which_to_move_away(
    rolling: Config, tmp_path: Path
) -> None:
    """Every step is saved, so that a run continued from step 26 would end again, whatever its
    learning rate."""
    rules = replace(rolling.checkpoint, every_minutes=1e-9)
    config = replace(rolling, checkpoint=rules, faults=replace(rolling.faults, max_rollbacks=0))
    with pytest.raises(RunError, match=f"Move the checkpoints from step {SPIKE} on away") as ended:
        run(config, tmp_path, SPIKE)
    calmer = replace(config, optim=replace(config.optim, lr=1e-3))
    for path in list_checkpoints(tmp_path / "checkpoints"):
        if load_checkpoint(path).step >= SPIKE:
            shutil.move(path, tmp_path / path.name)
    assert "Lower --optim.lr (with --allow optim.lr)" in str(ended.value)
    assert run(calmer, tmp_path, allow=["optim.lr"]) == 0


def test_bad_steps_behind_a_spike_are_rolled_back_with_it(rolling: Config, tmp_path: Path) -> None:
    """Five in a row would end the run at the log step that finds the spike before them."""
    rules = replace(rolling.checkpoint, every_steps=8)
    config = replace(rolling, checkpoint=rules, log_every_steps=10)
    build = Trainer.build

    def spoiled(*arguments: Any, **more: Any) -> Trainer:
        return spike(build(*arguments, **more), 26, 27, 28, 29, 30, factor=float("nan"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "build", spoiled)
        assert run(config, tmp_path, 25) == 0
        assert RunFolder(tmp_path).read_metric("rolled_back_to") == [(TOTAL, 24)]
        with pytest.raises(RunError, match="5 steps in a row up to step 30"):
            run(replace(config, faults=FaultConfig()), tmp_path / "off", 25)


@pytest.mark.long
def test_a_damaged_checkpoint_is_passed_over_and_none_at_all_ends_the_run(
    rolling: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = replace(rolling.checkpoint, keep=2, async_save=False)

    def spoil(*steps: int) -> Callable[[Trainer, int], None]:
        def before(trainer: Trainer, number: int) -> None:
            for step in steps if number == SPIKE else ():
                flip_bit(
                    tmp_path
                    / str(len(steps))
                    / "checkpoints"
                    / f"step_{step:08d}"
                    / "tensors.safetensors",
                    9000,
                )

        return before

    config = replace(rolling, checkpoint=rules)
    assert run(config, tmp_path / "1", SPIKE, before=spoil(24)) == 0
    assert RunFolder(tmp_path / "1").read_metric("rolled_back_to") == [(LOGGED, 20)]
    assert "passed over step_00000024: " in " ".join(capsys.readouterr().out.split())
    with pytest.raises(CheckpointError, match="2 checkpoint\\(s\\) exist and none can be trusted"):
        run(config, tmp_path / "2", SPIKE, before=spoil(20, 24))


SPIKING = f"""
from tests.spikes import spike
build = trainer.Trainer.build
trainer.Trainer.build = lambda *a, **k: spike(build(*a, **k), {SPIKE})
"""


@pytest.mark.slow
@pytest.mark.long
def test_two_ranks_of_which_one_is_killed_behind_a_rollback_end_in_the_same_bits(
    rolling: Config, tmp_path: Path
) -> None:
    """T27 with T01: rank 1 is killed in step 28, whose checkpoint is of step 24; torchrun starts
    both again."""
    kill = """
import signal
once = Path(f"{out}.killed")
plain = trainer.Trainer.step
def step(self, batch, **more):
    if batch.step == 27 and rank == 1 and not once.exists():
        once.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, batch, **more)
trainer.Trainer.step = step
"""
    for name, before in (("whole", SPIKING), ("killed", kill + SPIKING)):
        one = start(rolling, tmp_path / name, before=before, restarts=1)
        try:
            assert one.end() == 0, one.text()
        finally:
            one.close()
        assert RunFolder(one.out).read_metric("rolled_back_to") == [(LOGGED, 24)]
    assert Path(f"{tmp_path / 'killed'}.killed").exists()
    assert_same_end(tmp_path / "killed", tmp_path / "whole")
