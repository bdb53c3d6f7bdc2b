"""CMAE on vision transformers: its numbers, and its recipes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from fastmoco.config import Config, DataConfig, ModelConfig, OptimConfig
from fastmoco.config.objective import require_ema
from fastmoco.recipes.expected import RELEASE, Expected, expects
from fastmoco.recipes.mae import MAEConfig, plain_crops
from fastmoco.recipes.small import quickstart_digits, vit_nano7_e12_b256
from fastmoco_pipelines.spec import Resume, cmae_views, require


@dataclass(frozen=True, slots=True, kw_only=True)
class CMAEConfig(MAEConfig):
    """MAE with a decoder of features, whose mean is compared with a momentum encoder's (Huang et al.
    2023). The hidden width of projector and predictor is `model.hidden_dim`."""

    kind: ClassVar[str] = "cmae"

    mask_ratio: Annotated[float, Resume.WITH_ALLOW] = 0.65
    """Share of the blocks of 2 x 2 patches that the encoder does not see."""
    feature_decoder_depth: int = 2
    """Blocks of the decoder of features; its width and heads are those of the decoder of pixels."""
    temperature: Annotated[float, Resume.WITH_ALLOW] = 0.07
    """Softmax temperature of the InfoNCE loss."""
    ema_momentum: Annotated[float, Resume.WITH_ALLOW] = 0.996
    """Momentum of the momentum encoder at step 0."""
    ema_schedule: Annotated[Literal["cosine", "constant"], Resume.WITH_ALLOW] = "constant"
    """`constant` keeps the momentum, as every official config does; `cosine` raises it to 1."""

    def __post_init__(self) -> None:
        MAEConfig.__post_init__(self)
        depth = self.feature_decoder_depth
        require(depth >= 1, "feature_decoder_depth", depth, "must be at least 1")
        require(self.temperature > 0, "temperature", self.temperature, "must be positive")
        require_ema(self.ema_momentum, self.ema_schedule)


@expects(
    Expected(
        linear=None,
        source=f"{RELEASE} of CMAE",
        note="Fine-tuned, that release has 83.8 %.",
    )
)
def cmae_vit_b16_e300_b4096() -> Config:
    """CMAE with ViT-B/16 on ImageNet, 300 epochs, batch 4096: the numbers of the official code."""
    view1, view2 = cmae_views()
    return Config(
        recipe="cmae_vit_b16_e300_b4096",
        epochs=300,
        global_batch_size=4096,
        model=ModelConfig(architecture="vit_base", hidden_dim=1536, freeze_patch_embed=False),
        objective=CMAEConfig(),
        optim=OptimConfig(
            lr=1.5e-4, weight_decay=0.05, betas=(0.9, 0.95), warmup_epochs=40, warmup_lr=2.4e-7
        ),
        data=DataConfig(view1=view1, view2=view2),
    )


@expects(
    Expected(
        linear=None,
        source=f"{RELEASE} of CMAE",
        note="Its fine-tuned accuracy is published for 300 and 1600 epochs.",
    )
)
def cmae_vit_b16_e800_b4096() -> Config:
    """CMAE with ViT-B/16 on ImageNet, 800 epochs, batch 4096: the numbers of the official code."""
    return replace(cmae_vit_b16_e300_b4096(), recipe="cmae_vit_b16_e800_b4096", epochs=800)


@expects(
    Expected(
        linear=None,
        source=f"{RELEASE} of CMAE",
        note="Fine-tuned, that release has 84.7 %.",
    )
)
def cmae_vit_b16_e1600_b4096() -> Config:
    """CMAE with ViT-B/16 on ImageNet, 1600 epochs, batch 4096: the numbers of the official code."""
    return replace(cmae_vit_b16_e300_b4096(), recipe="cmae_vit_b16_e1600_b4096", epochs=1600)


def cmae_digits() -> Config:
    """CMAE with a tiny ViT on 8x8 handwritten digits: a few minutes on two cores."""
    return _small(quickstart_digits(), "cmae_digits")


def cmae_nano7_e12_b256() -> Config:
    """CMAE with ViT-nano/7 on 28-pixel grey images such as Fashion-MNIST: ten minutes on two
    cores."""
    return _small(vit_nano7_e12_b256(), "cmae_nano7_e12_b256")


def _small(base: Config, recipe: str) -> Config:
    """A small recipe of MoCo v3 with CMAE, its colors for the second view alone. Four blocks of 2 x 2
    patches leave half as the ratio nearest to 0.65 that shows two of them, and a run of minutes
    needs a faster average."""
    _, shifted = cmae_views(base.model.image_size)
    view = replace(base.data.view1, base_size=shifted.base_size)
    return replace(
        base,
        recipe=recipe,
        model=replace(base.model, freeze_patch_embed=False),
        objective=CMAEConfig(
            mask_ratio=0.5,
            ema_momentum=0.99,
            decoder_width=32,
            decoder_depth=1,
            decoder_heads=4,
            feature_decoder_depth=1,
        ),
        optim=replace(base.optim, betas=(0.9, 0.95)),
        data=replace(
            base.data,
            view1=plain_crops(view),
            view2=replace(view, shares_crop=True, shift=shifted.shift),
        ),
    )
