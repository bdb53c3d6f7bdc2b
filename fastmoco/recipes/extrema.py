"""ExtreMA on vision transformers: its numbers, and its recipes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from fastmoco.config import Config, DataConfig, ModelConfig, ObjectiveConfig, OptimConfig
from fastmoco.config.objective import require_ema
from fastmoco.recipes.expected import RELEASE, Expected, expects
from fastmoco.recipes.small import quickstart_digits, vit_nano7_e12_b256
from fastmoco_pipelines.spec import Resume, ViewSpec, extrema_views, require


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtreMAConfig(ObjectiveConfig):
    """Masks and momentum encoder of ExtreMA (Wu et al. 2022)."""

    kind: ClassVar[str] = "extrema"
    masked: ClassVar[bool] = True
    evaluated: ClassVar[str] = "momentum_encoder"

    mask_ratio: Annotated[float, Resume.WITH_ALLOW] = 0.8
    """Share of the patches of the first view that each mask hides."""
    masks: Annotated[int, Resume.WITH_ALLOW] = 5
    """Masks of an image in a step; no patch is seen under two of them."""
    layer_scale: float = 0.1
    """Start value of the factors of the branches of the class-attention blocks; 1e-5 for ViT-L."""
    ema_momentum: Annotated[float, Resume.WITH_ALLOW] = 0.996
    """Momentum of the momentum encoder at step 0."""
    ema_schedule: Annotated[Literal["cosine", "constant"], Resume.WITH_ALLOW] = "cosine"
    """`cosine` raises the momentum to 1 over the run."""

    def __post_init__(self) -> None:
        ratio = self.mask_ratio
        require(0 < ratio < 1, "mask_ratio", ratio, "must be above 0 and below 1")
        require(self.masks >= 1, "masks", self.masks, "must be at least 1")
        require(self.layer_scale > 0, "layer_scale", self.layer_scale, "must be positive")
        require_ema(self.ema_momentum, self.ema_schedule)


def two_colors(views: tuple[ViewSpec, ViewSpec]) -> DataConfig:
    """Data of two views that share their crop and differ in color."""
    return DataConfig(view1=views[0], view2=views[1])


@expects(
    Expected(
        linear=73.3,
        source=f"{RELEASE} of ExtreMA",
        hardware="8 V100 GPUs in 50 hours",
        note="Fine-tuned, that release has 83.7 %; without changes of color 67.1 % and 82.9 %.",
    )
)
def extrema_vit_b16_e300_b2048() -> Config:
    """ExtreMA with ViT-B/16 on ImageNet, 300 epochs, batch 2048, five masks of 80 %."""
    return Config(
        recipe="extrema_vit_b16_e300_b2048",
        epochs=300,
        global_batch_size=2048,
        model=ModelConfig(
            architecture="vit_base",
            pooling="class_attention",
            positions="sincos_columns",
            freeze_patch_embed=False,
            drop_path=0.1,
        ),
        objective=ExtreMAConfig(),
        optim=OptimConfig(lr=1.5e-4, weight_decay=0.1, betas=(0.9, 0.95), warmup_epochs=40),
        data=two_colors(extrema_views()),
    )


@expects(
    Expected(
        linear=68.4,
        source=f"{RELEASE} of ExtreMA",
        hardware="8 V100 GPUs in 46 hours",
        note="Fine-tuned, that release has 83.5 %.",
    )
)
def extrema_vit_b16_e300_b2048_m90() -> Config:
    """ExtreMA with ViT-B/16 on ImageNet, 300 epochs, batch 2048, eight masks of 90 %."""
    return replace(
        extrema_vit_b16_e300_b2048(),
        recipe="extrema_vit_b16_e300_b2048_m90",
        objective=ExtreMAConfig(mask_ratio=0.9, masks=8),
    )


def extrema_digits() -> Config:
    """ExtreMA with a tiny ViT on 8x8 handwritten digits: a few minutes on two cores."""
    # In longer runs kNN falls again: views that share their crop make the crop a feature.
    base = replace(quickstart_digits(), epochs=36)
    base = replace(base, knn=replace(base.knn, every_epochs=6))
    return _small(base, "extrema_digits", ExtreMAConfig(mask_ratio=0.5, masks=2))


def extrema_nano7_e12_b256() -> Config:
    """ExtreMA with ViT-nano/7 on 28-pixel grey images such as Fashion-MNIST: minutes on two
    cores."""
    config = ExtreMAConfig(mask_ratio=0.75, masks=4, ema_momentum=0.97)
    small = _small(vit_nano7_e12_b256(), "extrema_nano7_e12_b256", config)
    # Grey views that share their crop are too much alike without stronger changes.
    view = replace(small.data.view1, crop_scale=(0.2, 1.0), brightness=0.8, contrast=0.8)
    return replace(
        small,
        global_batch_size=256,
        optim=replace(small.optim, lr=1.5e-3, weight_decay=0.1),
        data=two_colors((view, replace(view, shares_crop=True))),
    )


def _small(base: Config, recipe: str, objective: ExtreMAConfig) -> Config:
    """A recipe for small images with ExtreMA: sizes, crops and colors of the base.

    Without batch norms only weight decay removes what all features have in common. A short run needs
    much of it, and many small steps.
    """
    return replace(
        base,
        recipe=recipe,
        global_batch_size=64,
        model=replace(
            base.model,
            pooling="class_attention",
            positions="sincos_columns",
            freeze_patch_embed=False,
        ),
        objective=objective,
        optim=OptimConfig(
            lr=4e-3, weight_decay=3.0, betas=(0.9, 0.95), warmup_epochs=base.epochs / 5
        ),
        data=two_colors((base.data.view1, replace(base.data.view1, shares_crop=True))),
    )
