"""`fastmoco train`; errors that a user can fix become one line each."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fastmoco.checkpoint import list_checkpoints
from fastmoco.checkpoint.choose import by_score
from fastmoco.cli.collection import collection_paused
from fastmoco.cli.next_steps import after_finish, after_stop
from fastmoco.config import Config
from fastmoco.config.serial import from_json
from fastmoco.distributed.mesh import World, start_world, stop_world
from fastmoco.errors import (
    EXIT_FAILED,
    EXIT_FINISHED,
    EXIT_REFUSED,
    LAUNCHER,
    one_line,
    say,
)
from fastmoco.faults import parent, restarts
from fastmoco.faults.after_run import AfterRun
from fastmoco.faults.first_cause import first_cause
from fastmoco.run.curves import Panels, draw_curves
from fastmoco.run.folder import RunFolder
from fastmoco.training.classes import with_classes
from fastmoco.training.start import Start, close_if_finished, find_start, give_back
from fastmoco_pipelines.errors import install_command
from fastmoco_pipelines.processes import is_orphan

if TYPE_CHECKING:
    from fastmoco.training.trainer import Trainer

CLOSE_SECONDS = 60.0
"""Time that a run which was asked to stop has to close its files after its last save."""
SAME_COMMAND = "to continue: the same command again"
PICTURE_SECONDS = 10.0
"""Time that the picture of an interrupted run may take after the run has closed everything else."""


def train(
    config: Config,
    out: Path,
    *,
    allow: Sequence[str] = (),
    trust: bool = False,
    process_ends: bool = False,
    begun: Callable[[], None] = lambda: None,
    hints: bool = True,
) -> int:
    """Train, or continue, the run in `out`.

    Args:
        config: of the run.
        out: folder of the run.
        allow: fields that may differ from those of the run in `out`.
        trust: continue from a checkpoint in `out` even if another run wrote it.
        process_ends: whether the process ends after it; after the last step of the run, signals
            then stay ignored (`AfterRun`).
        begun: called when the start is over, before the first step.
        hints: print the next commands after the last step.

    Returns:
        0 finished, 75 stopped by a signal after saving its state.

    Raises:
        SystemExit: with 2 if the run is refused before its first step, with 1 if it fails while
            running, after a message on standard error.
    """
    os.umask(0o077)  # only the owner may read weights and metrics
    with restarts.refusals_are_final(), one_line(EXIT_REFUSED, ValueError):
        # Collectives wait longer than the loader, so that the rank whose data hangs fails first and
        # reports the cause.
        world = start_world(config.device, timeout_s=config.data.timeout_s + 120)
        with first_cause(world):
            with collection_paused():
                start = find_start(out, world, trust=trust)
                config = with_classes(config, world, start.checkpoint, may_open=False)
                finished = close_if_finished(start, config, world, allow=allow)
            if not finished:
                config = _with_shards(config, out, world, start)
                with collection_paused():
                    # Imported here: a finished run needs no trainer.
                    from fastmoco.training.trainer import Trainer

                    trainer = Trainer.build(config, out, world, allow=allow, start=start)
    begun()
    if finished:
        assert start.checkpoint is not None  # noqa: S101 - a type: a finished run has one
        config = from_json(start.checkpoint.state["config"])  # with the shards of its folders
        return _finish(start.folder, config, world, None, process_ends, hints)
    try:
        with one_line(EXIT_FAILED), first_cause(world):
            code = trainer.run(process_ends=process_ends)
    except BaseException:
        trainer.close()
        raise
    if code == EXIT_FINISHED:
        return _finish(trainer.folder, config, world, trainer, process_ends, hints)
    if process_ends:
        # All is saved. Signals are ignored, so a library that hangs must not hold the process.
        limit = parent.CLOSE_SECONDS if is_orphan() else CLOSE_SECONDS
        late = threading.Timer(limit, os._exit, [code])
        late.daemon = True
        late.start()
    trainer.close(picture_s=0.0 if is_orphan() else PICTURE_SECONDS)
    if world.rank == 0 and LAUNCHER not in os.environ:
        own = process_ends and "TORCHELASTIC_RUN_ID" not in os.environ
        with suppress(OSError):  # of a closed terminal
            print(f"to continue: {after_stop(sys.argv[1:])}" if own else SAME_COMMAND, flush=True)
    stop_world()
    return code


def _with_shards(config: Config, out: Path, world: World, start: Start) -> Config:
    """The config with shards in place of folders of images, which are packed if need be."""
    if not (config.data.images or config.knn.images):
        return config
    from fastmoco.cli.images import packed
    from fastmoco.training.images import with_shards

    try:
        return with_shards(config, out, world, start, pack=packed, tell=say)
    except BaseException as error:
        give_back(start.folder, error)
        raise


def _finish(
    folder: RunFolder,
    config: Config,
    world: World,
    trainer: Trainer | None,
    process_ends: bool,
    hints: bool,
) -> int:
    """Close a run that has all its steps, and draw its curves unless there is a picture of them.

    The process group ends first, so other ranks do not wait for rank 0 to draw.

    Args:
        folder: of the run.
        config: of the run.
        world: this process's rank and device.
        trainer: of the run; None if it was finished by an earlier start.
        process_ends: as of `AfterRun`.
        hints: print the next commands.

    Returns:
        0, whatever happens while it draws.
    """
    with AfterRun(process_ends=process_ends) as after:
        if trainer is not None:
            trainer.close()
        stop_world()
        if world.rank == 0:
            known = trainer is None
            after.attempt(
                lambda: _draw(folder, config, unless_drawn=known),
                f"{folder.curves.name} not drawn",
            )
            if hints:
                after.attempt(lambda: _print_next(folder, config), "next commands not printed")
    return EXIT_FINISHED


def _print_next(folder: RunFolder, config: Config) -> None:
    """Print what can be done with a finished run."""
    paths = list_checkpoints(folder.checkpoints)
    best = by_score(paths)[:1]
    lines = after_finish(folder.path, config, best=bool(best) and best != paths[-1:])
    print(
        "\n".join(f"{'next' if not number else '':<6}{line}" for number, line in enumerate(lines))
    )


def _draw(folder: RunFolder, config: Config, *, unless_drawn: bool) -> None:
    """Draw the curves if matplotlib is installed; `unless_drawn`: and there is no picture of them.

    The folder is locked again meanwhile: another start would remove the incomplete file.
    """
    if unless_drawn and folder.has_curves():
        return
    folder.acquire()
    try:
        panels = Panels.of(folder.read_config())
        draw_curves(folder.metrics, folder.curves, config.recipe, panels)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        say(f"{folder.curves.name} not drawn; it needs {install_command('logging')}")
    finally:
        folder.release()
