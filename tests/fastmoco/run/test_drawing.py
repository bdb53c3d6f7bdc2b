"""The picture of a run that is not finished: drawn by a process of its own, and by hand."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fastmoco.config import Config
from fastmoco.distributed.mesh import World
from fastmoco.run import drawing
from fastmoco.run.drawing import CurveDrawer
from fastmoco.run.folder import RunFolder
from fastmoco.training.trainer import Trainer
from tests.command_line import main

pytest.importorskip("matplotlib")
PNG = b"\x89PNG"


def test_a_run_draws_while_it_trains_and_after_an_interruption(
    small_run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "FIRST_S", 0.0)
    monkeypatch.setattr(drawing, "INTERVAL_S", 0.0)
    picture = tmp_path / "curves.png"
    trainer = Trainer.build(replace(small_run, epochs=1), tmp_path, World())
    try:
        trainer._one_step()
        assert trainer.drawer._child is not None
        assert trainer.drawer._child.wait(60) == 0
        first = picture.read_bytes()
        assert first.startswith(PNG)
        trainer._one_step()
        monkeypatch.setattr("fastmoco.faults.stop_signal.StopSignal.agreed", lambda *_: True)
        assert trainer.run() == 75
    finally:
        trainer.close(picture_s=60)
    assert (tmp_path / "PREEMPTED").exists()
    assert picture.read_bytes() != first

    # By hand, from the folder of the interrupted run, and also while a process holds its lock.
    picture.unlink()
    folder = RunFolder(tmp_path)
    folder.acquire()
    assert main(["curves", str(tmp_path)]) == 0
    assert main(["curves", str(tmp_path), "--out", str(tmp_path / "new" / "c.png")]) == 0
    folder.release()
    assert picture.read_bytes() == (tmp_path / "new" / "c.png").read_bytes()


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command of every picture, in place of which the one named first is run."""
    begun: list[list[str]] = []
    run = drawing.subprocess.Popen

    def start(command: list[str], **more: object) -> subprocess.Popen[bytes]:
        begun.append(command)
        return run(begun[0], **more)  # type: ignore[call-overload]

    monkeypatch.setattr(drawing.subprocess, "Popen", start)
    return begun


def test_pictures_take_at_most_one_percent_of_the_time(
    tmp_path: Path, children: list[list[str]]
) -> None:
    """With a look at the clock every 10 s, a picture has taken 10 s."""
    now, begun = [0.0], []
    children.append(["true"])
    drawer = CurveDrawer(RunFolder(tmp_path), active=True, clock=lambda: now[0])
    while now[0] < 3000:
        count = len(children)
        drawer.poll()
        if len(children) > count:
            begun.append(now[0])
            assert drawer._child is not None
            drawer._child.wait(60)
        now[0] += 10.0
    drawer.close()
    assert begun == [60, 1060, 2060]
    silent = CurveDrawer(RunFolder(tmp_path), active=False, clock=lambda: 1e6)
    silent.poll()
    assert silent._child is None


def test_a_picture_that_hangs_does_not_hold_the_run(
    tmp_path: Path, children: list[list[str]]
) -> None:
    children.append(["sleep", "99"])
    drawer = CurveDrawer(RunFolder(tmp_path), active=True)
    drawer.start()
    child = drawer._child
    assert child is not None
    drawer.close(0.1)
    assert child.poll() == -signal.SIGTERM


def test_a_picture_whose_run_has_ended_is_not_drawn(tmp_path: Path) -> None:
    """The parent of the process is another one than the run that started it."""
    command = [sys.executable, "-m", "fastmoco.run.drawing", str(tmp_path)]
    assert subprocess.run([*command, "1"], check=False, stderr=subprocess.DEVNULL).returncode == 0
    own = str(os.getpid())
    assert subprocess.run([*command, own], check=False, stderr=subprocess.DEVNULL).returncode == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with names")
def test_no_settings_of_the_current_folder_are_read(tmp_path: Path) -> None:
    """The first import of matplotlib asks for them, and so does an empty variable; nobody writes to
    this pipe."""
    run, here = tmp_path / "run", tmp_path / "here"
    run.mkdir()
    here.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    os.mkfifo(here / "matplotlibrc")
    command = [sys.executable, "-P", "-m", "fastmoco.run.drawing", str(run), str(os.getpid())]
    subprocess.run(
        command, cwd=here, env=os.environ | {"MATPLOTLIBRC": ""}, timeout=100, check=True
    )
    assert (run / "curves.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(("content", "words"), [(None, "contains no metrics"), ("", "logged a st")])
def test_a_folder_without_curves_is_refused_with_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, words: str
) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert main(["curves", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert str(tmp_path) in error


def test_an_odd_config_leaves_the_curves(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "knn": null}\n')
    for odd in ("[", "{}", json.dumps({"curves": 3, "resolved": [], "config": "x"})):
        (tmp_path / "config.json").write_text(odd)
        assert main(["curves", str(tmp_path)]) == 0
