"""What `--gpus N` starts, and what is said of a worker that has died."""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path

import pytest

from fastmoco.cli.agent import LOG, death, describe_start
from fastmoco.cli.launch import _Group
from fastmoco.errors import LAUNCHER, RunError

pytestmark = pytest.mark.faults


@pytest.mark.parametrize(
    ("processes", "device", "gpus", "text"),
    [
        (2, "auto", 0, "--gpus 2: this machine shows no GPU; 2 processes on the CPU with gloo"),
        (1, "auto", 0, "--gpus 1: this machine shows no GPU; 1 process on the CPU with gloo"),
        (2, "cpu", 8, "--gpus 2: 2 processes on the CPU with gloo (--device cpu)"),
        (8, "auto", 8, ""),
        (2, "gpu", 8, ""),
    ],
)
def test_what_is_started(
    processes: int, device: str, gpus: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert describe_start(processes, device, gpus) == text


def test_more_processes_than_gpus_are_refused_and_hidden_gpus_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(RunError, match=r"shows 1 GPU .CUDA_VISIBLE_DEVICES='0'.; use --gpus 1"):
        describe_start(2, "auto", 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "no GPU (CUDA_VISIBLE_DEVICES='')" in describe_start(2, "auto", 0)
    with pytest.raises(RunError, match="shows no GPU"):
        describe_start(2, "gpu", 0)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (-9, "was ended by SIGKILL, .*memory ran out"),
        (-7, "was ended by SIGBUS, .*/dev/shm"),
        (-62, "was ended by signal 62"),
        (3, "ended with exit code 3"),
    ],
)
def test_how_a_worker_died(code: int, text: str) -> None:
    assert re.fullmatch(f"{text}.*", death(code))


@pytest.mark.parametrize(("begun", "sent"), [(False, signal.SIGTERM), (True, signal.SIGINT)])
def test_an_agent_that_has_not_begun_gets_no_ctrl_c(begun: bool, sent: int, tmp_path: Path) -> None:
    """Its interpreter would print a traceback."""
    group = _Group([], {LAUNCHER: str(tmp_path)})
    group._agent = subprocess.Popen(["sleep", "99"])
    if begun:
        (tmp_path / LOG).touch()
    group._pass_on(signal.SIGINT)
    assert group._agent.wait(30) == -sent
