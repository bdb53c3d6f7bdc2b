"""`fastmoco train --gpus N`: start torchrun with N copies of the same command.

torchrun hides the exit codes of its workers: it returns 1 both after a crash and after a run that
saved its state and exited with 75. The exit code of this command is therefore derived from the
files that the run has written.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from fastmoco.errors import (
    ASKED_TO_END,
    EXIT_FAILED,
    EXIT_FINISHED,
    EXIT_REFUSED,
    EXIT_STOPPED,
    RunError,
    say,
)
from fastmoco.run.folder import RunFolder

MAX_RESTARTS = 3
SAVE_SECONDS = 600
"""Time of workers between a signal and SIGKILL. torchrun's default of 30 s is too short for a large
checkpoint; torch 2.11 has no setting for it."""


MARKS = ("DONE", "PREEMPTED")
"""Files in the folder of a run that record how it ended."""


def launch_command(processes: int, args: Sequence[str], logs: str) -> list[str]:
    """The argument list that starts `fastmoco` with `args` in several processes of this machine.

    The store and all connections use the loopback interface. Output of workers is not redirected to
    `logs`, which only contains the files in which they report errors.
    """
    agent = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr",
        "127.0.0.1",
    ]
    counts = [
        "--nproc-per-node",
        str(processes),
        "--max-restarts",
        str(MAX_RESTARTS),
        "--log-dir",
        logs,
    ]
    return [*agent, *counts, "-m", "fastmoco", *args]


def launch(processes: int, args: Sequence[str], out: Path) -> int:
    """Run `fastmoco` with `args` in several processes, pass signals on, and wait for their end.

    Args:
        processes: one per GPU; on a machine without GPUs they share its cores.
        args: of the command, starting with its name.
        out: folder of the run.

    Returns:
        0 finished, 75 stopped by a signal after saving its state, 2 refused
        before its first step, 1 otherwise.

    Raises:
        RunError: in a process that a launcher has started.
    """
    if "RANK" in os.environ:
        raise RunError("--gpus starts the processes itself; omit it under torchrun or srun")
    before = {name: _state(out / name) for name in MARKS}
    folder = RunFolder(out)
    folder.remember()
    # torchrun would set one thread too, but with a warning. Workers divide the
    # cores by `--threads` in any case.
    environment = (
        {"OMP_NUM_THREADS": "1"}
        | os.environ
        | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SAVE_SECONDS)}
    )
    with tempfile.TemporaryDirectory(prefix="fastmoco_") as logs:
        # In its own session, so that Ctrl-C reaches it once, through this process.
        agent = subprocess.Popen(
            launch_command(processes, args, logs), env=environment, start_new_session=True
        )
        _wait(agent)
        refused = any(
            Path(logs).glob(f"*/attempt_0/{ASKED_TO_END}")
        )  # a refusal of a later start means too many restarts

    # Only marks of this start count: a refused one leaves those of an earlier start alone.
    made = [name for name in MARKS if _state(out / name) not in (None, before[name])]
    if "DONE" in made:
        return EXIT_FINISHED
    # torchrun always prints a traceback, so the last line summarizes the result.
    if "PREEMPTED" in made:
        say("stopped by a signal; the same command continues")
        return EXIT_STOPPED
    outcome = "refused" if refused else "failed"
    if refused:
        # A rank that torchrun has ended meanwhile cannot put the folder back.
        with contextlib.suppress(RunError):
            folder.acquire()
            folder.withdraw()
    say(f"{outcome}: see the first line above that begins with 'fastmoco:'")
    return EXIT_REFUSED if refused else EXIT_FAILED


def _wait(agent: subprocess.Popen[bytes]) -> None:
    """Wait for the end of the agent and forward signals to it."""

    def pass_on(number: int, _frame: FrameType | None) -> None:
        agent.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    if (
        signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    ):  # ignored under nohup, where the run outlives its terminal
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        agent.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _state(path: Path) -> tuple[int, int] | None:
    """A file as it is now, to see whether it is written again; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
