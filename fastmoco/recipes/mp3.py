"""MP3 on vision transformers: its numbers, which are fastmoco's choice, and its recipes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from fastmoco.config import Config, ModelConfig, ObjectiveConfig, OptimConfig
from fastmoco.recipes.expected import Expected, expects
from fastmoco.recipes.mae import masked_view, plain_crops
from fastmoco.recipes.small import quickstart_digits, vit_nano7_e12_b256
from fastmoco.recipes.supervised import one_view
from fastmoco_pipelines.spec import Resume, require


@dataclass(frozen=True, slots=True, kw_only=True)
class MP3Config(ObjectiveConfig):
    """The context of MP3 (Zhai et al. 2022)."""

    kind: ClassVar[str] = "mp3"

    mask_ratio: Annotated[float, Resume.WITH_ALLOW] = 0.75
    """Share of the patches that are not in the context: no patch attends to them, and their places
    are predicted like those of the others."""

    def __post_init__(self) -> None:
        ratio = self.mask_ratio
        require(0 < ratio < 1, "mask_ratio", ratio, "must be above 0 and below 1")


@expects(
    Expected(
        linear=None,
        source="MAE, fastmoco's choice",
        note="The paper's own numbers are not known here.",
    )
)
def mp3_vit_b16_e300_b4096() -> Config:
    """MP3 with ViT-B/16 on ImageNet, 300 epochs, batch 4096: the optimizer and views of MAE, which
    are fastmoco's choice."""
    return Config(
        recipe="mp3_vit_b16_e300_b4096",
        epochs=300,
        global_batch_size=4096,
        model=replace(_blind(ModelConfig()), architecture="vit_base"),
        objective=MP3Config(),
        optim=OptimConfig(lr=1.5e-4, weight_decay=0.05, betas=(0.9, 0.95), warmup_epochs=40),
        data=one_view(masked_view()),
    )


def mp3_digits() -> Config:
    """MP3 with a tiny ViT on 8x8 handwritten digits: a few minutes on two cores."""
    return _small(quickstart_digits(), "mp3_digits")


def mp3_nano7_e12_b256() -> Config:
    """MP3 with ViT-nano/7 on 28-pixel grey images such as Fashion-MNIST: minutes on two cores."""
    return _small(vit_nano7_e12_b256(), "mp3_nano7_e12_b256")


def _small(base: Config, recipe: str) -> Config:
    """A small recipe of MoCo v3 with MP3."""
    return replace(
        base,
        recipe=recipe,
        model=_blind(base.model),
        objective=MP3Config(),
        optim=replace(base.optim, betas=(0.9, 0.95)),
        data=one_view(plain_crops(base.data.view1)),
    )


def _blind(model: ModelConfig) -> ModelConfig:
    """The same encoder without positions and class token, all of which trains."""
    return replace(model, positions="none", pooling="norm_mean", freeze_patch_embed=False)
