"""`fastmoco train` and `fastmoco eval knn`; errors that a user can fix become one line each."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fastmoco.cli.collection import collection_paused
from fastmoco.config import Config
from fastmoco.distributed.mesh import World, start_world, stop_world
from fastmoco.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_REFUSED, RunError, one_line, say
from fastmoco.faults import restarts
from fastmoco.faults.after_run import AfterRun
from fastmoco.faults.first_cause import first_cause
from fastmoco.faults.parent import is_orphan
from fastmoco.models.precision import choose_precision
from fastmoco.run.curves import draw_curves
from fastmoco.run.folder import RunFolder
from fastmoco.training.start import close_if_finished, find_start

if TYPE_CHECKING:
    from fastmoco.training.trainer import Trainer

CLOSE_SECONDS = 60.0
"""Time that a run which was asked to stop has to close its files after its last save."""
ORPHAN_CLOSE_SECONDS = 2.0
"""The same for a worker whose launcher was killed."""


def train(
    config: Config,
    out: Path,
    *,
    allow: Sequence[str] = (),
    trust: bool = False,
    process_ends: bool = False,
    begun: Callable[[], None] = lambda: None,
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
        with first_cause(world), collection_paused():
            start = find_start(out, world, trust=trust)
            finished = close_if_finished(start, config, world, allow=allow)
            if not finished:
                # Imported here: a finished run needs no trainer.
                from fastmoco.training.trainer import Trainer

                trainer = Trainer.build(config, out, world, allow=allow, start=start)
    begun()
    if finished:
        return _finish(start.folder, config, world, None, process_ends)
    try:
        with one_line(EXIT_FAILED), first_cause(world):
            code = trainer.run(process_ends=process_ends)
    except BaseException:
        trainer.close()
        raise
    if code == EXIT_FINISHED:
        return _finish(trainer.folder, config, world, trainer, process_ends)
    if process_ends:
        # All is saved. Signals are ignored, so a library that hangs must not hold the process.
        limit = ORPHAN_CLOSE_SECONDS if is_orphan() else CLOSE_SECONDS
        late = threading.Timer(limit, os._exit, [code])
        late.daemon = True
        late.start()
    trainer.close()
    stop_world()
    return code


def _finish(
    folder: RunFolder,
    config: Config,
    world: World,
    trainer: Trainer | None,
    process_ends: bool,
) -> int:
    """Close a run that has all its steps, and draw its curves unless there is a picture of them.

    The process group ends first, so other ranks do not wait for rank 0 to draw.

    Args:
        folder: of the run.
        config: of the run.
        world: this process's rank and device.
        trainer: of the run; None if it was finished by an earlier start.
        process_ends: as of `AfterRun`.

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
    return EXIT_FINISHED


def eval_knn(run: Path, train_shards: str, test_shards: str, *, k: int, temperature: float) -> int:
    """Print the kNN accuracy of the newest checkpoint of a run as one JSON line; returns 0.

    Raises:
        SystemExit: with 2 if the run or the shards cannot be used, after a
            message on standard error.
    """
    from fastmoco.training import setup
    from fastmoco.training.load_run import load_run

    with one_line(EXIT_REFUSED, ValueError):
        objective, saved, checkpoint = load_run(run)
        knn = replace(
            saved.knn,
            train_shards=train_shards,
            test_shards=test_shards,
            k=k,
            temperature=temperature,
            max_train_images=0,
            max_test_images=0,
            every_epochs=max(saved.knn.every_epochs, 1.0),
        )
        config = replace(saved, knn=knn, device="auto")
        world = start_world(config.device)
        with first_cause(world):
            threads = setup.share_cores(config)
            precision = choose_precision(config.precision, world.device)
            monitor = setup.build_knn(config, world, threads=threads, precision=precision)
            if monitor is None:
                raise RunError("no shards to classify; give them with --test")
            with closing(monitor):
                accuracy = monitor.evaluate(objective.to(world.device).encoder)["knn"]
    stop_world()
    if world.rank == 0:
        print(
            json.dumps(
                {"run": str(run), "step": checkpoint.step, "knn": round(accuracy, 6), "k": k}
            )
        )
    return EXIT_FINISHED


def _draw(folder: RunFolder, config: Config, *, unless_drawn: bool) -> None:
    """Draw the curves if matplotlib is installed; `unless_drawn`: and there is no picture of them.

    The folder is locked again meanwhile: another start would remove the incomplete file.
    """
    if unless_drawn and folder.has_curves():
        return
    from fastmoco.training import setup  # only now: a picture that is there needs no trainer

    folder.acquire()
    try:
        draw_curves(folder.metrics, folder.curves, config.recipe, figures=setup.figures(config))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        say(
            f"{folder.curves.name} not drawn; "
            "it needs pip install '.[logging]' in the source folder of fastmoco"
        )
    finally:
        folder.release()
