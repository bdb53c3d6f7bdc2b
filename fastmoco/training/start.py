"""The start of a run: its folder, its identity, its checkpoint, and whether anything is left to do.

A finished run is recognized here, before the data, the model and the modules that only training
needs. The same command may be started again by a scheduler at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastmoco.checkpoint import Checkpoint, load_latest
from fastmoco.config import Config, resolve
from fastmoco.config.serial import to_json
from fastmoco.distributed.agree import any_rank
from fastmoco.distributed.mesh import World
from fastmoco.errors import RunError
from fastmoco.faults import restarts
from fastmoco.models.precision import choose_precision
from fastmoco.run.folder import RunFolder
from fastmoco.run.identity import RunIdentity, identify
from fastmoco.telemetry.console import Console
from fastmoco.training import resume
from fastmoco_pipelines import BadImageError, ShardError
from fastmoco_pipelines.text import counted


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run begins.

    Attributes:
        folder: of the run; locked by rank 0, which releases it.
        identity: of the run.
        checkpoint: the newest one, verified and at the same step on all ranks; None for a new run.
    """

    folder: RunFolder
    identity: RunIdentity
    checkpoint: Checkpoint | None


def find_start(out: Path, world: World, *, trust: bool = False) -> Start:
    """Lock the folder of a run, and find the checkpoint that it continues from.

    All ranks call it together.

    Args:
        out: folder of the run.
        world: this process's rank and device.
        trust: continue from a checkpoint of another run (`run/identity.py`).

    Raises:
        RunError: if `out` is in use, or contains a checkpoint that the run may not continue from.
        CheckpointError: if `out` contains checkpoints but none verifies.
    """
    folder = RunFolder(out)
    if world.rank == 0:
        folder.acquire()
    try:
        who = identify(folder, world, trust_all=trust)
        checkpoint = load_latest(folder.checkpoints, admit=who.admit)
        if world.rank == 0:
            restarts.require_progress(folder, checkpoint.step if checkpoint is not None else 0)
        resume.require_run(checkpoint)
        resume.require_same_step(checkpoint, world)
    except BaseException as error:
        give_back(folder, error)
        raise
    return Start(folder=folder, identity=who, checkpoint=checkpoint)


def give_back(folder: RunFolder, error: BaseException | None) -> None:
    """Unlock the folder of a run that does not begin because of an error.

    A refused start leaves nothing behind. Any other error keeps the count of starts without
    progress, so that a launcher does not start a crash indefinitely.
    """
    if isinstance(error, _REFUSALS):
        folder.withdraw()
    else:
        folder.release()


_REFUSALS = (RunError, ShardError, BadImageError, ValueError, ImportError, KeyboardInterrupt)
"""Errors of a start that the user can fix (`errors.one_line`), and Ctrl-C."""


def close_if_finished(
    start: Start, config: Config, world: World, *, allow: Sequence[str] = ()
) -> bool:
    """Whether all steps of the run are done; if so, it is marked as done and its folder released.

    Only the config and the checkpoint are compared. The data set is not opened: its size is the one
    that the run was trained on. All ranks call this together and get the same answer.

    Args:
        start: of the run.
        config: given now.
        world: this process's rank and device.
        allow: config fields that may differ (`resume.require_same_run`).

    Raises:
        RunError: if the folder contains a run with another config.
    """
    try:
        steps = _steps_if_done(start, config, world, allow)
        if any_rank(steps == 0, world.device):
            return False
    except BaseException as error:
        give_back(start.folder, error)
        raise

    # The id of a run that --trust has admitted is kept, as at any other start.
    folder, checkpoint = start.folder, start.checkpoint
    assert checkpoint is not None  # noqa: S101 - a type: the function is for starts with one
    identity = start.identity.taking_over(checkpoint.run_id)
    if world.rank == 0 and (identity.new or identity != start.identity):
        state = checkpoint.state
        data = {name: value for name, value in state["data"].items() if name != "step"}
        saved = {"config": to_json(config), "resolved": state["resolved"], "data": data}
        folder.write_config({**folder.read_config(), **saved, **identity.to_json()})

    # Report as a run does that has begun.
    console = Console(rank=world.rank)
    for path, reason in checkpoint.skipped:
        console.event(f"warning: passed over {path.name}: {reason}")
    for note in folder.notes:
        console.event(note)
    for name in folder.take_leftovers():
        console.event(f"ignored {name}, left by a killed run")
    folder.mark("DONE")
    console.event(finished_already(folder, steps))
    console.close()
    folder.release()
    return True


def finished_already(folder: RunFolder, steps: int) -> str:
    """The message for a run without a step left to do."""
    are = "is" if steps == 1 else "are"
    return (
        f"this run is finished already; its {counted(steps, 'step')} {are} in {folder.checkpoints}"
    )


def _steps_if_done(start: Start, config: Config, world: World, allow: Sequence[str]) -> int:
    """The steps of the run if its checkpoint has all of them, else 0."""
    checkpoint = start.checkpoint
    if checkpoint is None:
        return 0
    precision = choose_precision(config.precision, world.device)
    resume.require_same_config(checkpoint, config, precision, start.folder, allow)
    try:
        steps = resolve(
            config,
            world_size=world.world_size,
            sample_count=checkpoint.state["resolved"]["sample_count"],
        ).total_steps
    except (ValueError, KeyError, TypeError):
        return 0  # refused later, with the number of images there are now
    return steps if checkpoint.step >= steps else 0
