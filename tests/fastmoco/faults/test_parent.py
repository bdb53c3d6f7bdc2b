"""A process ends with the one that started it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch  # noqa: F401 (as an agent has)

from fastmoco.errors import RunError
from fastmoco.faults import parent
from tests.fault_runs import environment

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux sends the signal"),
]
CHILD = """
import sys, time
from fastmoco.faults.parent import follow_parent
follow_parent()
print("here", flush=True)
time.sleep(100)
"""
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(child.pid, flush=True)
time.sleep(100)
"""


def test_a_killed_parent_takes_its_child_along() -> None:
    killed = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True, env=environment()
    )
    assert killed.stdout is not None
    child = 0
    try:
        lines = {killed.stdout.readline().strip() for _ in range(2)}
        child = int((lines - {"here"}).pop())
        killed.kill()
        assert killed.stdout.read() == ""  # until the child, too, has closed it
    finally:
        killed.kill()
        if child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


def test_a_parent_that_has_ended_before_is_noticed() -> None:
    more = {"FASTMOCO_PARENT": str(os.getpid() + 1)}
    done = subprocess.run(
        [sys.executable, "-c", CHILD], env=environment(**more), timeout=60, check=False
    )
    assert done.returncode == -signal.SIGTERM


@pytest.fixture
def followed(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """What a process of a launcher follows; it has no variable of `--gpus`."""
    found: list[int | None] = []
    monkeypatch.setattr(
        parent, "follow_parent", lambda process=None, at_end=None: found.append(process)
    )
    monkeypatch.delenv(parent.PARENT, raising=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    return found


def test_a_worker_of_torchrun_follows_the_agent_also_above_a_shell(
    followed: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent has loaded torch, as this process has; a shell has not."""
    with subprocess.Popen(["sleep", "60"]) as shell:
        monkeypatch.setattr(parent, "ancestors", lambda: [shell.pid, os.getpid(), 1])
        parent.follow_launcher()
        assert followed == [os.getpid()]
        shell.kill()


def test_an_agent_that_ended_before_its_worker_could_ask_is_noticed(
    followed: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker belongs to the first process of the machine by then, which is no agent. Nor has it
    one if the variable is a stray one."""
    with subprocess.Popen(["sleep", "60"]) as first:
        monkeypatch.setattr(parent, "ancestors", lambda: [first.pid])
        with pytest.raises(RunError, match="TORCHELASTIC_RUN_ID=x is set, but no torchrun"):
            parent.follow_launcher()
        first.kill()
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    parent.follow_launcher()  # a process on its own follows nothing
    assert followed == []


def test_a_process_that_does_not_end_is_ended_unless_it_saves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Ended(BaseException):
        pass

    class Saving:
        looks = 4

        @property
        def saves(self) -> bool:
            self.looks -= 1
            return self.looks > 0

    done: list[object] = []
    monkeypatch.setattr(parent, "end_by_signal", lambda: done.append("signal"))
    # Of this module alone: other threads of the tests sleep too.
    monkeypatch.setattr(parent, "time", SimpleNamespace(sleep=done.append))

    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(parent, "os", SimpleNamespace(_exit=end))
    with pytest.raises(Ended, match="1"):
        parent._end()
    assert done == ["signal", parent.END_SECONDS]
    done.clear()
    parent.leave_stopping_to(Saving())
    try:
        with pytest.raises(Ended, match="1"):
            parent._end()
    finally:
        parent.leave_stopping_to(None)
    # It stops by itself: no second signal.
    between = [parent.POLL_SECONDS, parent.POLL_SECONDS]
    assert done == [parent.END_SECONDS, *between, parent.CLOSE_SECONDS]
