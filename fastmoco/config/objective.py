"""The loss and the momentum encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from fastmoco_pipelines.spec import Resume, require


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig:
    """The loss and the twin."""

    temperature: Annotated[float, Resume.WITH_ALLOW] = 0.2
    """Softmax temperature of the InfoNCE loss: 0.2 for ViT, 1.0 for ResNet-50."""
    ema_momentum: Annotated[float, Resume.WITH_ALLOW] = 0.99
    """Momentum of the twin encoder's average at step 0."""
    ema_schedule: Annotated[Literal["cosine", "constant"], Resume.WITH_ALLOW] = "cosine"
    """``cosine`` lets the momentum rise to 1 over the run, as every official recipe does."""

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", self.temperature, "must be positive")
        require(0 <= self.ema_momentum <= 1, "ema_momentum", self.ema_momentum, "must lie in [0, 1]")
        require(
            self.ema_schedule in ("cosine", "constant"), "ema_schedule", self.ema_schedule, "must be cosine or constant"
        )
