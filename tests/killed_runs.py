"""Runs that kill themselves with -9 at an exact place, or are stopped by a test, and are started
again.

Each start is a forked process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from fastmoco.config import Config
from fastmoco.config.serial import from_json, to_json
from tests import forks
from tests.held_steps import hold

PATIENCE_S = 200


def start_and_end(config: Config, out: Path, place: str = "") -> int:
    """Start a run, or continue it, up to the place where it kills itself, or to its end.

    Args:
        config: of the run, for one process.
        out: folder of the run.
        place: a key of `PLACES`; empty: nowhere.

    Returns:
        The exit code; minus the signal that killed the process.
    """
    process = forks.CONTEXT.Process(
        target=_run, args=(json.dumps(to_json(config)), str(out), place)
    )
    process.start()
    process.join(PATIENCE_S)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"{out} has not ended: {Path(f'{out}.log').read_text()}")
    return process.exitcode


def start_held(words: Sequence[str], log: Path, *, held_after: int) -> BaseProcess:
    """Start `fastmoco` in a process that waits after some steps, until it is killed or stopped.

    Args:
        words: of the command line.
        log: file for its output.
        held_after: steps before it waits.
    """
    process = forks.CONTEXT.Process(target=_command, args=(list(words), str(log), held_after))
    process.start()
    return process


def _command(words: list[str], log: str, held_after: int) -> None:
    forks.print_to(Path(log))
    from fastmoco.cli.main import main

    hold(held_after)
    sys.argv = ["fastmoco", *words]
    sys.exit(main())


def _run(config: str, out: str, place: str) -> None:
    """The child: its output goes to a file beside the run."""
    forks.print_to(Path(f"{out}.log"))
    from fastmoco.cli import train

    train._draw = lambda *arguments, **options: None  # matplotlib takes longer than the run
    if place:
        PLACES[place]()
    os._exit(train.train(from_json(json.loads(config)), Path(out), process_ends=True))


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _before_the_first_checkpoint() -> None:
    """After two steps."""
    from fastmoco.training.trainer import Trainer

    plain = Trainer.step

    def step(self: Any, *arguments: Any) -> Any:
        if self.step_count == 2:
            _kill()
        return plain(self, *arguments)

    Trainer.step = step  # type: ignore[method-assign]


def _in_a_save() -> None:
    """When all files of a checkpoint are written, and it is not yet complete."""
    from fastmoco.checkpoint import store

    store._finish = lambda *arguments: _kill()  # type: ignore[assignment]


def _within_a_step() -> None:
    """In the step after the first checkpoint, between the optimizer and the objective's buffers."""
    from fastmoco.training.step import TrainStep

    plain = TrainStep.__call__

    def call(self: Any, batch: Any, at: Any, **options: Any) -> Any:
        if at.step == 4:
            self._objective.after_step = lambda *arguments: _kill()
        return plain(self, batch, at, **options)

    TrainStep.__call__ = call  # type: ignore[method-assign]


PLACES: dict[str, Callable[[], None]] = {
    "before the first checkpoint": _before_the_first_checkpoint,
    "in a save": _in_a_save,
    "within a step": _within_a_step,
}
"""What makes a run kill itself, by the name of the place."""
