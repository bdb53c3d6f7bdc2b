"""A process ends with the one that started it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import pytest

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
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True, env=environment()
    )
    assert parent.stdout is not None
    child = 0
    try:
        lines = {parent.stdout.readline().strip() for _ in range(2)}
        child = int((lines - {"here"}).pop())
        parent.kill()
        assert parent.stdout.read() == ""  # until the child, too, has closed it
    finally:
        parent.kill()
        if child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


def test_a_parent_that_has_ended_before_is_noticed() -> None:
    more = {"FASTMOCO_PARENT": str(os.getpid() + 1)}
    done = subprocess.run(
        [sys.executable, "-c", CHILD], env=environment(**more), timeout=60, check=False
    )
    assert done.returncode == -signal.SIGTERM
