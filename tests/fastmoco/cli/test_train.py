"""The end of `fastmoco train`, and its start on a run that is finished."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fastmoco.cli import train as train_command
from fastmoco.cli.train import train
from fastmoco.config import Config
from fastmoco.config.serial import to_json
from fastmoco.distributed.mesh import World
from fastmoco.errors import RunError
from fastmoco.run.folder import RunFolder
from fastmoco.training.trainer import Trainer
from tests.fault_runs import FaultRun, environment, start, start_command

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def config(brief_run: Config, digits: tuple[str, str]) -> Config:
    """A run of five steps."""
    return replace(brief_run, epochs=1, optim=replace(brief_run.optim, warmup_epochs=0))


@pytest.fixture(scope="module")
def finished(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder; tests work on a copy."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert train(config, out) == 0
    return out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


PROGRAM = """
import json, sys
from pathlib import Path
from fastmoco.cli import train as train_command
from fastmoco.config.serial import from_json
code = train_command.train(from_json(json.loads(sys.argv[1])), Path(sys.argv[2]))
loaded = ("nvidia", "matplotlib", "fastmoco.training", "fastmoco.objectives", "fastmoco.optim")
print(json.dumps(sorted(name for name in sys.modules if name.startswith(loaded))))
sys.exit(code)
"""


def test_a_finished_run_starts_nothing(config: Config, copy: Path) -> None:
    """Without its shards, without DALI, the model's modules and matplotlib, and no file changes."""
    (copy / "DONE").unlink()  # as `--gpus` and slurm.sh do
    before = {
        path: path.stat().st_mtime_ns
        for path in copy.rglob("*")
        if path.suffix in (".png", ".jsonl")
    }
    elsewhere = replace(config, data=replace(config.data, shards=str(copy / "nothing-*.tar")))
    command = [sys.executable, "-c", PROGRAM, json.dumps(to_json(elsewhere)), str(copy)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said, *commands, loaded = done.stdout.splitlines()
    assert [" eval neighbours " in commands[0], " --encoder " in commands[1]] == [True, True]
    assert said == f"this run is finished already; its 5 steps are in {copy / 'checkpoints'}"
    assert json.loads(loaded) == [
        "fastmoco.training",
        "fastmoco.training.classes",
        "fastmoco.training.resume",
        "fastmoco.training.start",
    ]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (copy / "DONE").exists()
    assert not (copy / "starts.json").exists()
    RunFolder(copy).acquire()  # it is free again


def test_a_missing_or_older_picture_is_drawn(config: Config, copy: Path) -> None:
    picture = copy / "curves.png"
    picture.unlink()
    assert train(config, copy) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    os.utime(picture, (1, 1))
    assert train(config, copy) == 0
    assert picture.stat().st_mtime > 1


def test_another_config_is_refused_with_the_same_message(
    config: Config, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = replace(config, seed=1, optim=replace(config.optim, lr=1.0))
    with pytest.raises(RunError) as expected:
        Trainer.build(other, copy, World())
    with pytest.raises(SystemExit, match="2"):
        train(other, copy)
    assert f"fastmoco: {expected.value}\n" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        train(config, copy, allow=["seed"])
    assert "--allow seed: cannot change within a run" in capsys.readouterr().err
    assert train(config, copy) == 0  # its folder was given back


def test_more_epochs_continue_it(
    config: Config, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = replace(config, epochs=2)
    with pytest.raises(SystemExit, match="2"):
        train(longer, copy)
    assert "give --allow epochs" in capsys.readouterr().err
    assert train(longer, copy, allow=["epochs"]) == 0
    assert "finished after 10 steps" in capsys.readouterr().out
    assert RunFolder(copy).read_metric("loss")[-1][0] == 10


def test_the_checkpoint_is_verified_and_its_run_is_checked(
    config: Config, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(copy)
    saved = folder.read_config()
    mine = saved["run_id"]
    folder.write_config(saved | {"run_id": "f" * 14})
    with pytest.raises(SystemExit, match="2"):
        train(config, copy)
    assert f"this checkpoint was written by run {mine}" in capsys.readouterr().err

    # Trusted once, it stays trusted.
    assert train(config, copy, trust=True) == 0
    assert folder.read_config()["trusted_run_ids"] == [mine]
    assert train(config, copy) == 0
    assert capsys.readouterr().out.count("finished already") == 2

    # Damaged, it is passed over, and the run does its last steps again.
    newest = copy / "checkpoints" / "step_00000005" / "tensors.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    assert train(config, copy) == 0
    out = capsys.readouterr().out
    assert "passed over step_00000005" in out
    assert "finished after 5 steps" in out


@pytest.mark.parametrize(
    "error", [ImportError("no matplotlib"), MemoryError(), ValueError("x"), KeyError("y")]
)
def test_an_error_in_drawing_does_not_fail_a_finished_run(
    config: Config, copy: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    (copy / "curves.png").unlink()
    monkeypatch.setattr(train_command, "draw_curves", fail)
    assert train(config, copy) == 0
    assert not (copy / "curves.png").exists()


DRAW_UNTIL_KILLED = """
from matplotlib.figure import Figure
def save(self, path, **more):
    path.write_bytes(b"half")
    print("drawing", flush=True)
    import time
    time.sleep(100)
Figure.savefig = save
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_draws_ends_a_finished_run_with_0(
    config: Config, copy: Path, number: signal.Signals
) -> None:
    (copy / "curves.png").unlink()
    one = start(config, copy, before=DRAW_UNTIL_KILLED, ranks=0)
    try:
        one.wait_for_text("drawing")
        one.process.send_signal(number)
        assert one.end(60) == 0, one.text()
        assert f"curves.png not drawn: {number.name}; the run is finished" in one.text()
        assert not list(copy.glob("*curves*"))
        assert (copy / "DONE").exists()
    finally:
        one.close()


SLOW = """
import os, time
from datetime import timedelta
import torch.distributed as dist
from fastmoco.cli import train as train_command
LIMIT, DRAWING = 20, 30

# A collective that takes longer than its limit ends the process, as with NCCL.
wait_for_all = dist.barrier
def barrier():
    try:
        wait_for_all(async_op=True).wait(timedelta(seconds=LIMIT))
    except RuntimeError as error:
        print("a collective took too long:", error, flush=True)
        os._exit(134)
dist.barrier = barrier

drawn = train_command.draw_curves
def slow(*args, **more):
    print("picture begun", flush=True)
    time.sleep(DRAWING)
    return drawn(*args, **more)
train_command.draw_curves = slow
"""


def end_of_slow_drawing(one: FaultRun) -> None:
    """Exit code 0, a mark and a picture, and drawing took longer than any collective may."""
    try:
        assert one.end() == 0, one.text()
        assert one.text().count("picture begun") == 1
        assert "took too long" not in one.text()
        assert (one.out / "DONE").exists()
        assert (one.out / "curves.png").read_bytes().startswith(b"\x89PNG")
    finally:
        one.close()


@pytest.mark.slow
def test_slow_drawing_fails_no_rank_under_torchrun(config: Config, tmp_path: Path) -> None:
    end_of_slow_drawing(start(config, tmp_path / "run", before=SLOW))


@pytest.mark.long
@pytest.mark.slow
def test_slow_drawing_fails_no_rank_of_gpus_2(config: Config, tmp_path: Path) -> None:
    pytest.importorskip("tyro", reason="tyro is not installed")
    text = "".join(f"    {line}\n" for line in SLOW.splitlines())
    (tmp_path / "sitecustomize.py").write_text(f"import os\nif 'RANK' in os.environ:\n{text}")
    out = tmp_path / "run"
    words = ["quickstart_digits", "--gpus", "2", "--out", str(out), "--threads=1", "--epochs=1"]
    words += ["--data.shards", config.data.shards, "--optim.warmup-epochs=0"]
    words += ["--global-batch-size=64"]
    command = [sys.executable, "-m", "fastmoco", "train", *words, "--knn.every-epochs=0"]
    more = {"PYTHONPATH": f"{tmp_path}:{environment()['PYTHONPATH']}"}
    end_of_slow_drawing(start_command(command, out, **more))


@pytest.mark.long
@pytest.mark.slow
def test_two_ranks_agree_that_a_run_is_finished(config: Config, copy: Path) -> None:
    one = start(config, copy)
    try:
        assert one.end() == 0, one.text()
        assert len(re.findall("finished already", one.text())) == 1
        assert "batch 64 on 2 x cpu" not in one.text()
    finally:
        one.close()


def test_the_folder_is_locked_while_it_draws(
    config: Config, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another start would take the incomplete picture for a leftover."""

    def second_start(*_: object, **__: object) -> None:
        with pytest.raises(RunError, match="is in use by process"):
            RunFolder(copy).acquire()
        drawn.append(1)

    drawn: list[int] = []
    (copy / "curves.png").unlink()
    monkeypatch.setattr(train_command, "draw_curves", second_start)
    assert train(config, copy) == 0
    assert drawn
    RunFolder(copy).acquire()


@pytest.mark.parametrize("name", ["matplotlib.figure", "fastmoco.moved"])
def test_only_a_missing_matplotlib_is_named_with_its_cure(
    config: Config,
    copy: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    (copy / "curves.png").unlink()
    monkeypatch.setattr(train_command, "draw_curves", fail)
    assert train(config, copy) == 0
    text = capsys.readouterr().err
    assert ("pip install" in text) == name.startswith("matplotlib")
    assert (name in text) != name.startswith("matplotlib")


def test_an_unreadable_picture_does_not_fail_a_finished_run(
    config: Config, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = copy / "curves.png"
    picture.unlink()
    picture.symlink_to(picture)
    assert train(config, copy) == 0
    assert "curves.png not drawn: " in capsys.readouterr().err


ENDING = """
import atexit, time
def wait():
    print("ending", flush=True)
    {wait}
atexit.register(wait)
"""


@pytest.mark.slow
def test_a_signal_while_a_finished_process_ends_leaves_its_exit_code(
    config: Config, copy: Path
) -> None:
    one = start(config, copy, before=ENDING.format(wait="time.sleep(3)"), ranks=0)
    try:
        one.wait_for_text("ending")
        one.process.send_signal(signal.SIGTERM)
        assert one.end(60) == 0, one.text()
    finally:
        one.close()


HANGING_CLOSE = """
import threading
from fastmoco.training import trainer
def close(self):
    print("closing", flush=True)
    threading.Event().wait()
trainer.Trainer.close = close
"""


@pytest.mark.slow
def test_a_second_signal_ends_a_finished_run_that_hangs_with_0(
    config: Config, tmp_path: Path
) -> None:
    one = start(config, tmp_path / "run", before=HANGING_CLOSE, ranks=0)
    try:
        one.wait_for_text("closing")
        one.process.send_signal(signal.SIGTERM)
        time.sleep(2.5)
        assert one.process.poll() is None
        for _ in range(40):  # one that comes too soon after the first was heard is the same request
            one.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.end(1.5)
                break
        assert one.process.poll() == 0, one.text()
        assert "a second signal: ended at once; the run is finished" in one.text()
        assert (one.out / "DONE").exists()
    finally:
        one.close()
