"""Roll back to the last checkpoint after a gradient spike, and continue with the next data.

Chowdhery et al. 2022 (PaLM, section 5.1) restarted from before a spike of the loss and left out the
batches around it. The spikes did not come back, so a spike needs both a batch and a state. Here
weights, momentum encoder, buffers and the state of the optimizer become those of the checkpoint of
step c. The step count stays at s, and with it the schedule and the order of the data. The result is
that of a run that skipped all steps from c to s, as `step_guard.py` skips one. The momentum encoder
is part of the state and is not averaged again: at c it was made ready for the next step, which is
now that of s.

Decisions depend on steps alone, so that a run that was killed and continued makes the same ones.
Norms are kept for every step. They are judged at log steps, and before every save at a multiple of
`checkpoint.every_steps`. Only these saves are rolled back to, so none of them contains a spike that
was not judged yet. A save at another step, by the clock or on a signal, contains the norms that are
still to be judged, and is never rolled back to.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

from fastmoco.checkpoint import Checkpoint
from fastmoco.config import Config
from fastmoco.distributed.agree import of_first_rank
from fastmoco.distributed.mesh import World
from fastmoco.errors import RunError
from fastmoco.telemetry.detectors import SpikeDetector
from fastmoco.telemetry.recorder import Recorder
from fastmoco.telemetry.stability import GradientRecorder
from fastmoco.training.saving import Saving

WINDOW = 100
"""Steps of the running median."""
Row: TypeAlias = tuple[int, dict[str, float]]
"""A step and its gradient norms."""


class Rollback:
    """Detects gradient spikes and restores an earlier checkpoint.

    All ranks call `record` and then `after_step` at every step. Every checkpoint contains
    `state_dict`.

    Args:
        config: the run's config; if `faults.rollback_spike` is 0, all calls do nothing.
        world: this process's rank and device.
        saving: of the run; finds and loads the checkpoint to restore.
        take: restores the state of a checkpoint, except for the step count of the run.
        state: the result of `state_dict` in the checkpoint that the run continues from; empty for a
            new run.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        saving: Saving,
        take: Callable[[Checkpoint], None],
        state: Mapping[str, Any],
    ) -> None:
        self._saving = saving
        self._take = take
        self._world = world
        self._factor = config.faults.rollback_spike
        self._most = config.faults.max_rollbacks
        self._every = config.checkpoint.every_steps

        # Norms on the device, norms not judged yet, and the history of the median.
        self._on_device = GradientRecorder()
        self._pending: list[Row] = [_row(*row) for row in state.get("pending", [])]
        self._restart_median(state)

        # Number of all rollbacks, and of the latest ones without a quiet stretch between them.
        self._total = state.get("total", 0)
        self._row = state.get("row", 0)
        # The step of the last rollback, and the step whose state it restored.
        self._last: tuple[int, int] | None = tuple(state["last"]) if state.get("last") else None

    def record(self, step: int, norms: Mapping[str, Tensor]) -> None:
        """Keep the gradient norms of one step (`gradient_norms`) on their device. No host sync."""
        if self._factor:
            self._on_device.record(step, norms)

    def after_step(self, step: int, recorder: Recorder, *, logged: bool) -> bool:
        """Judge the steps that were not judged yet, and roll back if one of them was a spike.

        Only log steps and multiples of `checkpoint.every_steps` judge, with one host sync.

        Args:
            step: steps done.
            recorder: gets the event.
            logged: whether this is a log step.

        Returns:
            Whether it rolled back.

        Raises:
            RunError: after too many rollbacks without a quiet stretch.
            CheckpointError: if there are checkpoints to restore but none verifies.
        """
        if not self._factor or not (logged or step % self._every == 0):
            return False
        spike = self._judge()
        if not spike:
            return False

        # A spike within `checkpoint.every_steps` of the last rollback counts as consecutive.
        spiked = f"step {spike}: a gradient norm above {self._factor:g} times its running median"
        quiet = self._last is None or spike - self._last[0] > self._every
        row = 1 if quiet else self._row + 1
        if row > self._most:
            # A run that continues from a checkpoint after the spike would judge it and end again.
            inside = self._saving.last_committed() >= spike
            moved = f"Move the checkpoints from step {spike} on away; the others"
            raise RunError(
                f"{spiked}, and {row - 1} rollbacks in a row did not help "
                f"(faults.max_rollbacks={self._most}). "
                f"{moved if inside else 'The checkpoints'} are from before the spike. "
                "Lower --optim.lr (with --allow optim.lr), set --optim.clip-norm "
                "(with --allow optim.clip_norm), or continue without --faults.rollback-spike"
            )

        # The state of the checkpoint becomes the run's.
        checkpoint = self._saving.go_back(step, self._take, recorder.paused)
        if checkpoint is None:
            recorder.event(
                f"warning: {spiked}; there is no checkpoint by steps to roll back to yet, "
                "the run continues"
            )
            return False
        for warning in checkpoint.warnings:
            recorder.event(f"warning: {warning}")

        # The history of the median is that of the checkpoint; the counts are this run's.
        self._restart_median(checkpoint.state.get("rollback", {}))
        self._total += 1
        self._row = row
        self._last = (step, checkpoint.step)
        recorder.rolled_back(step, checkpoint.step)
        recorder.event(
            f"warning: {spiked}; weights, momentum encoder, buffers and optimizer are those of "
            f"step {checkpoint.step} again, as if steps {checkpoint.step + 1} to {step} had been "
            f"skipped (rollback {row} in a row, {self._total} in all)"
        )
        return True

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint: history of the median, norms not judged yet, rollbacks."""
        if not self._factor:
            return {}
        self._fetch()
        return {
            "history": [list(row) for row in self._history],
            "pending": [list(row) for row in self._pending],
            "total": self._total,
            "row": self._row,
            "last": list(self._last) if self._last else None,
        }

    def _restart_median(self, state: Mapping[str, Any]) -> None:
        """Replace the history of the median by that of a checkpoint."""
        self._detector = SpikeDetector(factor=self._factor or math.inf, window=WINDOW)
        self._history: deque[Row] = deque(maxlen=WINDOW)
        self._observe(_row(*row) for row in state.get("history", []))

    def _observe(self, rows: Iterable[Row]) -> int:
        """Add steps to the history. Returns the first that was a spike, or 0."""
        spikes = []
        for step, norms in rows:
            spikes += [spike.step for spike in self._detector.observe(step, norms)]
            self._history.append((step, norms))
        return spikes[0] if spikes else 0

    def _fetch(self) -> None:
        """Read the norms from the device.

        Steps with non-finite gradients are left out: the step guard has skipped them.
        """
        for step, norms in self._on_device.flush():
            if all(math.isfinite(value) for value in norms.values()):
                self._pending.append((step, norms))

    def _judge(self) -> int:
        """The first spike among the steps that were not judged yet, or 0. Rank 0 decides."""
        self._fetch()
        spike = self._observe(self._pending)
        self._pending = []
        return of_first_rank(spike, self._world.device)


def _row(step: int, norms: Mapping[str, float]) -> Row:
    return int(step), dict(norms)
