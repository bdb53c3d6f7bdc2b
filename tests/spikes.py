"""A small run of synthetic images, and gradient spikes in chosen steps of a run, which also occur
when it is continued.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch.distributed.tensor import DTensor

from fastmoco.config import CheckpointConfig
from fastmoco.config.faults import FaultConfig
from fastmoco.objectives import MoCoV3Output
from fastmoco.training.trainer import Trainer
from fastmoco_pipelines import Batch
from tests.distributed.run_trainer import CONFIG

EVERY, SPIKE, LOGGED, TOTAL = 4, 26, 27, 30
"""Steps 4, 8, ... are saved and every third is logged, so the spike of step 26 is seen after step
27, and the run goes back to 24. The median needs 20 steps before a norm can be a spike."""
ROLLING = replace(
    CONFIG,
    epochs=TOTAL / (1_281_167 // 16),
    log_every_steps=3,
    optim=replace(CONFIG.optim, fused_backend="fastmoco"),
    checkpoint=CheckpointConfig(every_steps=EVERY, every_minutes=1e6),
    faults=FaultConfig(rollback_spike=10),
)


def spike(trainer: Trainer, *numbers: int, factor: float = 1e4) -> Trainer:
    """Multiply the gradients of the given steps (the first is 1) by a factor,
    on this rank's part of them.
    """
    plain = trainer.step

    def step(batch: Batch, *, inspect: Callable[[], None] | None = None) -> MoCoV3Output:
        def spoil() -> None:
            for parameter in trainer.objective.parameters():
                if batch.step + 1 in numbers and parameter.grad is not None:
                    grad: Any = parameter.grad
                    (grad.to_local() if isinstance(grad, DTensor) else grad).mul_(factor)
            if inspect is not None:
                inspect()

        return plain(batch, inspect=spoil)

    trainer.step = step  # type: ignore[method-assign]
    return trainer


def skip(trainer: Trainer, first: int, last: int) -> None:
    """The run without steps `first` to `last`, the expected result of a rollback."""
    for number in range(1, TOTAL + 1):
        batch = trainer.loader.next()
        if first <= number <= last:
            trainer.step_count += 1
        else:
            trainer.step(batch)
