"""A run that its launcher starts again and again without getting on is stopped, and one that was refused not started again."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastmoco.errors import ASKED_TO_END, EXIT_REFUSED, RunError, say
from fastmoco.faults.first_cause import PeerError
from fastmoco.run.folder import RunFolder

MOST_STARTS = 3
"""Starts from one and the same step, by the same launch, that are tried."""


def require_progress(folder: RunFolder, step: int) -> None:
    """Count this start in the run's folder, and refuse it if three before it came to no new checkpoint.

    A start by hand is always tried: only a launcher's restarts (torchrun's ``--max-restarts``, SLURM's requeue) are counted.
    Call it on one rank, which holds the folder's lock.

    Args:
        folder: of the run.
        step: of the checkpoint that this start would go on from.

    Raises:
        RunError: if the launcher has tried often enough; within `refusals_are_final` torchrun then ends too.
    """
    launch = _launch()
    before = _read(folder.starts)
    again = launch is not None and (before.get("launch") == launch or _is_restart()) and before.get("step") == step
    starts = int(before.get("starts", 0)) + 1 if again else 1
    folder.write_starts({"launch": launch, "step": step, "starts": starts})
    if starts <= MOST_STARTS:
        return
    raise RunError(
        f"{MOST_STARTS} starts from step {step} came to no new checkpoint, so this one is not tried: the first error in the "
        f"log names the cause. The same command by hand tries again; --checkpoint.every-minutes saves more often"
    )


def _launch() -> str | None:
    """What the starts by one launcher have in common; None for a start by hand."""
    run = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return run if run != "none" else ("a launcher" if _is_restart() else None)


def _is_restart() -> bool:
    return any(int(os.environ.get(name) or 0) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def _read(path: Path) -> dict[str, Any]:
    """The last count; one that a kill has cut off counts as none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def refusals_are_final() -> Iterator[None]:
    """Within it, a refusal of this rank's own ends torchrun too. A peer that failed may do better at the next start.

    Raises:
        SystemExit: the one that came.
    """
    try:
        yield
    except SystemExit as refusal:
        if refusal.code == EXIT_REFUSED and not isinstance(refusal.__cause__, PeerError):
            # Behind the refusal's own line: torchrun's answer is to kill this process.
            _end_launcher()
        raise


def _end_launcher() -> None:
    """Ask torchrun to end: by itself it would go through all its restarts, each refused like this one.

    Not behind its last one: it ends then by itself, with a report that quotes the cause. Once a start: a second signal would
    break torchrun off while it waits for its workers. The first rank to come leaves a file beside those that torchrun gives its
    workers to report errors in.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) >= int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        return
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return
    if "TORCHELASTIC_RUN_ID" in os.environ and any(
        b"torchrun" in word or b"distributed.run" in word for word in command
    ):
        report = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if report:
            try:
                (Path(report).parent.parent / ASKED_TO_END).touch(exist_ok=False)
            except OSError:
                return
        say("refused, and would be refused again: torchrun is asked to end")
        os.kill(parent, signal.SIGTERM)
