"""`fastmoco train --gpus N`: start torchrun's agent with N copies of the same command.

torchrun hides the exit codes of its workers: it returns 1 both after a crash and after a run that
saved its state and exited with 75. The exit code of this command is therefore derived from the
files that the run has written.

Nothing that it starts outlives this process, however it ends: agent and workers follow their
parents (`faults/parent.py`), and workers whose agent was killed become children of this process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from fastmoco.cli.agent import LOG, death
from fastmoco.config.launched import describe_launcher
from fastmoco.errors import (
    ASKED_TO_END,
    BEGUN,
    ECHOES,
    EXIT_FAILED,
    EXIT_FINISHED,
    EXIT_INTERRUPTED,
    EXIT_REFUSED,
    EXIT_STOPPED,
    LAUNCHER,
    OWNED,
    RunError,
    say,
)
from fastmoco.faults.parent import adopt_orphans
from fastmoco.faults.signals import INTERRUPT_PATIENCE_SECONDS, PATIENCE_SECONDS, to_handle
from fastmoco.faults.start_up import ended_early
from fastmoco.run.folder import MARKS, RunFolder
from fastmoco_pipelines.files.whole import write_file
from fastmoco_pipelines.processes import child_environment, children, python_command

MAX_RESTARTS = 3
SAVE_SECONDS = 600
"""Time of workers between a signal and SIGKILL. torchrun's default of 30 s is too short for a large
checkpoint; torch 2.11 has no setting for it."""
_POLL_SECONDS = 0.1


def launch_command(
    processes: int, args: Sequence[str], logs: str, device: str = "auto"
) -> list[str]:
    """The argument list that starts `fastmoco` with `args` in several processes of this machine.

    The store and all connections use the loopback interface. Output of workers is not redirected to
    `logs`, which only contains the log of torchrun and the files in which workers report errors.
    """
    agent = python_command("fastmoco.cli.agent", logs, str(processes), device)
    counts = [
        "--standalone",
        "--local-addr",
        "127.0.0.1",
        "--nproc-per-node",
        str(processes),
        "--max-restarts",
        str(MAX_RESTARTS),
        "--log-dir",
        logs,
    ]
    # Without the dashes torchrun takes a word such as --log for one of its own options.
    return [*agent, *counts, "-m", "--", "fastmoco", *args]


def launch(processes: int, args: Sequence[str], out: Path, *, device: str = "auto") -> int:
    """Run `fastmoco` with `args` in several processes, pass signals on, and wait for their end.

    Args:
        processes: one per GPU; on a machine without GPUs they share its cores.
        args: of the command, starting with its name.
        out: folder of the run.
        device: of the config.

    Returns:
        0 finished, 75 stopped by a signal after saving its state or before its first step, 2
        refused before its first step, 130 after a second Ctrl-C or one before the first step, 1
        otherwise.

    Raises:
        RunError: in one of several processes that a launcher has started, or for a negative number.
    """
    if processes < 0:
        raise RunError(f"--gpus {processes}: is a number of processes, from 1 on")
    if launcher := describe_launcher(os.environ):
        raise RunError(
            f"--gpus starts the processes itself, but {launcher}; omit it under torchrun or srun, "
            "or unset the variables if a platform has left them"
        )
    if (_nodes := os.environ.get("SLURM_JOB_NUM_NODES", "1")) not in ("1", ""):
        say(f"--gpus uses this machine only; the job has {_nodes} nodes (see launch/slurm.sh)")
    folder = RunFolder(out)
    folder.remember()
    with tempfile.TemporaryDirectory(prefix="fastmoco_") as logs:
        group = _Group(launch_command(processes, args, logs, device), _environment(logs))
        group.wait()
        # Only marks of this start count, and only the owner of the folder changes it: another one
        # may train into it, or have finished it.
        made = [name for name in MARKS if Path(logs, name).exists()]
        owned = Path(logs, OWNED).exists()
        if made:
            with contextlib.suppress(OSError):
                (out / LOG).unlink()  # of an earlier start that failed
        code = _outcome(group, Path(logs), out, made)
    if code == EXIT_REFUSED and owned:
        # A rank that torchrun has ended meanwhile cannot put the folder back.
        with contextlib.suppress(RunError):
            folder.acquire()
            folder.withdraw()
    return code


def _environment(logs: str) -> dict[str, str]:
    """The variables of the agent, without those that an outer launcher has left."""
    left = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept: Mapping[str, str] = {
        name: value
        for name, value in os.environ.items()
        if name not in left and not name.startswith("PET_")  # defaults of torchrun's options
    }
    own = {
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SAVE_SECONDS),
        LAUNCHER: logs,
    }
    # torchrun would set one thread too, but with a warning. Workers divide the
    # cores by `--threads` in any case.
    return child_environment({"OMP_NUM_THREADS": "1", **kept, **own})


def _outcome(group: _Group, logs: Path, out: Path, made: Sequence[str]) -> int:
    """The exit code, after at most one line: workers have printed what they know."""
    if "DONE" in made or group.code == EXIT_FINISHED:
        return EXIT_FINISHED
    asked = group.asked
    if group.cut_short is not None:
        say(f"a second signal after {signal.Signals(asked or 0).name}: ended at once")
        return EXIT_INTERRUPTED if group.cut_short == signal.SIGINT else 128 + (asked or 0)

    # Stopped: rank 0 has reported which step is saved.
    if "PREEMPTED" in made:
        if asked is None and group.code < 0:
            say(f"the agent of the workers {death(group.code)}; the same command continues")
        return EXIT_STOPPED
    begun = (logs / BEGUN).exists()
    if asked is not None and not begun:
        say(ended_early(signal.Signals(asked)))
        if asked == signal.SIGINT:
            return EXIT_INTERRUPTED
        _mark_stopped(out)
        return EXIT_STOPPED

    # Refused: the reason is printed. A refusal of a later start means too many restarts.
    refused = any(logs.glob(f"*/attempt_0/{ASKED_TO_END}"))
    if refused or group.code == EXIT_REFUSED:
        return EXIT_REFUSED
    say(_failed(group, logs, out))
    return EXIT_FAILED


def _mark_stopped(out: Path) -> None:
    """Mark a run as stopped if its folder is there and free, and it is not finished."""
    if out.is_dir() and not (out / "DONE").exists():
        folder = RunFolder(out)
        with contextlib.suppress(RunError, OSError):
            folder.acquire()
            folder.mark("PREEMPTED")
            folder.release()


def _failed(group: _Group, logs: Path, out: Path) -> str:
    """The last line of a run that failed; keeps what torchrun has reported."""
    text = "failed: the first error above is the cause"
    if group.asked is not None:
        text = f"{signal.Signals(group.asked).name}: ended without saving; see above"
    elif group.code < 0:
        text = f"failed: the agent of the workers {death(group.code)}"
    report = ""
    for name in (LOG, ECHOES):
        with contextlib.suppress(OSError):
            report += (logs / name).read_text(errors="replace")
    if (logs / OWNED).exists():
        with contextlib.suppress(OSError):
            write_file(out / LOG, report.encode(), mode=0o600)
            return f"{text}; torchrun's report is in {out / LOG}"
    # No folder, that of another run, or a full disk: nothing is kept back.
    with contextlib.suppress(OSError):
        sys.stderr.write(report)
    return text


class _Group:
    """The agent and its workers.

    Attributes:
        asked: the first signal that this process was asked to stop by; None without one.
        cut_short: a later second signal, after which all were killed; None without one.
        code: exit code of the agent.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._command = command
        self._environment = environment
        self._asked_at = 0.0
        self.asked: int | None = None
        self.cut_short: int | None = None
        self.code = 0

    def wait(self) -> None:
        """Start the agent, and wait until it and all its workers have ended."""
        handles = threading.current_thread() is threading.main_thread()
        numbers = to_handle() if handles else ()
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        others = set(children())
        adopt_orphans(True)
        try:
            # In its own session, so that Ctrl-C reaches it once, through this process.
            self._agent = subprocess.Popen(  # noqa: S603 - this interpreter; words go to our own parser
                self._command, env=self._environment, start_new_session=True
            )
            if self.asked is not None:  # before there was an agent
                self._pass_on(self.asked)
            self._wait_for_agent()
            self._wait_for_orphans(others)
        finally:
            adopt_orphans(False)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked is None:
            self.asked = number
            self._asked_at = now
            self._pass_on(number)
            return
        # A second signal would interrupt the agent while it waits for its workers.
        by_hand = number == signal.SIGINT
        if now - self._asked_at > (INTERRUPT_PATIENCE_SECONDS if by_hand else PATIENCE_SECONDS):
            self.cut_short = number

    def _pass_on(self, number: int) -> None:
        known = (signal.SIGINT, signal.SIGHUP)  # of torchrun, which passes them on as they are
        # An interpreter that starts would print a traceback after SIGINT; later it goes to the log.
        begun = (Path(self._environment[LAUNCHER]) / LOG).exists()
        if agent := getattr(self, "_agent", None):
            agent.send_signal(number if number in known and begun else signal.SIGTERM)

    def _wait_for_agent(self) -> None:
        while True:
            try:
                self.code = self._agent.wait(_POLL_SECONDS)
                return
            except subprocess.TimeoutExpired:
                if self.cut_short is not None:
                    self._agent.kill()  # its workers become children of this process

    def _wait_for_orphans(self, others: set[int]) -> None:
        """Wait for workers whose agent was killed; they save and end by themselves.

        Stopped ones are let continue, which also those need that have not begun to follow it.
        """
        until = time.monotonic() + SAVE_SECONDS
        while left := set(children()) - others:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
                if self.cut_short is not None or time.monotonic() > until:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            time.sleep(_POLL_SECONDS)
