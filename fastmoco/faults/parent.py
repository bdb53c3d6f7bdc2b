"""A rank ends with the launcher that started it.

A launcher that is killed by SIGKILL cannot end its workers. They would train on, hold the GPUs and
the lock of the run's folder. Each process therefore follows its launcher (`processes.py` of the
pipelines): it is asked to stop then, saves if it trains, and is ended if it does not end.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Protocol

from fastmoco.errors import EXIT_FAILED, RunError
from fastmoco_pipelines.processes import (
    PARENT,
    POLL_SECONDS,
    ancestors,
    end_by_signal,
    follow_parent,
    prctl,
)

ORPHAN_SECONDS = 5.0
"""Time that a process without its launcher has for the end of its step. A save that has begun may
end."""
END_SECONDS = 7.0
"""Time without its launcher after which a process is ended that still runs, unless it saves."""
CLOSE_SECONDS = 2.0
"""Time that it has after its last save to mark the run and to close its files."""
_PR_SET_CHILD_SUBREAPER = 36


class Stopping(Protocol):
    """Stops a run whose launcher has ended by itself (`StopSignal`)."""

    @property
    def saves(self) -> bool:
        """Whether a save is being written, which may end."""


_stopping: Stopping | None = None


def follow_launcher() -> None:
    """End with the launcher of this process, if it has one: `--gpus N` or torchrun's agent.

    It is asked to stop as by SIGTERM. A task of srun is ended by SLURM.

    Raises:
        RunError: if torchrun's variable is set and no torchrun is above this process.
    """
    if PARENT in os.environ:
        follow_parent(at_end=_end)
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        agent = _agent()
        if not agent:
            raise RunError(
                f"TORCHELASTIC_RUN_ID={os.environ['TORCHELASTIC_RUN_ID']} is set, but no torchrun "
                "runs above this process: it has ended, or an earlier job has left the variable; "
                "to start this command by hand, unset TORCHELASTIC_RUN_ID"
            )
        follow_parent(agent, at_end=_end)


def leave_stopping_to(stopping: Stopping | None) -> None:
    """From now on a run stops by itself when its launcher has ended; None: by a SIGTERM again."""
    global _stopping
    _stopping = stopping


def _end() -> None:
    if _stopping is None:
        end_by_signal()
    time.sleep(END_SECONDS)
    if _stopping is not None and _stopping.saves:
        while _stopping is not None and _stopping.saves:
            time.sleep(POLL_SECONDS)
        time.sleep(CLOSE_SECONDS)
    os._exit(EXIT_FAILED)


def _agent() -> int:
    """torchrun's agent: the next process above this one that has loaded torch, which the shell of a
    script between them has not; 0 if it has ended.

    The process that inherits the workers of an agent that has ended is no agent.
    """
    if not Path("/proc/self/maps").exists():
        return os.getppid()
    return next(filter(_runs_torch, ancestors()), 0)


def _runs_torch(process: int) -> bool:
    """Whether a process has loaded torch; for one of another user whether it may have."""
    about = Path(f"/proc/{process}")
    try:
        return b"libtorch" in (about / "maps").read_bytes()
    except OSError:
        try:
            return b"python" in (about / "cmdline").read_bytes()
        except OSError:
            return False


def adopt_orphans(adopt: bool) -> None:
    """Become the parent of all descendants whose parents end, or stop being it."""
    prctl(_PR_SET_CHILD_SUBREAPER, int(adopt))
