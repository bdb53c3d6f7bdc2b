"""A small run of synthetic images, and gradient spikes in chosen steps of a run, which also occur
when it is continued.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.distributed.tensor import DTensor

from fastmoco.config import CheckpointConfig
from fastmoco.config.faults import FaultConfig
from fastmoco.objectives import Output
from fastmoco.objectives.interface import Progress
from fastmoco.training.trainer import Trainer
from tests.distributed.run_trainer import CONFIG

EVERY, SPIKE, LOGGED, TOTAL = 4, 26, 27, 30
"""Steps 4, 8, ... are saved and every third is logged, so the spike of step 26 is seen after step
27, and the run goes back to 24. The median needs 20 steps before a norm can be a spike."""
IMAGES = 8
ROLLING = replace(
    CONFIG,
    epochs=TOTAL / (1_281_167 // IMAGES),
    global_batch_size=IMAGES,
    log_every_steps=3,
    optim=replace(CONFIG.optim, fused_backend="fastmoco"),
    checkpoint=CheckpointConfig(every_steps=EVERY, every_minutes=1e6),
    faults=FaultConfig(rollback_spike=10),
)


def spike(trainer: Trainer, *numbers: int, factor: float = 1e4) -> Trainer:
    """Multiply the gradients of the given steps (the first is 1) by a factor, on this rank's
    part."""
    plain = trainer.train_step.forward_backward

    def forward_backward(*views: Any, at: Progress, **options: Any) -> Output:
        output = plain(*views, at=at, **options)
        for parameter in trainer.objective.parameters():
            if at.step + 1 in numbers and parameter.grad is not None:
                grad: Any = parameter.grad
                (grad.to_local() if isinstance(grad, DTensor) else grad).mul_(factor)
        return output

    trainer.train_step.forward_backward = forward_backward
    return trainer


def skip(trainer: Trainer, first: int, last: int) -> None:
    """The run without steps `first` to `last`, the expected result of a rollback."""
    for number in range(1, TOTAL + 1):
        batch = trainer.loader.next()
        if first <= number <= last:
            trainer.step_count += 1
        else:
            trainer.step(batch)
