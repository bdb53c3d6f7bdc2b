"""A signal while a run starts: one line, an exit code, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastmoco.errors import BEGUN, LAUNCHER
from fastmoco.faults.start_up import StartUp
from tests.fault_runs import environment

pytestmark = pytest.mark.faults

START = """
import ctypes, os, sys, time
from pathlib import Path
from fastmoco.faults.start_up import StartUp
out = Path(sys.argv[1])
with StartUp() as start:
    start.opens(out)
    if "locked" in sys.argv:
        out.mkdir(parents=True)
        (out / "lock").write_text(str(os.getpid()))
        (out / "starts.json").write_text("{}")
    if "events" in sys.argv:
        (out / "tensorboard").mkdir()
        (out / "tensorboard" / "events").touch()
    if "other" in sys.argv:
        (out / "precious").touch()
    if "begun" in sys.argv:
        start.end()
    print("started", flush=True)
    if "refused" in sys.argv:
        sys.exit(2)
    if "blocked" in sys.argv:  # as in a library that waits for other ranks
        mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)
    time.sleep(100)
"""


@pytest.mark.parametrize(
    ("how", "number", "code", "left"),
    [
        ([], "SIGTERM", 75, None),
        (["locked"], "SIGHUP", 75, {"lock", "starts.json", "PREEMPTED"}),
        (["locked", "blocked"], "SIGUSR1", 75, {"lock", "starts.json", "PREEMPTED"}),
        (["locked", "events"], "SIGINT", 130, None),
        (["locked", "other"], "SIGINT", 130, {"lock", "starts.json", "precious"}),
        (["locked", "refused"], "", 2, None),
        (["begun"], "SIGTERM", -15, None),
    ],
)
def test_a_start_that_ends_early(
    how: list[str], number: str, code: int, left: set[str] | None, tmp_path: Path
) -> None:
    out = tmp_path / "runs" / "new"
    process = subprocess.Popen(
        [sys.executable, "-c", START, str(out), *how],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        if number:
            process.send_signal(signal.Signals[number])
        text = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == code
    said = f"fastmoco: {number}: ended before the first step: nothing is lost\n"
    assert text == (said if code in (75, 130) else "")
    if left is None:
        assert not out.parent.exists()
    else:
        assert {path.name for path in out.iterdir()} == left


def test_under_nohup_a_closed_terminal_is_no_request(tmp_path: Path) -> None:
    from fastmoco.faults.signals import SIGNALS, to_handle

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert set(SIGNALS) - set(to_handle()) == {signal.SIGHUP}
    finally:
        signal.signal(signal.SIGHUP, before)
    assert set(to_handle()) == set(SIGNALS)


def test_a_restart_of_workers_has_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop before its first step is none of a run that lost steps."""
    monkeypatch.setenv(LAUNCHER, str(tmp_path))
    (tmp_path / BEGUN).touch()
    with StartUp() as start:
        start.end()
    assert not (tmp_path / BEGUN).exists()


def test_a_signal_in_a_destructor_prints_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lost = []
    monkeypatch.setattr(sys, "unraisablehook", lost.append)

    class Closes:
        def __init__(self, error: bool) -> None:
            self.error = error

        def __del__(self) -> None:
            if self.error:
                raise ValueError
            os.kill(os.getpid(), signal.SIGUSR2)

    with StartUp() as start:
        Closes(error=True)
        assert [type(one.exc_value) for one in lost] == [ValueError]
        Closes(error=False)
        assert start._asked is signal.SIGUSR2
        start.end()
    assert len(lost) == 1
    assert sys.unraisablehook == lost.append
    assert "Traceback" not in capfd.readouterr().err
