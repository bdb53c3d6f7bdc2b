"""Configs of objectives: the base class, and MoCo v3, which is the default.

The config of any other objective is in `fastmoco/recipes/<kind>.py`, beside its recipes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args

from fastmoco_pipelines.spec import Resume, require

Keys = Literal["auto", "gathered", "ring"]
"""How the keys of other processes come to a loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig:
    """Base class of the configs of objectives; a subclass sets its `kind`, as JSON spells it."""

    kind: ClassVar[str] = ""
    kinds: ClassVar[dict[str, type[Any]]] = {}
    """Every subclass that has been defined, by kind."""
    evaluated: ClassVar[str] = "encoder"
    """The network that is evaluated and exported: "encoder", or "momentum_encoder"."""
    masked: ClassVar[bool] = False
    """Whether the encoder learns from patches that are hidden. Its class token is then trained by
    little or nothing, so fine-tuning reads the mean of the patch tokens."""

    def __init_subclass__(cls) -> None:
        ObjectiveConfig.kinds[cls.kind] = cls

    @property
    def label_count(self) -> int | None:
        """Classes of the labels that the training images must have; None: it needs no labels, 0:
        as many as the training set has."""
        return None

    def schedule_notes(self, epochs: float, total_steps: int) -> list[str]:
        """A sentence about each schedule of this objective that a run of this length leaves
        unfinished."""
        return []


@dataclass(frozen=True, slots=True, kw_only=True)
class MoCoV3Config(ObjectiveConfig):
    """The loss and the momentum encoder of MoCo v3."""

    kind: ClassVar[str] = "moco_v3"

    temperature: Annotated[float, Resume.WITH_ALLOW] = 0.2
    """Softmax temperature of the InfoNCE loss: 0.2 for ViT, 1.0 for ResNet-50."""
    ema_momentum: Annotated[float, Resume.WITH_ALLOW] = 0.99
    """Momentum of the momentum encoder at step 0."""
    ema_schedule: Annotated[Literal["cosine", "constant"], Resume.WITH_ALLOW] = "cosine"
    """`cosine` raises the momentum to 1 over the run, as every official recipe does."""
    predictor: bool = True
    """Whether the queries pass a predictor after the projector."""
    head_norm: bool = True
    """Whether projector and predictor have batch norms. Without them they are linear layers and
    ReLUs."""
    keys: Annotated[Keys, Resume.FREE] = "auto"
    """How the keys of other processes come to the loss. `gathered`: all at once. `ring`: in blocks
    from the neighbour, of which a process holds three, so that memory does not grow with the number
    of processes. `auto`: gathered, unless they would take more than 5 % of the free memory. Results
    differ by rounding only."""

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", self.temperature, "must be positive")
        require_ema(self.ema_momentum, self.ema_schedule)
        require_keys(self.keys)


def require_keys(keys: str) -> None:
    """Refuse an unknown way of keys.

    Raises:
        ValueError: naming the field.
    """
    require(keys in get_args(Keys), "keys", keys, "must be auto, gathered or ring")


def require_ema(momentum: float, schedule: str) -> None:
    """Refuse invalid settings of a momentum encoder.

    Raises:
        ValueError: naming the field.
    """
    require(0 <= momentum <= 1, "ema_momentum", momentum, "must be in [0, 1]")
    require(
        schedule in ("cosine", "constant"), "ema_schedule", schedule, "must be cosine or constant"
    )
