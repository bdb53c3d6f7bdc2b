"""When the state of a run is saved, agreed between its ranks, and what happens if a save in the background fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from fastmoco.checkpoint import (
    Checkpoint,
    CheckpointError,
    Saver,
    group_for_saving,
    load_latest,
    on_every_rank,
    require_writable,
    unfinished_saves,
)
from fastmoco.config import Config
from fastmoco.distributed.agree import of_first_rank
from fastmoco.distributed.mesh import World
from fastmoco.faults.pulse import Pulse, Section
from fastmoco.run.folder import RunFolder
from fastmoco.run.identity import RunIdentity
from fastmoco.training import state as training_state

DEADLINE_S = 600.0
"""Seconds that ranks wait for each other in one phase of a save; then it has failed on all of them."""

NOTHING, BEHIND, NOW = range(3)


class Saving:
    """Decides after every step whether to save, and how. All ranks make the same calls and come to the same decision.

    Args:
        config: the run's config.
        world: this process's place.
        folder: where the checkpoints go.
        step: steps done: saved already, or nothing yet.
        identity: of the run; a checkpoint that it does not admit is not gone back to.
        pulse: told while the main thread is in a save, which neither a signal's deadline nor the watchdog cuts off.

    Raises:
        CheckpointError: on every rank, if one of them cannot write there.
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
    ) -> None:
        self._rules, self._world, self._log_every = config.checkpoint, world, config.log_every_steps
        self._group = group_for_saving(DEADLINE_S) if world.world_size > 1 else None
        self.leftovers = unfinished_saves(folder.checkpoints)
        on_every_rank(lambda: require_writable(folder.checkpoints, world.rank), self._group)
        self._saver = Saver(
            folder.checkpoints,
            keep=config.checkpoint.keep,
            keep_multiple=config.checkpoint.every_steps if config.faults.rollback_spike else 0,
            group=self._group,
            check=training_state.require_finite,
        )
        self._root, self._identity = folder.checkpoints, identity
        self._begun_step, self._begun_at, self._committed = step, time.monotonic(), step
        self._failed, self._pulse = False, pulse

    def after_step(
        self,
        step: int,
        collect: Callable[[], tuple[Mapping[str, Tensor], Mapping[str, Any]]],
        report: Callable[[str], None],
        *,
        force: bool,
        paused: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Save if it is time, if the last save in the background failed, or if it is forced.

        Args:
            step: optimizer steps done.
            collect: gives tensors and JSON state; called only if there is something to save.
            report: takes a line for the user.
            force: save now, unless this very step is saved, and return when it is committed.
            paused: entered while the run stands still for a save.

        Raises:
            RunError: if the state is not finite.
            CheckpointError: if a save in the foreground fails.
        """
        if force:
            with paused(), self._pulse.inside(Section.SAVE, 6 * DEADLINE_S):
                self._hear(self._saver.wait(), report)
        else:
            self._hear(self._saver.poll(), report)
        order = self._agree(step, force)
        if order == NOTHING:
            return
        save = self._saver.save_in_background if order == BEHIND else self._saver.save
        self._begun_step, self._begun_at, self._failed = step, time.monotonic(), False
        with paused(), self._pulse.inside(Section.SAVE, 6 * DEADLINE_S):
            tensors, state = collect()
            save(step=step, tensors=tensors, state=state)

    def go_back(
        self,
        before: int,
        take: Callable[[Checkpoint], None],
        paused: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Checkpoint | None:
        """Take the state of the newest checkpoint at a multiple of ``checkpoint.every_steps``, after the save in flight.

        One with norms that were not judged when it was saved is left out: under another ``checkpoint.every_steps`` a save by
        the clock or on a signal may stand at such a step.

        Args:
            before: only checkpoints of earlier steps count.
            take: puts the state in its place.
            paused: entered while the run stands still.

        Returns:
            The checkpoint, the same on all ranks, each of which has verified it; None if there is none.

        Raises:
            CheckpointError: on every rank, if there are some and none verifies, or the ranks see different ones.
        """
        with paused(), self._pulse.inside(Section.ROLLBACK, 6 * DEADLINE_S):
            checkpoint = self._newest_by_steps(before)
            if checkpoint is not None:
                take(checkpoint)
        return checkpoint

    def _newest_by_steps(self, before: int) -> Checkpoint | None:
        self._saver.settle()
        every, found = self._rules.every_steps, []
        admit = self._identity.admit if self._identity is not None else lambda path, run_id: None

        def newest_below(end: int) -> Checkpoint | None:
            return load_latest(self._root, among=lambda step: step < end and step % every == 0, admit=admit)

        def find() -> int:
            newest = newest_below(before)
            while newest is not None and newest.state.get("rollback", {}).get("pending"):
                newest = newest_below(newest.step)
            found.append(newest)
            return newest.step if newest is not None else -1

        steps = on_every_rank(find, self._group)
        if len(set(steps)) > 1:
            raise CheckpointError(f"{self._root}: the ranks would go back to different steps, {steps}: is it shared?")
        return found[0]

    def last_committed(self) -> int:
        """Step of the newest checkpoint that is on the disk, after the save in flight, if any."""
        self._saver.settle()
        return self._saver.saved_step if self._saver.saved_step is not None else self._committed

    def close(self, report: Callable[[str], None]) -> None:
        """Wait for the save in flight, and say if it failed. It is one only if the run ends by an error of its own."""
        error = self._saver.wait(DEADLINE_S)
        if error is not None:
            report(f"the save in the background failed: {error}")

    def _hear(self, error: BaseException | None, report: Callable[[str], None]) -> None:
        if error is not None:
            self._failed = True
            report(f"the save in the background failed and is repeated in the foreground: {error}")

    def _agree(self, step: int, force: bool) -> int:
        """What the first rank decides, by its clock and its own background save.

        Ranks that only the clock could part meet at log steps: asking at every step would hold up CUDA's queue.
        """
        rules = self._rules
        by_steps = rules.every_steps > 0 and step % rules.every_steps == 0
        meet = force or by_steps or self._world.device.type == "cpu" or step % self._log_every == 0
        if self._world.world_size > 1 and not meet:
            return NOTHING
        by_clock = time.monotonic() - self._begun_at >= rules.every_minutes * 60
        order = NOTHING
        if self._failed or ((force or by_steps or by_clock) and self._begun_step != step):
            order = NOW if force or self._failed or not rules.async_save else BEHIND
        # Not through the group of the saves: their thread may be using it.
        return of_first_rank(order, self._world.device)
