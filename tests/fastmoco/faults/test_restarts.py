"""Starts without progress are counted for launchers, not for people."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastmoco.errors import RunError
from fastmoco.faults import restarts
from fastmoco.faults.restarts import require_progress
from fastmoco.run.folder import RunFolder

pytestmark = pytest.mark.faults


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("TORCHELASTIC_", "SLURM_"))]:
        monkeypatch.delenv(name)


def test_a_launcher_gets_three_starts_from_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    folder = RunFolder(tmp_path)
    for _ in range(3):
        require_progress(folder, 0)
    with pytest.raises(RunError, match="3 starts from step 0 reached no new checkpoint"):
        require_progress(folder, 0)
    require_progress(folder, 6)  # a checkpoint begins the count anew
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "b")
    for _ in range(3):
        require_progress(folder, 6)  # and so does another launch


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_restart_is_known_by_its_count_where_the_launch_has_no_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    require_progress(folder, 3)
    for count in (1, 2):
        monkeypatch.setenv(name, str(count))
        require_progress(folder, 3)
    monkeypatch.setenv(name, "3")
    with pytest.raises(RunError, match="by hand to try again"):
        require_progress(folder, 3)


def test_a_start_by_hand_is_always_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # as in an interactive allocation
    folder = RunFolder(tmp_path)
    for _ in range(6):
        require_progress(folder, 0)


def test_a_count_cut_off_by_a_kill_counts_as_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    folder = RunFolder(tmp_path)
    folder.starts.write_text('{"launch": "SLURM')
    require_progress(folder, 0)
    assert restarts.read_object(folder.starts)["starts"] == 1
