"""Decide when a run is saved, the same on all ranks, and repeat failed background saves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from fastmoco.checkpoint import (
    Checkpoint,
    CheckpointError,
    Saver,
    Score,
    group_for_saving,
    list_checkpoints,
    load_latest,
    on_every_rank,
    require_writable,
    unfinished_saves,
)
from fastmoco.checkpoint.choose import by_score, score_of
from fastmoco.checkpoint.folder import keep, keep_no_longer
from fastmoco.checkpoint.ranks import on_first_rank
from fastmoco.config import Config
from fastmoco.distributed.agree import of_first_rank
from fastmoco.distributed.mesh import World
from fastmoco.faults.pulse import Pulse, Section
from fastmoco.run.folder import RunFolder
from fastmoco.run.identity import RunIdentity
from fastmoco.training import state as training_state

DEADLINE_S = 600.0
"""Seconds that ranks wait for each other in one phase of a save. After that it has failed on all
of them."""

NOTHING, BACKGROUND, FOREGROUND = range(3)


class Saving:
    """Decides after every step whether and how to save.

    All ranks make the same calls and get the same decision.

    Args:
        config: the run's config.
        world: this process's rank and device.
        folder: of the run, for the checkpoints.
        step: steps done; their state is already saved, or it is the initial state.
        pulse: records while the main thread is in a save, which neither the deadline after a signal
            nor the watchdog may interrupt.
        identity: of the run; `go_back` uses only checkpoints that it admits.
        checkpoint: that the run continues from. Newer ones that were passed over though no damage is
            proven are kept from now on, whatever is saved.

    Attributes:
        leftovers: folders of saves that an earlier process did not finish.

    Raises:
        CheckpointError: on every rank, if one of them cannot write to the folder.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        folder: RunFolder,
        *,
        step: int,
        pulse: Pulse,
        identity: RunIdentity | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self._rules = config.checkpoint
        self._world = world
        self._log_every = config.log_every_steps
        self._pulse = pulse
        self._identity = identity
        self._root = folder.checkpoints

        # Every rank can write there, before the first step.
        self._group = group_for_saving(DEADLINE_S) if world.world_size > 1 else None
        self.leftovers = unfinished_saves(folder.checkpoints)
        on_every_rank(lambda: require_writable(folder.checkpoints, world.rank), self._group)
        self._keep_passed_over(checkpoint)
        self._saver = Saver(
            folder.checkpoints,
            keep=config.checkpoint.keep,
            keep_best=config.checkpoint.keep_best,
            keep_multiple=config.checkpoint.every_steps if config.faults.rollback_spike else 0,
            group=self._group,
            check=training_state.require_finite,
        )

        # The highest accuracy of a checkpoint; only rank 0 decides by it.
        self._best = self._best_value() if world.rank == 0 else -math.inf

        # Step and time of the last save that was started, and whether it failed.
        self._begun_step = step
        self._begun_at = time.monotonic()
        self._failed = False
        self._committed = step

    def after_step(
        self,
        step: int,
        collect: Callable[[], tuple[Mapping[str, Tensor], Mapping[str, Any]]],
        report: Callable[[str], None],
        *,
        force: bool,
        score: Score | None = None,
        paused: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Save if a save is due, if the last background save failed, or if it is forced.

        Args:
            step: optimizer steps done.
            collect: returns tensors and JSON state; called only for a save.
            report: called with each log line.
            force: save now unless this step is saved already, and return when it is committed.
            score: the accuracy if it was measured at this step, the same on all ranks. The step is
                saved if it is higher than that of every checkpoint (`checkpoint.keep_best`).
            paused: entered while training waits for the save.

        Raises:
            RunError: if the state is not finite.
            CheckpointError: if a save in the foreground fails.
        """
        if force:
            with paused(), self._pulse.inside(Section.SAVE, 6 * DEADLINE_S):
                self._note(self._saver.wait(), report)
        else:
            self._note(self._saver.poll(), report)

        # All ranks save, or none does.
        order = self._agree(step, force, score)
        if order == NOTHING:
            return
        save = self._saver.save_in_background if order == BACKGROUND else self._saver.save
        self._begun_step = step
        self._begun_at = time.monotonic()
        self._failed = False
        if score is not None:
            self._best = max(self._best, score.value)
        with paused(), self._pulse.inside(Section.SAVE, 6 * DEADLINE_S):
            tensors, state = collect()
            save(step=step, tensors=tensors, state=state)

    def go_back(
        self,
        before: int,
        take: Callable[[Checkpoint], None],
        paused: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Checkpoint | None:
        """Restore the newest checkpoint at a multiple of `checkpoint.every_steps`.

        Waits for the save in flight first. A checkpoint with norms that were not judged yet is left
        out. It comes from a save by the clock or on a signal, at a step that became a multiple when
        `checkpoint.every_steps` changed.

        Args:
            before: only checkpoints of earlier steps are considered.
            take: restores the state of a checkpoint.
            paused: entered while training waits.

        Returns:
            The checkpoint, the same on all ranks and verified on each; None if there is none.

        Raises:
            CheckpointError: on every rank, if there are checkpoints but none verifies, or if the
                ranks find different ones.
        """
        with paused(), self._pulse.inside(Section.ROLLBACK, 6 * DEADLINE_S):
            checkpoint = self._newest_by_steps(before)
            if checkpoint is not None:
                self._keep_passed_over(checkpoint)
                take(checkpoint)
        return checkpoint

    def _keep_passed_over(self, checkpoint: Checkpoint | None) -> None:
        """Keep those that were passed over for this one. All ranks call this together."""
        if checkpoint is None:
            return
        used = checkpoint

        def mark() -> None:
            for path in used.kept:
                keep(path)
            keep_no_longer(used.path)

        on_first_rank(mark, self._group)

    def _newest_by_steps(self, before: int) -> Checkpoint | None:
        self._saver.settle()
        every = self._rules.every_steps
        found: list[Checkpoint | None] = []
        admit = self._identity.admit if self._identity is not None else lambda path, run_id: None

        def newest_below(end: int) -> Checkpoint | None:
            return load_latest(
                self._root, among=lambda step: step < end and step % every == 0, admit=admit
            )

        def find() -> int:
            newest = newest_below(before)
            while newest is not None and newest.state.get("rollback", {}).get("pending"):
                newest = newest_below(newest.step)
            found.append(newest)
            return newest.step if newest is not None else -1

        steps = on_every_rank(find, self._group)
        if len(set(steps)) > 1:
            raise CheckpointError(
                f"{self._root}: the ranks would roll back to different steps, {steps}; "
                "put --out on a file system that all machines share"
            )
        return found[0]

    def last_committed(self) -> int:
        """Step of the newest committed checkpoint; waits for the save in flight, if any."""
        self._saver.settle()
        return self._saver.saved_step if self._saver.saved_step is not None else self._committed

    def best(self) -> tuple[Path, Score] | None:
        """The checkpoint with the highest accuracy, by what is on the disk now."""
        for path in by_score(list_checkpoints(self._root)):
            score = score_of(path)
            if score is not None:
                return path, score
        return None

    def _best_value(self) -> float:
        found = self.best()
        return found[1].value if found is not None else -math.inf

    def close(self, report: Callable[[str], None]) -> None:
        """Wait for the save in flight, and report if it failed.

        There is one only if the run ends with an error: the last save of a run is awaited.
        """
        error = self._saver.wait(DEADLINE_S)
        if error is not None:
            report(f"warning: the save in the background failed: {error}")

    def _note(self, error: BaseException | None, report: Callable[[str], None]) -> None:
        if error is not None:
            self._failed = True
            self._best = self._best_value()
            report(
                f"warning: the save in the background failed and is repeated in the foreground: {error}"
            )

    def _agree(self, step: int, force: bool, score: Score | None) -> int:
        """The decision of rank 0, by its clock, its own background save and the scores on the disk.

        On CUDA, ranks agree only at log steps, at forced saves, after a measurement and at
        multiples of `checkpoint.every_steps`, because agreeing waits for the device.
        """
        rules = self._rules
        by_steps = rules.every_steps > 0 and step % rules.every_steps == 0

        # Without an agreement nothing is saved, which every rank knows from the step alone.
        measured = score is not None
        often = self._world.device.type == "cpu" or step % self._log_every == 0
        meet = force or by_steps or measured or often
        if self._world.world_size > 1 and not meet:
            return NOTHING

        # What this rank would do; only the decision of rank 0 counts.
        by_clock = time.monotonic() - self._begun_at >= rules.every_minutes * 60
        by_best = rules.keep_best and score is not None and score.value > self._best
        order = NOTHING
        if self._failed or (
            (force or by_steps or by_clock or by_best) and self._begun_step != step
        ):
            order = FOREGROUND if force or self._failed or not rules.async_save else BACKGROUND

        # Not through the group of the saves, which their thread may be using.
        return of_first_rank(order, self._world.device)
