"""DINO with small crops, on vision transformers: its numbers, and its recipes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from fastmoco.config import ObjectiveConfig
from fastmoco.config.objective import require_ema
from fastmoco_pipelines.spec import Resume, require


@dataclass(frozen=True, slots=True, kw_only=True)
class DINOConfig(ObjectiveConfig):
    """Last layer, temperatures, centre and momentum encoder of DINO (Caron et al. 2021)."""

    kind: ClassVar[str] = "dino"
    evaluated: ClassVar[str] = "momentum_encoder"

    prototypes: int = 65536
    """Outputs of the last layer."""
    temperature: Annotated[float, Resume.WITH_ALLOW] = 0.1
    """Softmax temperature of the encoder's outputs."""
    teacher_temperature: Annotated[float, Resume.WITH_ALLOW] = 0.04
    """Softmax temperature of the momentum encoder's outputs, after its warm-up; above 0.07 training
    is unstable."""
    teacher_temperature_start: Annotated[float, Resume.WITH_ALLOW] = 0.04
    """The same in the first epoch."""
    teacher_warmup_epochs: Annotated[int, Resume.WITH_ALLOW] = 0
    """Whole epochs in which that temperature rises linearly; it changes between epochs alone."""
    center_momentum: Annotated[float, Resume.WITH_ALLOW] = 0.9
    """Momentum of the centre, which is subtracted from the momentum encoder's outputs."""
    train_last_norm: bool = False
    """Whether the lengths of the last layer's rows are trained: better for ViT-S, less stable."""
    freeze_last_layer_epochs: Annotated[float, Resume.WITH_ALLOW] = 1.0
    """First epochs without an update of the last layer."""
    ema_momentum: Annotated[float, Resume.WITH_ALLOW] = 0.996
    """Momentum of the momentum encoder's average at step 0; 0.9995 for batches of 256."""
    ema_schedule: Annotated[Literal["cosine", "constant"], Resume.WITH_ALLOW] = "cosine"
    """`cosine` lets the momentum rise to 1 over the run."""

    def __post_init__(self) -> None:
        require(self.prototypes >= 2, "prototypes", self.prototypes, "must be at least 2")
        for name in ("temperature", "teacher_temperature", "teacher_temperature_start"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        for name in ("teacher_warmup_epochs", "freeze_last_layer_epochs"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        momentum = self.center_momentum
        require(0 <= momentum <= 1, "center_momentum", momentum, "must be in [0, 1]")
        require_ema(self.ema_momentum, self.ema_schedule)
