"""`--gpus N` by stand-ins for torchrun's agent: what it starts, whose marks count, and that it
answers after the last worker only."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastmoco.cli import launch as launching
from fastmoco.cli.agent import LOG
from fastmoco.cli.launch import launch, launch_command
from fastmoco.errors import LAUNCHER
from fastmoco.planning.tuning.measure import environment
from fastmoco.planning.tuning.settings import Settings
from fastmoco.run import drawing
from fastmoco.run.folder import RunFolder
from fastmoco_pipelines.processes import PARENT
from tests.fault_runs import environment as user_environment

pytestmark = pytest.mark.faults
FINISHED = {"DONE": "by another\n", "torchrun.log": "of another\n", "starts.json": "{}\n"}
"""Files of a run that another command has finished, or trains."""


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a run; no launcher has started this process."""
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def answer(script: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of `--gpus 2` if a shell script is the agent; $1 is the folder, $2 this
    process."""
    agent = ["sh", "-c", script, "sh", str(out), str(os.getpid())]
    monkeypatch.setattr(launching, "launch_command", lambda *_: agent)
    return launch(2, ["train"], out)


def content(out: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in out.iterdir() if path.name != "lock"}


@pytest.mark.parametrize("mark", ["DONE", "PREEMPTED"])
def test_a_refused_command_leaves_the_marks_of_the_run_that_has_the_folder(
    mark: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends while the second command is refused: the answer is about the second."""
    owner = RunFolder(out)
    owner.acquire()
    (out / LOG).write_text("of another\n")
    end = f'echo "by another" > "$1/{mark}"; exit 2'
    assert answer(end, out, monkeypatch) == 2
    assert content(out) == {mark: "by another\n", LOG: "of another\n"}
    assert (out / "lock").read_text() == str(os.getpid())
    owner.release()


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("exit 2", 2),
        ("exit 1", 1),
        ('kill -9 "$$"', 1),
        ('kill -TERM "$2"; sleep 0.3; exit 1', 75),
        ('kill -INT "$2"; sleep 0.3; exit 1', 130),
    ],
)
def test_a_command_that_never_had_the_folder_changes_nothing_in_it(
    end: str, code: int, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in FINISHED.items():
        (out / name).write_text(text)
    assert answer(end, out, monkeypatch) == code
    assert content(out) == FINISHED


def test_a_stop_before_the_first_step_is_no_mark_in_a_folder_in_use(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = RunFolder(out)
    owner.acquire()
    stop = 'kill -TERM "$2"; sleep 0.3; exit 1'
    assert answer(stop, out, monkeypatch) == 75
    assert content(out) == {}
    owner.release()
    assert answer(stop, out, monkeypatch) == 75
    assert content(out) == {"PREEMPTED": "\n"}


def test_the_owner_tells_its_launcher_how_the_run_ended(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own process group reports, whatever other marks are there."""
    report = f'touch "${LAUNCHER}/owned"; touch "${LAUNCHER}/'
    assert answer(report + 'PREEMPTED"; exit 1', out, monkeypatch) == 75
    assert answer(report + 'DONE"; exit 1', out, monkeypatch) == 0

    logs = out.parent / "logs"
    logs.mkdir()
    monkeypatch.setenv(LAUNCHER, str(logs))
    folder, other = RunFolder(out), RunFolder(out)
    other.mark("DONE")  # it does not hold the folder
    assert not list(logs.iterdir())
    folder.acquire()
    for name, there in (("PREEMPTED", {"PREEMPTED"}), ("DONE", {"DONE"}), (None, set[str]())):
        folder.mark(name)  # type: ignore[arg-type]
        assert {path.name for path in logs.iterdir()} == {"owned"} | there
    folder.release()


WORKER = """
import os, signal, sys, time
from pathlib import Path
from fastmoco_pipelines.processes import follow_parent
follow_parent()
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), Path(sys.argv[1], "SAVED").touch(), sys.exit(75)))
Path(sys.argv[1], "here").touch()
if sys.argv[2] == "stopped":
    os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(100)
"""


@pytest.mark.parametrize("state", ["running", "stopped"])
def test_the_answer_comes_after_the_last_worker_of_a_killed_agent(
    state: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it says that a run has failed which goes on and has the folder."""
    script = '"$3" -P -c "$4" "$1" "$5" & while [ ! -e "$1/here" ]; do sleep 0.05; done; kill -9 $$'
    agent = ["sh", "-c", script, "sh", str(out), "", sys.executable, WORKER, state]
    monkeypatch.setattr(launching, "launch_command", lambda *_: agent)
    assert launch(2, ["train"], out) == 1
    assert (out / "SAVED").exists()


def test_every_child_of_a_command_is_started_without_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("PATH", "PYTHONPATH"):
        monkeypatch.setenv(name, f":{os.environ.get(name, '')}:.")
    begun: list[tuple[list[str], dict[str, str]]] = []

    def popen(command: list[str], **options: dict[str, str]) -> None:
        begun.append((command, options["env"]))
        raise OSError

    monkeypatch.setattr(drawing.subprocess, "Popen", popen)
    drawing.CurveDrawer(RunFolder(tmp_path), active=True).start()
    begun.append((launch_command(2, ["train"], "logs"), launching._environment("logs")))
    begun.append(([sys.executable, "-P", "-m"], environment(Settings())))
    for command, variables in begun:
        assert command[:3] == [sys.executable, "-P", "-m"]
        assert variables["PYTHONSAFEPATH"] == "1"
        assert variables[PARENT] == str(os.getpid())
        for name in ("PATH", "PYTHONPATH"):
            assert all(map(os.path.isabs, variables.get(name, "/").split(":")))
    assert len(begun) == 3


AGENT = """
import sys
from pathlib import Path
from fastmoco.cli.launch import launch
sys.exit(launch(2, ["train"], Path(sys.argv[1]), device="gpu"))
"""


@pytest.mark.parametrize("start", ["by hand", "agent", "page"])
def test_nothing_of_the_current_folder_runs(start: str, tmp_path: Path) -> None:
    """An agent is started up to its question for GPUs, of which there are none."""
    for name in ("random", "typing", "tempfile", "shlex", "tyro", "numpy", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text("open('EXECUTED', 'a').write(__name__)")
    words = {
        "by hand": ["-m", "fastmoco", "--version"],
        "page": ["-m", "fastmoco", "train", "quickstart_digits", "--help"],
        "agent": ["-c", AGENT, str(tmp_path / "run")],
    }[start]
    command = [sys.executable, *(["-P"] if start == "agent" else []), *words]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=user_environment(CUDA_VISIBLE_DEVICES=""),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (2 if start == "agent" else 0), done.stderr
    assert not (tmp_path / "EXECUTED").exists()
