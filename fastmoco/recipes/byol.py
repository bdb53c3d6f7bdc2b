"""BYOL on vision transformers: its numbers, and its recipes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from fastmoco.config import Config, ObjectiveConfig
from fastmoco.config.objective import require_ema
from fastmoco.recipes.moco_v3 import vit_s16_e300_b4096
from fastmoco.recipes.small import quickstart_digits, vit_nano7_e12_b256
from fastmoco_pipelines.spec import Resume


@dataclass(frozen=True, slots=True, kw_only=True)
class BYOLConfig(ObjectiveConfig):
    """The heads and the momentum encoder of BYOL (Grill et al. 2020), wired as MoCo v3."""

    kind: ClassVar[str] = "byol"

    ema_momentum: Annotated[float, Resume.WITH_ALLOW] = 0.99
    """Momentum of the momentum encoder's average at step 0: 0.99 for 300 epochs, 0.996 for 1000."""
    ema_schedule: Annotated[Literal["cosine", "constant"], Resume.WITH_ALLOW] = "cosine"
    """`cosine` lets the momentum rise to 1 over the run."""
    last_norm: bool = True
    """Whether a batch norm ends projector and predictor of a ViT, as in MoCo v3; BYOL itself has
    none there. The heads on a ResNet are those of BYOL itself."""

    def __post_init__(self) -> None:
        require_ema(self.ema_momentum, self.ema_schedule)


def byol_vit_s16_e300_b4096() -> Config:
    """BYOL with ViT-S/16 on ImageNet, 300 epochs, batch 4096: schedule, heads and views of MoCo
    v3."""
    base = vit_s16_e300_b4096()
    return replace(
        base,
        recipe="byol_vit_s16_e300_b4096",
        objective=BYOLConfig(),
        optim=replace(base.optim, lr=1e-4, weight_decay=0.03),
    )


def byol_digits() -> Config:
    """BYOL with a tiny ViT on 8x8 handwritten digits: a few minutes on two cores."""
    base = quickstart_digits()
    return replace(base, recipe="byol_digits", objective=BYOLConfig(ema_momentum=0.97))


def byol_nano7_e12_b256() -> Config:
    """BYOL with ViT-nano/7 on 28-pixel grey images such as Fashion-MNIST: ten minutes on two
    cores."""
    base = vit_nano7_e12_b256()
    objective = BYOLConfig(ema_momentum=0.97)
    return replace(base, recipe="byol_nano7_e12_b256", objective=objective)
