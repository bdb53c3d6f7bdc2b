"""torchrun's agent for `fastmoco train --gpus N`, in a process of its own.

It is torch.distributed.run with three differences: it ends with the launcher that started it, it
writes its log and tracebacks to a file instead of the terminal, and it checks the number of GPUs
first, which needs torch. The output of workers is not redirected.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastmoco.cli.collection import collection_paused
from fastmoco.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_REFUSED, EXIT_STOPPED, RunError, say
from fastmoco.errors.streams import as_shown
from fastmoco_pipelines.processes import (
    PARENT,
    POLL_SECONDS,
    children,
    end_by_signal,
    follow_parent,
)

LOG = "torchrun.log"
"""Name of the file with torchrun's log, in the folder for reports."""
_OWN_CODES = (EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED)
"""Of workers that have printed the reason."""


def main(args: Sequence[str]) -> int:
    """Run torchrun's agent.

    Args:
        args: folder for reports, number of processes, device of the config, then the arguments of
            torchrun.

    Returns:
        0 if all workers returned 0, 2 if there are fewer GPUs than processes, else 1.
    """
    reports, processes, device, *words = args
    terminal = sys.stderr
    launcher = os.environ.get(PARENT, str(os.getppid()))
    follow_parent(at_end=_end_with_launcher)
    os.environ[PARENT] = launcher  # of the workers: they end with it, and with this process
    with (Path(reports) / LOG).open("w", buffering=1) as file:
        log = as_shown(file)
        # Before torch is imported: its loggers keep the stream of that moment.
        sys.stderr = log
        logging.basicConfig(stream=log, level=logging.WARNING)
        try:
            with collection_paused():
                import torch

                # By name: it is a program, not a collective, and has no types.
                torchrun = importlib.import_module("torch.distributed.run")
            start = describe_start(int(processes), device, torch.cuda.device_count())
            if start:
                _say(start, terminal)
            logging.getLogger("torch.distributed").addHandler(_Deaths(terminal))
            torchrun.run(torchrun.parse_args(words))
        except RunError as refused:
            _say(str(refused), terminal)
            return EXIT_REFUSED
        except BaseException:  # a signal, too, is an exception of torchrun
            traceback.print_exc(file=log)
            return EXIT_FAILED
    return EXIT_FINISHED


def describe_start(processes: int, device: str, gpus: int) -> str:
    """What is started if it is not one process for each of several GPUs; else empty.

    Args:
        processes: to start.
        device: of the config.
        gpus: that this process sees.

    Raises:
        RunError: if there are GPUs, but fewer than processes.
    """
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    limit = f" (CUDA_VISIBLE_DEVICES={shown!r})" if shown is not None else ""
    plural = "process" if processes == 1 else "processes"
    if device == "cpu":
        return f"--gpus {processes}: {processes} {plural} on the CPU with gloo (--device cpu)"
    if gpus == 0:
        if device == "auto":
            return (
                f"--gpus {processes}: this machine shows no GPU{limit}; "
                f"{processes} {plural} on the CPU with gloo"
            )
        raise RunError(f"--gpus {processes}: this machine shows no GPU{limit}; use --device cpu")
    if processes > gpus:
        count = f"{gpus} GPU" if gpus == 1 else f"{gpus} GPUs"
        raise RunError(
            f"--gpus {processes}: this machine shows {count}{limit}; "
            f"use --gpus {gpus}, or --device cpu"
        )
    return ""


class _Deaths(logging.Handler):
    """Prints one line for a worker that was ended, because it cannot say so itself."""

    def __init__(self, terminal: Any) -> None:
        super().__init__(logging.ERROR)
        self._terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        found = re.search(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)", record.getMessage())
        if found and int(found[1]) not in _OWN_CODES:
            _say(f"rank {found[2]} {death(int(found[1]))}", self._terminal)


def death(code: int) -> str:
    """How a process ended, by its exit code.

    Args:
        code: negative after a signal.
    """
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    causes = {
        "SIGKILL": "by a person or a scheduler, or by the kernel because memory ran out (dmesg)",
        "SIGBUS": "often because /dev/shm or another mapped file had no space left",
        "SIGSEGV": "by a fault of a library",
        "SIGABRT": "by a library that gave up",
    }
    cause = f", {causes[name]}" if name in causes else ""
    return f"was ended by {name}{cause}"


def _end_with_launcher() -> None:
    """End after the workers, which follow the launcher too and know how long they may take.

    The main thread passes on the SIGTERM and waits, with the store of the ranks. Stopped workers
    are let continue.
    """
    end_by_signal()
    for pid in children():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    while children():
        time.sleep(POLL_SECONDS)
    os._exit(EXIT_FAILED)


def _say(text: str, terminal: Any) -> None:
    log, sys.stderr = sys.stderr, terminal
    try:
        say(text)
    finally:
        sys.stderr = log


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
