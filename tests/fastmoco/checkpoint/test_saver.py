"""Saves in the background: the values of the call, one at a time, and no error that the training
does not hear of."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from fastmoco.checkpoint import (
    CheckpointError,
    Saver,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    saver,
)
from fastmoco.cli.train import train
from fastmoco.config import Config
from fastmoco.distributed.mesh import World
from fastmoco.errors import EXIT_REFUSED, RunError
from fastmoco.faults.pulse import Pulse
from fastmoco.run.folder import RunFolder
from fastmoco.training.saving import Saving
from fastmoco.training.trainer import Trainer
from tests.checkpoint_content import (
    assert_same,
    content,
    flip_bit,
    full_disk,
    group_of_one,
    loaded_step,
    save,
)

pytestmark = pytest.mark.faults

WORLD = World()


class Gate:
    """Holds every save back until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.at_work, self.most = threading.Event(), 0, 0
        inner = saver.save_checkpoint

        def gated(*arguments: object, **options: object) -> Path:
            self.at_work += 1
            self.most = max(self.most, self.at_work)
            assert self.open.wait(30)
            try:
                return inner(*arguments, **options)  # type: ignore[arg-type]
            finally:
                self.at_work -= 1

        monkeypatch.setattr(saver, "save_checkpoint", gated)


def spoil(tensors: Mapping[str, Tensor]) -> None:
    """What training does to the state while it is being saved: every value changes, in place."""
    for tensor in tensors.values():
        tensor.copy_(torch.ones_like(tensor))


@pytest.mark.parametrize("layout", ["one file", "shards"])
def test_the_values_of_the_call_are_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    gate, tensors = Gate(monkeypatch), content(1)
    tensors["view"] = torch.arange(24.0).reshape(4, 6).t()[1:]
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    if layout == "shards":
        with group_of_one() as group:
            tensors["sharded"] = distribute_tensor(
                torch.randn(6, 4), init_device_mesh("cpu", (1,)), [Shard(0)]
            )
            expected["sharded"] = tensors["sharded"].full_tensor().clone()
            subject = Saver(tmp_path, keep=1, group=group)
            subject.save_in_background(step=1, tensors=tensors, state={})
            spoil(tensors)
            gate.open.set()
            assert subject.wait() is None
    else:
        subject = Saver(tmp_path, keep=1)
        subject.save_in_background(step=1, tensors=tensors, state={})
        spoil(tensors)
        gate.open.set()
        assert subject.wait() is None
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert_same(loaded.tensors, expected)


def test_the_call_returns_while_the_disk_is_slow_and_the_next_one_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, subject = Gate(monkeypatch), Saver(tmp_path, keep=3)
    subject.save_in_background(step=1, tensors=content(1), state={})
    assert subject.poll() is None
    assert subject.saved_step is None
    assert not gate.open.is_set()
    threading.Timer(0.2, gate.open.set).start()
    subject.save_in_background(step=2, tensors=content(2), state={})
    subject.save_in_background(step=3, tensors=content(3), state={})
    subject.save(step=4, tensors=content(4), state={})
    assert subject.saved_step == 4
    assert gate.most == 1
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["2", "3", "4"]
    for path in list_checkpoints(
        tmp_path
    ):  # the copy's memory is used again: no save may see the next one's values
        loaded = load_checkpoint(path)
        assert_same(loaded.tensors, content(loaded.step))


def test_an_error_in_the_background_comes_out_of_the_next_poll_once(tmp_path: Path) -> None:
    subject = Saver(tmp_path, keep=3)
    subject.save(step=1, tensors=content(1), state={})
    with full_disk():
        subject.save_in_background(step=2, tensors=content(2), state={})
        deadline = time.monotonic() + 30
        while (error := subject.poll()) is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    assert isinstance(error, CheckpointError)
    assert "step 2 was not written" in str(error)
    assert subject.poll() is None
    assert subject.saved_step == loaded_step(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_a_state_that_is_not_finite_is_refused_from_the_background_too(tmp_path: Path) -> None:
    def check(tensors: Mapping[str, Tensor]) -> None:
        raise RunError("not this one")

    subject = Saver(tmp_path, keep=3, check=check)
    subject.save_in_background(step=1, tensors=content(1), state={})
    assert "not this one" in str(subject.wait())
    with pytest.raises(RunError, match="not this one"):
        subject.save(step=1, tensors=content(1), state={})
    assert list_checkpoints(tmp_path) == []


def finite(step: int) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in content(step).items() if name != "weird"}


def saving(config: Config, out: Path) -> Saving:
    return Saving(config, WORLD, RunFolder(out), step=0, pulse=Pulse(config.faults))


def test_a_slow_disk_outlives_the_deadline_of_a_signal(
    small_run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The save on a signal takes a minute, behind one in the background that takes another."""
    rules = replace(small_run.faults, stop_within_s=0.01, hang_timeout_s=0.01)
    config = replace(
        small_run, faults=rules, checkpoint=replace(small_run.checkpoint, every_steps=1)
    )
    gate, subject = Gate(monkeypatch), saving(config, tmp_path)
    subject.after_step(1, lambda: (finite(1), {}), pytest.fail, force=False)
    said: list[tuple[str, str | None, bool]] = []

    def look() -> None:
        said.append((subject._pulse.section, subject._pulse.outlasts(60), subject._pulse.overdue()))
        gate.open.set()

    def look_at_the_first() -> None:
        until = time.monotonic() + 20
        while subject._pulse.section == "between steps" and time.monotonic() < until:
            time.sleep(0.001)
        look()

    thread = threading.Thread(target=look_at_the_first)
    thread.start()
    subject.after_step(2, lambda: (look() or finite(2), {}), pytest.fail, force=True)  # type: ignore[func-returns-value]
    thread.join()
    assert said == [("save", None, False)] * 2
    assert subject._pulse.section == "between steps"


def test_a_failed_background_save_is_repeated_in_the_foreground(
    small_run: Config, tmp_path: Path
) -> None:
    lines: list[str] = []
    subject = saving(
        replace(small_run, checkpoint=replace(small_run.checkpoint, every_steps=3)), tmp_path
    )
    with full_disk():
        subject.after_step(3, lambda: (finite(3), {}), lines.append, force=False)
        subject._saver.settle()
    assert lines == []
    subject.after_step(
        4, lambda: (finite(4), {}), lines.append, force=False
    )  # not due: it is saved for the failure
    assert "failed and is repeated in the foreground" in lines[0]
    assert "step 3 was not written" in lines[0]
    assert loaded_step(tmp_path / "checkpoints") == subject.last_committed() == 4
    subject.after_step(5, lambda: pytest.fail("nothing is due"), lines.append, force=False)
    subject.after_step(6, lambda: (finite(6), {}), lines.append, force=False)
    subject.close(lines.append)
    assert (len(lines), subject.last_committed()) == (1, 6)


def test_a_disk_that_stays_full_ends_the_run_with_the_last_checkpoint_untouched(
    small_run: Config, tmp_path: Path
) -> None:
    lines: list[str] = []
    subject = saving(
        replace(small_run, checkpoint=replace(small_run.checkpoint, every_steps=1)), tmp_path
    )
    subject.after_step(1, lambda: (finite(1), {}), lines.append, force=True)
    with full_disk():
        subject.after_step(2, lambda: (finite(2), {}), lines.append, force=False)
        subject._saver.settle()
        with pytest.raises(
            CheckpointError, match=r"step 3 was not written.*Earlier checkpoints are untouched"
        ):
            subject.after_step(3, lambda: (finite(3), {}), lines.append, force=False)
    assert loaded_step(tmp_path / "checkpoints") == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]


@pytest.mark.parametrize("in_background", [True, False])
def test_the_clock_and_the_steps_decide_and_a_forced_save_is_on_the_disk(
    small_run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_background: bool
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    rules = replace(
        small_run.checkpoint, every_steps=5, every_minutes=1, keep=9, async_save=in_background
    )
    subject = saving(replace(small_run, checkpoint=rules), tmp_path)
    at: list[int] = []

    def after(step: int, *, force: bool = False) -> None:
        subject.after_step(
            step, lambda: (at.append(step) or finite(step), {}), pytest.fail, force=force
        )  # type: ignore[func-returns-value]

    for step in range(1, 12):
        now[0] += 0 if step != 3 else 61
        after(step)
    assert at == [3, 5, 10]
    now[0] -= 1e6  # a clock that jumps back saves nothing twice, and loses nothing
    after(11, force=True)
    assert loaded_step(tmp_path / "checkpoints") == subject.last_committed() == 11
    after(11, force=True)
    assert at == [3, 5, 10, 11]


def noted(name: str, save: Callable[..., None], how: list[str], **more: object) -> None:
    how.append(name)
    save(**more)


def state_of(step: int) -> tuple[dict[str, Tensor], dict[str, object]]:
    return finite(step), {}


@pytest.mark.parametrize("in_background", [True, False])
def test_the_config_decides_how_many_are_kept_and_where_they_are_written(
    small_run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_background: bool
) -> None:
    rules = replace(small_run.checkpoint, every_steps=1, keep=3, async_save=in_background)
    subject, how = saving(replace(small_run, checkpoint=rules), tmp_path), list[str]()
    for name in ("save", "save_in_background"):
        plain = getattr(subject._saver, name)
        monkeypatch.setattr(subject._saver, name, partial(noted, name, plain, how))
    for step in range(1, 7):
        subject.after_step(step, partial(state_of, step), pytest.fail, force=step == 6)
        subject._saver.settle()
    usual = "save_in_background" if in_background else "save"
    assert how == [usual] * 5 + ["save"]  # a forced one is on the disk when it returns
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000004", "step_00000005", "step_00000006"]


def test_no_place_to_save_is_refused_before_the_first_step(
    small_run: Config, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(RunError, match=r"cannot write checkpoints to .*choose another --out"):
        Trainer.build(small_run, tmp_path, WORLD)
    (tmp_path / "checkpoints").unlink()
    Trainer.build(small_run, tmp_path, WORLD).close()  # and the lock was given back
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_leftovers_of_a_killed_run_are_listed_and_harm_nothing(
    small_run: Config, tmp_path: Path, capsys
) -> None:
    half = tmp_path / "checkpoints" / ".writing-step_00000007-0123abcd"
    half.mkdir(parents=True)
    (half / "state.json").write_text("{")
    (tmp_path / "lock").write_text("999999")  # of a process long gone
    (tmp_path / "config.json.tmp").write_text("{")
    trainer = Trainer.build(small_run, tmp_path, WORLD)
    trainer._save(force=True)  # step 0 is nothing to save
    trainer.close()
    assert f"ignored {half.name}, left by a killed run" in " ".join(capsys.readouterr().out.split())
    assert half.is_dir()


def test_a_run_that_ends_by_an_error_still_waits_for_its_save(
    small_run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    rules = replace(small_run.checkpoint, every_steps=1)
    trainer = Trainer.build(replace(small_run, checkpoint=rules), tmp_path, WORLD)
    trainer.step(trainer.loader.next())
    trainer._save(force=False)
    threading.Timer(0.2, gate.open.set).start()
    trainer.close()
    assert loaded_step(tmp_path / "checkpoints") == 1


def test_a_save_that_fails_as_the_run_ends_is_said(
    small_run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = replace(small_run.checkpoint, every_steps=1)
    trainer = Trainer.build(replace(small_run, checkpoint=rules), tmp_path, WORLD)
    trainer.step(trainer.loader.next())
    with full_disk():
        trainer._save(force=False)
        trainer.close()
    assert "the save in the background failed: " in " ".join(capsys.readouterr().out.split())
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_never_begun_again(
    small_run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        flip_bit(save(tmp_path / "checkpoints", step) / "state.json", 9)
    with pytest.raises(SystemExit) as stopped:
        train(small_run, tmp_path)
    assert stopped.value.code == EXIT_REFUSED
    assert "2 checkpoint(s) exist and none can be trusted" in capsys.readouterr().err
    assert not (tmp_path / "metrics.jsonl").exists()
    assert len(list_checkpoints(tmp_path / "checkpoints")) == 2


@pytest.mark.gpu
def test_the_values_of_the_call_are_saved_from_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, subject = Gate(monkeypatch), Saver(tmp_path, keep=2)
    for step in (1, 2):  # the second copy goes into the memory of the first
        gate.open.clear()
        tensors = {name: tensor.cuda() for name, tensor in content(step).items()}
        tensors["large"] = torch.full((1024, 1024), float(step), device="cuda")
        expected = {name: tensor.cpu() for name, tensor in tensors.items()}
        subject.save_in_background(step=step, tensors=tensors, state={})
        spoil(tensors)
        gate.open.set()
        assert subject.wait() is None
        loaded = load_latest(tmp_path)
        assert loaded is not None
        assert_same(loaded.tensors, expected)
    targets = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    loaded.read_into(targets)
    assert_same({name: tensor.cpu() for name, tensor in targets.items()}, expected)
