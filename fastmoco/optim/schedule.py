"""Learning rate and EMA momentum as pure functions of the step, so no state has to be saved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from fastmoco.config import Config, Resolved
from fastmoco.config.optim import Schedule


def _epoch(step: int, epochs: float, steps_per_epoch: int) -> float:
    """The fractional epoch of a step, at most the number of epochs."""
    if step < 0:
        raise ValueError(f"step={step}: steps count from 0")
    if steps_per_epoch < 1:
        raise ValueError(f"steps_per_epoch={steps_per_epoch}: must be at least 1")
    if epochs <= 0:
        raise ValueError(f"epochs={epochs}: must be above 0")
    return min(step / steps_per_epoch, epochs)


class Steps(NamedTuple):
    """Whole steps that a schedule counts, where it does not count epochs."""

    warmup: int
    """Steps of the warm-up."""
    total: int
    """Steps of the run, warm-up included."""


def simclr_steps(
    epochs: float, warmup_epochs: float, *, sample_count: int, global_batch_size: int
) -> Steps:
    """The steps that SimCLR counts: of all images, and one more.

    `floor(warmup_epochs * n / batch)` of warm-up, `floor(epochs * n / batch) + 1` in total. BYOL
    counts the same, without the one more.

    Args:
        epochs: length of the run.
        warmup_epochs: length of the warm-up.
        sample_count: images n of the training set.
        global_batch_size: images of a step.
    """
    return Steps(
        warmup=round(warmup_epochs * sample_count // global_batch_size),
        total=int(epochs * sample_count // global_batch_size) + 1,
    )


def learning_rate(
    step: int,
    *,
    peak: float,
    epochs: float,
    warmup_epochs: float,
    steps_per_epoch: int,
    schedule: Schedule = "cosine",
    warmup_lr: float = 0.0,
    final_lr: float = 0.0,
    steps: Steps | None = None,
    milestones: Sequence[float] = (),
    milestone_factor: float = 0.1,
) -> float:
    """Linear warm-up, then half a cosine or steps; docs/optimizers.md has a table of who uses which.

    With e = step / steps_per_epoch, w = warmup_epochs, and
    cosine(x) = 0.5 * (1 + cos(pi * x)):

    * "cosine" (Chen, Xie, He 2021): `warmup_lr + (peak - warmup_lr) * e / w` in the warm-up, and
      after it `final_lr + (peak - final_lr) * cosine((e - w) / (epochs - w))`; both ends are 0 but
      for MaskFeat.
    * "cosine_per_epoch" (MoCo, SimSiam): from and to 0, and after the warm-up e is rounded down to
      whole epochs.
    * "cosine_steps" (SimCLR, BYOL): `peak * step / warmup` in the warm-up, and after it
      `peak * cosine((step - warmup) / (total - warmup))`, with whole numbers of `steps`.
    * "cosine_inclusive" (SwAV, DINO): `warmup` values from `warmup_lr` to `peak`, both included.
      After them, from `peak` again,
      `final_lr + (peak - final_lr) * cosine((step - warmup) / (total - warmup))`.
    * "cosine_unshifted" (MoBY): the first rate twice, so t = max(step - 1, 0) in what follows.
      `warmup_lr + (peak - warmup_lr) * t / warmup` in the warm-up, and after it
      `final_lr + (peak - final_lr) * cosine(t / total)`: the cosine begins with the run, and not
      with the end of the warm-up, so its highest rate is a little below the peak.
    * "steps" (MoCo v1): `peak * e / w` in the warm-up, and after it
      `peak * milestone_factor ** (number of milestones <= e)`.

    Args:
        step: optimizer step from 0.
        peak: the highest rate, as `Config.peak_lr`.
        epochs: length of the run, in epochs.
        warmup_epochs: length of the warm-up, in epochs.
        steps_per_epoch: optimizer steps of one epoch.
        schedule: "cosine", "cosine_per_epoch", "cosine_steps", "cosine_inclusive",
            "cosine_unshifted" or "steps".
        warmup_lr: rate of step 0; only for "cosine", "cosine_inclusive" and "cosine_unshifted" with
            a warm-up.
        final_lr: rate at the end; only for the same three.
        steps: warm-up and total of "cosine_steps" and these two; default: the epochs times
            `steps_per_epoch`, rounded.
        milestones: epochs of "steps".
        milestone_factor: of the rate at each of them.

    Raises:
        ValueError: if a number is negative, the warm-up is longer than the run, or the schedule is
            unknown.
    """
    epoch = _epoch(step, epochs, steps_per_epoch)
    if not 0 <= warmup_epochs <= epochs:
        raise ValueError(
            f"warmup_epochs={warmup_epochs}: needs 0 <= warmup_epochs <= epochs={epochs}"
        )
    if schedule in ("cosine", "cosine_per_epoch", "steps"):
        first, last = (warmup_lr, final_lr) if schedule == "cosine" else (0.0, 0.0)
        if epoch < warmup_epochs:
            return first + (peak - first) * epoch / warmup_epochs
        if schedule == "steps":
            return peak * milestone_factor ** sum(mark <= epoch for mark in milestones)
        if warmup_epochs == epochs:
            return peak
        if schedule == "cosine_per_epoch":
            # The warm-up may end within an epoch.
            epoch = max(math.floor(epoch), warmup_epochs)
        return last + (peak - last) * _half_cosine(epoch - warmup_epochs, epochs - warmup_epochs)
    if schedule not in ("cosine_steps", "cosine_inclusive", "cosine_unshifted"):
        raise ValueError(f"schedule={schedule!r}: is one of {get_args(Schedule)}")

    # Whole steps.
    warmup, total = steps or Steps(
        round(warmup_epochs * steps_per_epoch), max(1, round(epochs * steps_per_epoch))
    )
    if not 0 <= warmup <= total:
        raise ValueError(f"steps: warmup={warmup}: needs 0 <= warmup <= total={total}")
    if schedule == "cosine_unshifted":
        late = max(step - 1, 0)
        if late < warmup:
            return warmup_lr + (peak - warmup_lr) * late / warmup
        return final_lr + (peak - final_lr) * _half_cosine(min(late, total), total)
    inclusive = schedule == "cosine_inclusive"
    if step < warmup:
        if not inclusive:
            return peak * step / warmup
        return warmup_lr + (peak - warmup_lr) * step / max(1, warmup - 1)
    if warmup == total:
        return peak
    floor = final_lr if inclusive else 0.0
    return floor + (peak - floor) * _half_cosine(min(step, total) - warmup, total - warmup)


def run_learning_rate(step: int, config: Config, resolved: Resolved) -> float:
    """The learning rate of a step of a run, before the factors of parameter groups.

    Args:
        step: optimizer step from 0.
        config: its `optim`, `epochs` and `global_batch_size` make the schedule.
        resolved: the numbers of the run that depend on its images.
    """
    optim = config.optim
    return learning_rate(
        step,
        peak=config.peak_lr,
        epochs=config.epochs,
        warmup_epochs=optim.warmup_epochs,
        steps_per_epoch=resolved.steps_per_epoch,
        schedule=optim.schedule,
        warmup_lr=optim.warmup_lr,
        final_lr=optim.final_lr,
        steps=_run_steps(config, resolved),
        milestones=optim.milestones,
        milestone_factor=optim.milestone_factor,
    )


def weight_decay(step: int, *, first: float, last: float, total: int) -> float:
    """Half a cosine from `first` in step 0 to `last`, which the step after the run would have.

    `last + (first - last) * 0.5 * (1 + cos(pi * step / total))`; there is no warm-up.

    Args:
        step: optimizer step from 0.
        first: weight decay of step 0.
        last: weight decay at the end.
        total: steps of the run.
    """
    return last + (first - last) * _half_cosine(min(step, total), total)


def run_weight_decay(step: int, config: Config, resolved: Resolved) -> float | None:
    """The weight decay of a step of a run, before the factors of parameter groups; None where it is
    constant.

    Args:
        step: optimizer step from 0.
        config: of the run.
        resolved: the numbers of the run that depend on its images.
    """
    optim = config.optim
    if optim.final_weight_decay is None:
        return None
    return weight_decay(
        step,
        first=optim.weight_decay,
        last=optim.final_weight_decay,
        total=resolved.total_steps,
    )


def run_end(config: Config, resolved: Resolved) -> tuple[int, float]:
    """The step after which the schedule of a run is over, and the rate that it reaches there."""
    steps = _run_steps(config, resolved)
    last = steps.total if steps else max(1, round(config.epochs * resolved.steps_per_epoch))
    optim = config.optim
    if optim.schedule == "steps":
        passed = sum(mark < config.epochs for mark in optim.milestones)
        return last, config.peak_lr * optim.milestone_factor**passed
    if optim.schedule == "cosine_unshifted":
        last += 1  # one step late
    return last, optim.final_lr


def _run_steps(config: Config, resolved: Resolved) -> Steps | None:
    """The steps that SimCLR's schedule counts; None for the others, which follow the run's."""
    if config.optim.schedule != "cosine_steps":
        return None
    return simclr_steps(
        config.epochs,
        config.optim.warmup_epochs,
        sample_count=resolved.sample_count,
        global_batch_size=config.global_batch_size,
    )


def _half_cosine(done: float, whole: float) -> float:
    """From 1 to 0 over `whole`."""
    return 0.5 * (1.0 + math.cos(math.pi * done / whole))


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
