"""MaskFeat on vision transformers: its numbers, and its recipes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, get_args

from fastmoco.config import Config, ModelConfig, ObjectiveConfig, OptimConfig
from fastmoco.recipes.expected import RELEASE, Expected, expects
from fastmoco.recipes.mae import plain_crops
from fastmoco.recipes.small import quickstart_digits, vit_nano7_e12_b256
from fastmoco.recipes.supervised import one_view
from fastmoco_pipelines.spec import Resume, ViewSpec, require

InitialWeights = Literal["maskfeat", "xavier"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskFeatConfig(ObjectiveConfig):
    """The masks and targets of MaskFeat (Wei et al. 2022)."""

    kind: ClassVar[str] = "maskfeat"
    masked: ClassVar[bool] = True

    mask_ratio: Annotated[float, Resume.WITH_ALLOW] = 0.4
    """Share of the patches that are masked in rectangles, at most: of 78 of 196 patches 77.5 are
    masked on average."""
    cell: int = 8
    """Pixels per side of a cell of the histograms of oriented gradients; a divisor of the patches."""
    initial_weights: InitialWeights = "maskfeat"
    """Initial weights of the encoder: `maskfeat` is normal with deviation 0.02, with biases of 0.02;
    `xavier` has the spread that a layer's width asks for, and positions of deviation 0.4, which
    narrow encoders need."""

    def __post_init__(self) -> None:
        ratio = self.mask_ratio
        require(0 < ratio < 1, "mask_ratio", ratio, "must be above 0 and below 1")
        require(self.cell >= 1, "cell", self.cell, "must be at least 1")
        value, known = self.initial_weights, get_args(InitialWeights)
        require(value in known, "initial_weights", value, f"must be one of {known}")


@expects(
    Expected(
        linear=None,
        source=RELEASE,
        note="Fine-tuned, that release has 84.0 %. Its file of settings has 300 epochs.",
    )
)
def maskfeat_vit_b16_e1600_b2048() -> Config:
    """MaskFeat with ViT-B/16 on ImageNet, 1600 epochs, batch 2048: the numbers of the official
    code."""
    view = ViewSpec(crop_scale=(0.5, 1.0), interpolation="bicubic")
    return Config(
        recipe="maskfeat_vit_b16_e1600_b2048",
        epochs=1600,
        global_batch_size=2048,
        precision="fp32",
        model=ModelConfig(architecture="vit_base", positions="learned", freeze_patch_embed=False),
        objective=MaskFeatConfig(),
        optim=OptimConfig(
            lr=2e-4,
            weight_decay=0.05,
            betas=(0.9, 0.999),
            warmup_epochs=30,
            warmup_lr=1e-6,
            final_lr=1e-6,
            clip_norm=0.02,
        ),
        data=one_view(plain_crops(view)),
    )


@expects(Expected(linear=None, source=RELEASE, note="Fine-tuned, that release has 85.7 %."))
def maskfeat_vit_l16_e1600_b2048() -> Config:
    """MaskFeat with ViT-L/16 on ImageNet, 1600 epochs, batch 2048: the numbers of the official
    code."""
    base = maskfeat_vit_b16_e1600_b2048()
    return replace(
        base,
        recipe="maskfeat_vit_l16_e1600_b2048",
        model=replace(base.model, architecture="vit_large"),
    )


def maskfeat_digits() -> Config:
    """MaskFeat with a tiny ViT on 8x8 handwritten digits: a few minutes on two cores."""
    return _small(quickstart_digits(), "maskfeat_digits", cell=2)


def maskfeat_nano7_e12_b256() -> Config:
    """MaskFeat with ViT-nano/7 on 28-pixel grey images such as Fashion-MNIST: minutes on two
    cores."""
    return _small(vit_nano7_e12_b256(), "maskfeat_nano7_e12_b256", cell=7)


def _small(base: Config, recipe: str, *, cell: int) -> Config:
    """A small recipe of MoCo v3 with MaskFeat, one cell a patch."""
    return replace(
        base,
        recipe=recipe,
        model=replace(base.model, positions="learned", freeze_patch_embed=False),
        objective=MaskFeatConfig(cell=cell, initial_weights="xavier"),
        optim=replace(base.optim, lr=5e-3, betas=(0.9, 0.999)),
        data=one_view(plain_crops(base.data.view1)),
    )
