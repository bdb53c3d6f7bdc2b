"""BYOL on vision transformers and ResNet-50: its numbers, and its recipes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from fastmoco.config import Config, ModelConfig, ObjectiveConfig, OptimConfig
from fastmoco.config.objective import require_ema
from fastmoco.recipes.expected import ON_VIT, PAPER, Expected, expects
from fastmoco.recipes.moco_v3 import vit_b16_e300_b4096, vit_s16_e300_b4096
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


@expects(Expected(linear=71.0, source=PAPER, note=ON_VIT))
def byol_vit_s16_e300_b4096() -> Config:
    """BYOL with ViT-S/16 on ImageNet, 300 epochs, batch 4096: schedule, heads and views of MoCo
    v3."""
    return _vit(vit_s16_e300_b4096(), "byol_vit_s16_e300_b4096")


@expects(Expected(linear=73.9, source=PAPER, note=ON_VIT))
def byol_vit_b16_e300_b4096() -> Config:
    """BYOL with ViT-B/16 on ImageNet, 300 epochs, batch 4096: schedule, heads and views of MoCo
    v3."""
    return _vit(vit_b16_e300_b4096(), "byol_vit_b16_e300_b4096")


@expects(
    Expected(
        linear=74.3,
        source=PAPER,
        hardware="512 TPU v3 cores, 8 hours",
        note="The official release reports 74.0 to 74.5 %. It resizes by bicubic interpolation and "
        "adds to the brightness, where fastmoco is bilinear with antialiasing and multiplies.",
    )
)
def byol_r50_e1000_b4096() -> Config:
    """BYOL with ResNet-50 on ImageNet, 1000 epochs, batch 4096: heads, LARS and momentum of the
    official code."""
    return Config(
        recipe="byol_r50_e1000_b4096",
        epochs=1000,
        global_batch_size=4096,
        model=ModelConfig(architecture="resnet50"),
        objective=BYOLConfig(ema_momentum=0.996),
        optim=OptimConfig(name="lars", lr=0.2, weight_decay=1.5e-6, warmup_epochs=10),
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


def _vit(base: Config, recipe: str) -> Config:
    """A recipe of MoCo v3 with BYOL, and the learning rate and weight decay of its paper for it."""
    optim = replace(base.optim, lr=1e-4, weight_decay=0.03)
    return replace(base, recipe=recipe, objective=BYOLConfig(), optim=optim)
