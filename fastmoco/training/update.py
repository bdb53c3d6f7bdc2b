"""The end of a step: what the schedule says, the weights move, and the twin is made ready for the next step.

Chen, Xie, He 2021 (Algorithm 1) average the twin inside a step, before its forward, from the encoder as it stands. Nothing
moves between one step's optimizer and that point of the next, so step t may as well end with the average of step t + 1,
at that step's momentum: the same operands, the same bits. That is where one sweep over memory can do both. Step 0 needs none:
it starts with the twin equal to the encoder, and the lerp form leaves what is equal alone. The last step ends without one.
"""

from __future__ import annotations

import torch

from fastmoco.config import Config, Resolved
from fastmoco.objectives.interface import Objective
from fastmoco.optim.schedule import ema_momentum, learning_rate
from fastmoco_kernels.adamw_ema.optimizer import AdamWEMA
from fastmoco_kernels.lars.optimizer import LARS


def scheduled(config: Config, resolved: Resolved, step: int) -> tuple[float, float]:
    """Learning rate and EMA momentum of one step: pure functions of it."""
    lr = learning_rate(
        step,
        peak=resolved.peak_lr,
        epochs=config.epochs,
        warmup_epochs=config.optim.warmup_epochs,
        steps_per_epoch=resolved.steps_per_epoch,
    )
    momentum = ema_momentum(
        step,
        start=config.objective.ema_momentum,
        epochs=config.epochs,
        steps_per_epoch=resolved.steps_per_epoch,
        schedule=config.objective.ema_schedule,
    )
    return lr, momentum


def update_weights(
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    next_ema_momentum: float | None,
    *,
    found_inf: torch.Tensor | None = None,
) -> None:
    """Take the optimizer's step, then move the twin for the next step: in one sweep where the optimizer can.

    Args:
        optimizer: over the objective's trainable parameters, which hold their gradients.
        objective: encoder, twin and predictor.
        next_ema_momentum: EMA momentum of the next step; None if this was the last.
        found_inf: one float32 on the device, 0 or 1; where it is 1, weights, twin and the optimizer's state stay as they are,
            its step counters among them. Our optimizers and torch's fused one leave that to the device; the host waits for
            the number for any other, which is apex's.
    """
    swept: frozenset[torch.Tensor] = frozenset()
    if isinstance(optimizer, AdamWEMA):
        optimizer.step(ema_momentum=next_ema_momentum, found_inf=found_inf)
        swept = frozenset(parameter for parameter in optimizer.averages if parameter.grad is not None)
    elif isinstance(optimizer, LARS):
        optimizer.step(found_inf=found_inf)
    elif isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["fused"]:
        optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # as torch.amp.GradScaler hands it over
        optimizer.step()
    elif found_inf is not None and bool(found_inf):
        return
    else:
        optimizer.step()
    if next_ema_momentum is None:
        return
    momentum: float | torch.Tensor = next_ema_momentum
    if found_inf is not None:
        # For what no sweep has moved; 1 keeps it. In float64, as the schedule is.
        kept = torch.full_like(found_inf, next_ema_momentum, dtype=torch.float64)
        momentum = kept.masked_fill_(found_inf > 0, 1.0)
    objective.update_momentum_encoder(momentum, done=swept)
