"""Stop restart storms: refuse a start after three starts without a new checkpoint, and ask torchrun
not to retry a refused run."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastmoco.config.launched import count_in
from fastmoco.errors import ASKED_TO_END, EXIT_REFUSED, LAUNCHER, RunError, say
from fastmoco.faults.first_cause import PeerError
from fastmoco.run.folder import RunFolder, read_object

MOST_STARTS = 3
"""Largest number of starts from the same step by the same launch."""


def require_progress(folder: RunFolder, step: int) -> None:
    """Count this start in the run's folder; refuse it if three before it reached no new checkpoint.

    A manual start is always tried: only restarts by a launcher (torchrun's `--max-restarts`,
    SLURM's requeue) are counted. Call it on one rank, the one that holds the folder's lock.

    Args:
        folder: of the run.
        step: of the checkpoint from which this start would continue.

    Raises:
        RunError: if the launcher has used up its starts; inside `refusals_are_final` torchrun then
            ends too.
    """
    launch = _launch()
    before = read_object(folder.starts)
    again = (
        launch is not None
        and (before.get("launch") == launch or _is_restart())
        and before.get("step") == step
    )
    count = before.get("starts")
    starts = count + 1 if again and type(count) is int else 1
    folder.write_starts({"launch": launch, "step": step, "starts": starts})
    if starts <= MOST_STARTS:
        return
    raise RunError(
        f"{MOST_STARTS} starts from step {step} reached no new checkpoint, so this start is "
        f"refused: the first error in the log names the cause. Run the same command by hand to "
        f"try again; a lower --checkpoint.every-minutes saves more often"
    )


def _launch() -> str | None:
    """An id that all starts by one launcher share; None for a manual start."""
    run = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return run if run != "none" else ("a launcher" if _is_restart() else None)


def _is_restart() -> bool:
    return any(
        count_in(os.environ, name) > 0
        for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    )


@contextmanager
def refusals_are_final() -> Iterator[None]:
    """A context in which a refusal by this rank also ends torchrun.

    A failure of a peer does not end torchrun, because the next start may succeed.

    Raises:
        SystemExit: as raised inside.
    """
    try:
        yield
    except SystemExit as refusal:
        if refusal.code == EXIT_REFUSED and not isinstance(refusal.__cause__, PeerError):
            # After the refusal has been printed, because torchrun then kills this process.
            _end_launcher()
        raise


def _end_launcher() -> None:
    """Ask torchrun to end; otherwise it would use all its restarts, each refused like this one.

    After its last restart torchrun is not asked: it then ends on its own, with a report that quotes
    the cause. It is asked only once per start, because a second signal would interrupt it while it
    waits for its workers: the first rank that gets here creates a file beside the error files that
    torchrun gives its workers.
    """
    restarts = count_in(os.environ, "TORCHELASTIC_RESTART_COUNT")
    if restarts >= count_in(os.environ, "TORCHELASTIC_MAX_RESTARTS"):
        return
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return
    if "TORCHELASTIC_RUN_ID" in os.environ and any(
        b"torchrun" in word or b"distributed.run" in word or b"cli.agent" in word
        for word in command
    ):
        report = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if report:
            try:
                (Path(report).parent.parent / ASKED_TO_END).touch(exist_ok=False)
            except OSError:
                return
        if LAUNCHER not in os.environ:
            say("refused, and a restart would be refused too: asking torchrun to end")
        os.kill(parent, signal.SIGTERM)
