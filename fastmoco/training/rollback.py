"""After a gradient spike: back to the last checkpoint, as if the steps since then had never been. Only the data move on.

Chowdhery et al. 2022 (PaLM, section 5.1) restarted from before a spike of the loss and left out the batches around it; the
spikes did not come back, so it takes both a batch and a state to make one. Here weights, twin, buffers and the optimizer's
state become those of the checkpoint of step c, while the count of steps, and with it schedule and order of the data, stays
at s: what is left is a run whose steps c to s were all skipped, as `step_guard.py` skips one. The twin is part of the state and
not averaged again: at c it was made ready for the next step, which is now that of s.

What is decided depends on steps alone, so that a run that was killed and continued decides alike. Norms are kept for every
step and judged at log steps and before every save by steps (``checkpoint.every_steps``); a run only goes back to what was
saved by steps, which therefore lies before any spike that was not known. A save at another step, by the clock or on a signal,
holds the norms that are still to be judged, and is never gone back to.
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
from fastmoco.telemetry.recorder import Recorder
from fastmoco.telemetry.stability import GradientRecorder, SpikeDetector
from fastmoco.training.saving import Saving

WINDOW = 100
"""Steps of the running median."""
Row: TypeAlias = tuple[int, dict[str, float]]
"""A step and its gradient norms."""


class Rollback:
    """Call `record` at every step and `after_step` behind it, on all ranks; `state_dict` belongs into every checkpoint.

    Args:
        config: the run's config; ``faults.rollback_spike`` of 0 makes all calls do nothing.
        world: this process among its peers.
        saving: of the run, whose checkpoints it goes back to.
        take: makes the state of a checkpoint the run's, whose count of steps stays.
        state: what `state_dict` gave, of the checkpoint that the run continues from; empty for a new run.
    """

    def __init__(
        self, config: Config, world: World, saving: Saving, take: Callable[[Checkpoint], None], state: Mapping[str, Any]
    ) -> None:
        self._saving, self._take = saving, take
        self._world, self._factor, self._most = world, config.faults.rollback_spike, config.faults.max_rollbacks
        self._every = config.checkpoint.every_steps
        self._on_device = GradientRecorder()
        self._pending: list[Row] = [_row(*row) for row in state.get("pending", [])]
        self._restart_median(state)
        # All rollbacks; those without a quiet stretch between them; the last one's step and the step it went back to.
        self._total, self._row = state.get("total", 0), state.get("row", 0)
        self._last: tuple[int, int] | None = tuple(state["last"]) if state.get("last") else None

    def record(self, step: int, norms: Mapping[str, Tensor]) -> None:
        """Keep one step's gradient norms (`gradient_norms`) on their device. No host sync."""
        if self._factor:
            self._on_device.record(step, norms)

    def after_step(self, step: int, recorder: Recorder, *, logged: bool) -> bool:
        """Judge the steps since the last call that did, and go back if one of them was a spike.

        Args:
            step: steps done.
            recorder: told of it.
            logged: whether this is a log step; only these and steps by which is saved judge, with one host sync.

        Returns:
            Whether it went back.

        Raises:
            RunError: after too many rollbacks without a quiet stretch.
            CheckpointError: if the checkpoints to go back to do not verify.
        """
        if not self._factor or not (logged or step % self._every == 0):
            return False
        spike = self._judge()
        if not spike:
            return False
        spiked = f"step {spike}: a gradient norm above {self._factor:g} times its running median"
        quiet = self._last is None or spike - self._last[0] > self._every
        row = 1 if quiet else self._row + 1
        if row > self._most:
            # Whatever continues from inside the spike comes to know of it, and ends here again.
            inside = self._saving.last_committed() >= spike
            raise RunError(
                f"{spiked}, and {row - 1} rollbacks in a row did not help (faults.max_rollbacks={self._most}). "
                + (f"Move the checkpoints from step {spike} on away; the others" if inside else "The checkpoints")
                + " are from before the spike. Lower --optim.lr (with --allow optim.lr) or set "
                "--optim.clip-norm (with --allow optim.clip_norm), or go on without --faults.rollback-spike"
            )
        checkpoint = self._saving.go_back(step, self._take, recorder.paused)
        if checkpoint is None:
            recorder.event(f"warning: {spiked}; no checkpoint by steps to go back to yet, the run goes on")
            return False
        for path, reason in checkpoint.skipped:
            recorder.event(f"passed over {path.name}: {reason}")
        self._restart_median(checkpoint.state.get("rollback", {}))
        self._total, self._row, self._last = self._total + 1, row, (step, checkpoint.step)
        recorder.rolled_back(step, checkpoint.step)
        recorder.event(
            f"warning: {spiked}; weights, twin, buffers and optimizer are those of step {checkpoint.step} again, as if steps "
            f"{checkpoint.step + 1} to {step} had never been (rollback {row} in a row, {self._total} in all)"
        )
        return True

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold: the history of the median, norms not judged yet, and what was rolled back."""
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
        """Begin with the history that a checkpoint holds."""
        self._detector = SpikeDetector(factor=self._factor or math.inf, window=WINDOW)
        self._history: deque[Row] = deque(maxlen=WINDOW)
        self._observe(_row(*row) for row in state.get("history", []))

    def _observe(self, rows: Iterable[Row]) -> int:
        """Take steps into the history; the first that was a spike, or 0."""
        spikes = []
        for step, norms in rows:
            spikes += [spike.step for spike in self._detector.observe(step, norms)]
            self._history.append((step, norms))
        return spikes[0] if spikes else 0

    def _fetch(self) -> None:
        """Read what lies on the device. A step whose gradients were not finite was skipped, and was no spike."""
        for step, norms in self._on_device.flush():
            if all(math.isfinite(value) for value in norms.values()):
                self._pending.append((step, norms))

    def _judge(self) -> int:
        """The first spike among the steps not judged yet, or 0; the first rank's word holds for all."""
        self._fetch()
        spike = self._observe(self._pending)
        self._pending = []
        return of_first_rank(spike, self._world.device)


def _row(step: int, norms: Mapping[str, float]) -> Row:
    return int(step), dict(norms)
