"""A process that ends with the process that started it.

A launcher that is killed by SIGKILL cannot end its workers. They would train on, hold the GPUs and
the lock of the run's folder. Each process therefore asks the kernel for a SIGTERM when its parent
ends, and can ask whether that has happened, for a deadline.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from pathlib import Path

PARENT = "FASTMOCO_PARENT"
"""Variable with the process that starts others. The kernel sends nothing to a process whose parent
had ended before it asked."""
ORPHAN_SECONDS = 5.0
"""Time that a process without its parent has for the end of its step. A save that has begun may
end."""
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_parent: int | None = None


def follow_parent() -> None:
    """Ask for a SIGTERM when the parent of this process ends, also if it has ended already.

    The kernel counts the thread that started this process as its parent: start processes from the
    main thread. Other systems than Linux have no such request; `is_orphan` works there too.
    """
    global _parent
    _parent = int(os.environ.get(PARENT) or os.getppid())
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if is_orphan():
        os.kill(os.getpid(), signal.SIGTERM)


def is_orphan() -> bool:
    """Whether the parent that this process follows has ended."""
    return _parent is not None and os.getppid() != _parent


def adopt_orphans(adopt: bool) -> None:
    """Become the parent of all descendants whose parents end, or stop being it."""
    _prctl(_PR_SET_CHILD_SUBREAPER, int(adopt))


def children() -> list[int]:
    """Processes whose parent is this one; none where the system has no /proc."""
    found: list[int] = []
    for task in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, task.read_text().split())
    return found


def _prctl(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
