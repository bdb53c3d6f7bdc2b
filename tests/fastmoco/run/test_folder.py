"""One run, one folder; metrics that belong to steps about to be taken again are dropped."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastmoco.errors import RunError
from fastmoco.run.folder import RunFolder

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("name", ["s3://bucket/run", "file:///tmp/run"])
def test_a_url_is_no_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="is a URL: a run needs a folder of this machine"):
        RunFolder(Path(name)).acquire()
    assert os.listdir() == []


def test_a_second_run_is_refused_and_named(tmp_path):
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    first.acquire()
    with pytest.raises(RunError, match=f"in use by process {os.getpid()}"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()


def test_a_run_that_ended_as_it_was_asked_has_no_start_that_came_to_nothing(tmp_path):
    folder = RunFolder(tmp_path)
    folder.acquire()
    folder.write_starts({"starts": 3})
    folder.mark(None)
    assert folder.starts.exists()
    folder.mark("PREEMPTED")
    assert not folder.starts.exists()
    folder.release()


def test_a_killed_owner_frees_the_folder(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from fastmoco.run.folder import RunFolder;"
        "folder = RunFolder(Path(sys.argv[1])); folder.acquire(); print('held', flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == "held\n"
    with pytest.raises(RunError, match=f"process {owner.pid}"):
        RunFolder(tmp_path).acquire()
    owner.send_signal(signal.SIGKILL)
    owner.wait(timeout=120)
    owner.stdout.close()
    time.sleep(0.05)
    folder = RunFolder(tmp_path)
    folder.acquire()
    folder.release()


def test_the_folder_is_private(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.acquire()
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
    folder.release()


def test_a_path_that_is_a_file_is_refused_with_the_cure(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="choose another --out"):
        RunFolder(tmp_path / "file").acquire()


def test_metrics_after_the_step_and_torn_lines_are_dropped(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.trim_metrics(3) == 0
    lines = [
        '{"step": 0, "knn": 0.5}',
        '{"step": 3, "loss": 1.5}',
        '{"step": 4, "loss": 2.5}',
        '{"step": 5, "lo',
    ]
    folder.metrics.write_text("\n".join(lines))
    assert folder.read_metric("loss") == [(3, 1.5), (4, 2.5)]
    assert folder.trim_metrics(3) == 2
    assert folder.metrics.read_text() == "\n".join(lines[:2]) + "\n"
    assert folder.read_metric("knn") == [(0, 0.5)]
    assert folder.read_metric("loss") == [(3, 1.5)]


def test_half_written_files_of_a_killed_run_are_removed_and_named(tmp_path):
    """T36; by the process that holds the folder alone."""
    (tmp_path / "config.json.tmp").write_text("{")
    folder = RunFolder(tmp_path)
    assert folder.take_leftovers() == []
    folder.acquire()
    assert folder.take_leftovers() == ["config.json.tmp"]
    assert not list(tmp_path.glob("*.tmp"))
    folder.release()


def test_one_mark_replaces_the_other(tmp_path):
    folder, other = RunFolder(tmp_path), RunFolder(tmp_path)
    folder.acquire()
    for name, there in (("PREEMPTED", {"PREEMPTED"}), ("DONE", {"DONE"}), (None, set())):
        folder.mark(name)
        other.mark(None)  # it does not hold the folder
        assert {path.name for path in tmp_path.iterdir()} & {"DONE", "PREEMPTED"} == there
    folder.release()


def test_a_lock_that_was_removed_gives_the_marks_to_the_process_that_has_it_now(tmp_path, capsys):
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    first.acquire()
    (tmp_path / "lock").unlink()
    second.acquire()
    second.mark("DONE", "second")
    first.mark("PREEMPTED", "first")
    assert "lock was removed during this run, which leaves no mark" in capsys.readouterr().err
    assert (tmp_path / "DONE").read_text() == "second\n"
    assert not (tmp_path / "PREEMPTED").exists()
    second.release()

    # Nobody has it: it is taken again.
    (tmp_path / "lock").unlink()
    first.mark("PREEMPTED", "first")
    assert (tmp_path / "PREEMPTED").read_text() == "first\n"
    assert (tmp_path / "lock").read_text() == str(os.getpid())
    with pytest.raises(RunError, match="is in use"):
        second.acquire()
    first.release()


def test_a_file_that_cannot_be_written_is_found_before_the_first_step(tmp_path):
    """T37; a folder in its place, because the tests may run as a user whom no mode keeps out."""
    (tmp_path / "metrics.jsonl").mkdir()
    folder = RunFolder(tmp_path)
    with pytest.raises(
        RunError, match=r"cannot write to .*metrics.jsonl: Is a directory; fix it or choose another"
    ):
        folder.acquire()
    (tmp_path / "metrics.jsonl").rmdir()
    folder.acquire()  # the lock was given back
    folder.release()


@pytest.mark.parametrize("first", ["lock", "starts"])
def test_a_disk_without_space_is_one_line(tmp_path, first):
    """A limit on the size of files stands for it: nothing can be written, and closing fails too."""
    folder = RunFolder(tmp_path / "run")
    if first == "starts":
        folder.acquire()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(RunError, match=r"cannot write to .*run.*too large; fix it or choose"):
            folder.acquire() if first == "lock" else folder.write_starts({})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    folder.release()
