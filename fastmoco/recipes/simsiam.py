"""SimSiam on ResNet-50 and vision transformers: its numbers, and its recipes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from fastmoco.config import Config, ModelConfig, ObjectiveConfig, OptimConfig
from fastmoco.recipes.expected import RELEASE, Expected, expects
from fastmoco.recipes.moco_v3 import vit_b16_e300_b4096, vit_s16_e300_b4096
from fastmoco.recipes.small import quickstart_digits, vit_nano7_e12_b256
from fastmoco_pipelines.spec import Resume, require, simsiam_views


@dataclass(frozen=True, slots=True, kw_only=True)
class SimSiamConfig(ObjectiveConfig):
    """The predictor of SimSiam (Chen, He 2021)."""

    kind: ClassVar[str] = "simsiam"

    predictor_hidden_dim: int = 0
    """Hidden width of the predictor; 0: a quarter of `model.projection_dim`, as in the paper."""
    fix_predictor_lr: Annotated[bool, Resume.WITH_ALLOW] = True
    """Whether the predictor keeps the peak learning rate in every step, also in a warm-up."""
    predictor_lr_scale: Annotated[float, Resume.WITH_ALLOW] = 1.0
    """Factor on the learning rate of the predictor; 1 in the official code. About 10 steadies small
    encoders, which have no momentum encoder either: the predictor then follows what it predicts."""

    def __post_init__(self) -> None:
        width = self.predictor_hidden_dim
        require(width >= 0, "predictor_hidden_dim", width, "must not be negative")
        scale = self.predictor_lr_scale
        require(0 <= scale < math.inf, "predictor_lr_scale", scale, "must be finite, not negative")


@expects(
    Expected(
        linear=68.1,
        source=RELEASE,
        hardware="8 V100 GPUs",
        note="At batch 256 that release has 68.3 %.",
    )
)
def simsiam_r50_e100_b512() -> Config:
    """SimSiam with ResNet-50 on ImageNet, 100 epochs, batch 512: views, heads, SGD and schedule of
    the official code, with the constant learning rate of the predictor."""
    view1, view2 = simsiam_views()
    return Config(
        recipe="simsiam_r50_e100_b512",
        epochs=100,
        global_batch_size=512,
        model=ModelConfig(architecture="resnet50", hidden_dim=2048, projection_dim=2048),
        objective=SimSiamConfig(predictor_hidden_dim=512),
        optim=OptimConfig(
            name="sgd",
            lr=0.05,
            schedule="cosine_per_epoch",
            warmup_epochs=0,
            weight_decay=1e-4,
        ),
        data=replace(vit_s16_e300_b4096().data, view1=view1, view2=view2),
    )


NO_VIT = Expected(linear=None, source="MoCo v3", note="SimSiam has no official numbers on a ViT.")


@expects(NO_VIT)
def simsiam_vit_s16_e300_b4096() -> Config:
    """SimSiam with ViT-S/16 on ImageNet, 300 epochs, batch 4096: projector, views and schedule of
    MoCo v3, and SimSiam's predictor."""
    return _on(vit_s16_e300_b4096(), "simsiam_vit_s16_e300_b4096")


@expects(NO_VIT)
def simsiam_vit_b16_e300_b4096() -> Config:
    """SimSiam with ViT-B/16 on ImageNet, 300 epochs, batch 4096: projector, views and schedule of
    MoCo v3, and SimSiam's predictor."""
    return _on(vit_b16_e300_b4096(), "simsiam_vit_b16_e300_b4096")


def simsiam_digits() -> Config:
    """SimSiam with a tiny ViT on 8x8 handwritten digits: a few minutes on two cores."""
    return _on(quickstart_digits(), "simsiam_digits")


def simsiam_nano7_e12_b256() -> Config:
    """SimSiam with ViT-nano/7 on 28-pixel grey images such as Fashion-MNIST: ten minutes on two
    cores."""
    config = _on(vit_nano7_e12_b256(), "simsiam_nano7_e12_b256")
    # With one rate for all, kNN gains half as much in the first 400 steps, and dips.
    return replace(
        config,
        objective=SimSiamConfig(predictor_lr_scale=10),
        optim=replace(config.optim, lr=1e-3),
    )


def _on(base: Config, recipe: str) -> Config:
    """A recipe of MoCo v3 with SimSiam."""
    return replace(base, recipe=recipe, objective=SimSiamConfig())
