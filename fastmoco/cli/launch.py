"""`fastmoco train --gpus N`: torchrun's agent with N copies of the same command, its answer taken from what the run left.

The agent hides its workers' exit codes: a run that saved its state and left with 75 makes it return 1, as a crash does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from fastmoco.errors import ASKED_TO_END, EXIT_FAILED, EXIT_FINISHED, EXIT_REFUSED, EXIT_STOPPED, RunError, say

MAX_RESTARTS = 3
SAVE_SECONDS = 600
"""What workers get between a signal and SIGKILL; torchrun's own 30 s are less than a large checkpoint needs, and all there
is in torch 2.11, whose agent has no such setting."""


def launch_command(processes: int, args: Sequence[str], logs: str) -> list[str]:
    """The argument list that starts `fastmoco` with `args` in several processes of this machine.

    The store and all connections stay on the loopback interface. What workers print is not redirected to `logs`; the files in
    which they report errors lie there.
    """
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    counts = ["--nproc-per-node", str(processes), "--max-restarts", str(MAX_RESTARTS), "--log-dir", logs]
    return [*agent, *counts, "-m", "fastmoco", *args]


def launch(processes: int, args: Sequence[str], out: Path) -> int:
    """Run `fastmoco` with `args` in several processes, pass signals on, and wait for their end.

    Args:
        processes: one a GPU; on a machine without, that many share its cores.
        args: of the command, its verb first.
        out: folder of the run.

    Returns:
        0 finished, 75 stopped by a signal with its state saved, 2 refused before its first step, 1 anything else.

    Raises:
        RunError: inside a process that a launcher has started already.
    """
    if "RANK" in os.environ:
        raise RunError("--gpus starts the processes itself: leave it out under torchrun or srun")
    _forget(out)
    # torchrun would take one thread too, and say so in a banner; a worker shares the cores by `--threads`, whatever stands here.
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SAVE_SECONDS)}
    with tempfile.TemporaryDirectory(prefix="fastmoco_") as logs:
        # A session of its own, so that Ctrl-C reaches it once and through this process.
        agent = subprocess.Popen(launch_command(processes, args, logs), env=environment, start_new_session=True)
        _wait(agent)
        refused = any(Path(logs).glob(f"*/attempt_0/{ASKED_TO_END}"))  # a later start's is a storm of restarts
    if (out / "DONE").exists():
        return EXIT_FINISHED
    # torchrun ends in a traceback of its own, whatever the reason: the last line should say what it comes to.
    if (out / "PREEMPTED").exists():
        say("stopped by a signal; the same command continues")
        return EXIT_STOPPED
    say(f"{'refused' if refused else 'failed'}: the first line above that begins with 'fastmoco:' says why")
    return EXIT_REFUSED if refused else EXIT_FAILED


def _wait(agent: subprocess.Popen[bytes]) -> None:
    """Until the agent ends; signals are passed on to it."""

    def pass_on(number: int, _frame: FrameType | None) -> None:
        agent.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup, where the run outlives its terminal
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        agent.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _forget(out: Path) -> None:
    """Take away the marks of an earlier start: this one's workers may end before they come to it."""
    for name in ("DONE", "PREEMPTED"):
        (out / name).unlink(missing_ok=True)
