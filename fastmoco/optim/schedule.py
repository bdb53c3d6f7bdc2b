"""Learning rate and EMA momentum as pure functions of the step, so no state has to be saved."""

from __future__ import annotations

import math
from typing import Literal


def _epoch(step: int, epochs: float, steps_per_epoch: int) -> float:
    """The fractional epoch of a step, at most the number of epochs."""
    if step < 0:
        raise ValueError(f"step={step}: steps count from 0")
    if steps_per_epoch < 1:
        raise ValueError(f"steps_per_epoch={steps_per_epoch}: must be at least 1")
    if epochs <= 0:
        raise ValueError(f"epochs={epochs}: must be above 0")
    return min(step / steps_per_epoch, epochs)


def learning_rate(
    step: int, *, peak: float, epochs: float, warmup_epochs: float, steps_per_epoch: int
) -> float:
    """Linear warm-up from 0, then cosine decay to 0 (Chen, Xie, He 2021, training recipe).

    With e = step / steps_per_epoch the rate is `peak * e / warmup` during warm-up, and after it
    `peak * 0.5 * (1 + cos(pi * (e - warmup) / (epochs - warmup)))`.

    Args:
        step: optimizer step from 0; with a warm-up, step 0 has a rate of exactly 0.
        peak: the highest rate: base rate * global batch / 256.
        epochs: length of the run, in epochs.
        warmup_epochs: length of the warm-up, in epochs.
        steps_per_epoch: optimizer steps of one epoch.

    Raises:
        ValueError: if a number is negative, or the warm-up is longer than the run.
    """
    epoch = _epoch(step, epochs, steps_per_epoch)
    if not 0 <= warmup_epochs <= epochs:
        raise ValueError(
            f"warmup_epochs={warmup_epochs}: needs 0 <= warmup_epochs <= epochs={epochs}"
        )
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    if warmup_epochs == epochs:
        return peak
    return (
        peak * 0.5 * (1.0 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs)))
    )


def ema_momentum(
    step: int,
    *,
    start: float,
    epochs: float,
    steps_per_epoch: int,
    schedule: Literal["cosine", "constant"] = "cosine",
) -> float:
    """Weight of the momentum encoder's own parameters in its update; there is no warm-up.

    Cosine: `1 - 0.5 * (1 + cos(pi * e / epochs)) * (1 - start)` with e = step / steps_per_epoch
    (Chen, Xie, He 2021).

    Args:
        step: optimizer step from 0.
        start: momentum at step 0, in [0, 1].
        epochs: length of the run, in epochs.
        steps_per_epoch: optimizer steps of one epoch.
        schedule: "cosine" rises to 1 at the end, "constant" stays at `start`.

    Raises:
        ValueError: if a number is out of range, or the schedule is unknown.
    """
    epoch = _epoch(step, epochs, steps_per_epoch)
    if not 0 <= start <= 1:
        raise ValueError(f"start={start}: an EMA momentum is in [0, 1]")
    if schedule == "constant":
        return start
    if schedule != "cosine":
        raise ValueError(f'schedule={schedule!r}: is "cosine" or "constant"')
    return 1.0 - 0.5 * (1.0 + math.cos(math.pi * epoch / epochs)) * (1.0 - start)
