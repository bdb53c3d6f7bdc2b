"""MACRL on vision transformers: our numbers, and its recipes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from fastmoco.config import Config, DataConfig, ModelConfig, OptimConfig
from fastmoco.config.objective import require_ema
from fastmoco.recipes.expected import Expected, expects
from fastmoco.recipes.mae import MAEConfig, masked_view, plain_crops
from fastmoco.recipes.small import quickstart_digits, vit_nano7_e12_b256
from fastmoco_pipelines.spec import Resume, moco_v2_views, require


@dataclass(frozen=True, slots=True, kw_only=True)
class MACRLConfig(MAEConfig):
    """Two masks, absolute errors of pixels and a queue of keys: MACRL by its abstract, with numbers of
    our own. The hidden width of projector and predictor is `model.hidden_dim`."""

    kind: ClassVar[str] = "macrl"

    key_mask_ratio: Annotated[float, Resume.WITH_ALLOW] = 0.5
    """Share of the patches of the second view that the momentum encoder does not see."""
    contrast_weight: Annotated[float, Resume.WITH_ALLOW] = 1.0
    """Factor on the InfoNCE loss, which is added to that of the pixels."""
    temperature: Annotated[float, Resume.WITH_ALLOW] = 0.2
    """Softmax temperature of the InfoNCE loss."""
    ema_momentum: Annotated[float, Resume.WITH_ALLOW] = 0.99
    """Momentum of the momentum encoder at step 0."""
    ema_schedule: Annotated[Literal["cosine", "constant"], Resume.WITH_ALLOW] = "cosine"
    """`cosine` raises the momentum to 1 over the run."""
    queue: int = 4096
    """Keys of earlier batches, over all processes, that are the negatives of every query; a multiple
    of the global batch."""

    def __post_init__(self) -> None:
        MAEConfig.__post_init__(self)
        ratio, weight = self.key_mask_ratio, self.contrast_weight
        require(0 < ratio < 1, "key_mask_ratio", ratio, "must be above 0 and below 1")
        require(0 <= weight < math.inf, "contrast_weight", weight, "must be finite, not negative")
        require(self.temperature > 0, "temperature", self.temperature, "must be positive")
        require_ema(self.ema_momentum, self.ema_schedule)
        require(self.queue >= 1, "queue", self.queue, "must be at least 1")


@expects(
    Expected(
        linear=None,
        source="fastmoco's own choice",
        note="Only the abstract of the method is known, and no result on ImageNet.",
    )
)
def macrl_vit_s16_e300_b1024() -> Config:
    """MACRL with ViT-S/16 on ImageNet, 300 epochs, batch 1024: numbers of our own."""
    strong, _ = moco_v2_views()
    weak = masked_view()
    return Config(
        recipe="macrl_vit_s16_e300_b1024",
        epochs=300,
        global_batch_size=1024,
        model=ModelConfig(architecture="vit_small", pooling="norm_mean", freeze_patch_embed=False),
        objective=MACRLConfig(),
        optim=OptimConfig(lr=1.5e-4, weight_decay=0.05, betas=(0.9, 0.95), warmup_epochs=40),
        data=DataConfig(view1=replace(strong, interpolation=weak.interpolation), view2=weak),
    )


def macrl_digits() -> Config:
    """MACRL with a tiny ViT on 8x8 handwritten digits: a few minutes on two cores."""
    # A queue of 512 is a third of the set: of a longer one many keys are of the same images.
    return _small(quickstart_digits(), "macrl_digits", queue=512)


def macrl_nano7_e12_b256() -> Config:
    """MACRL with ViT-nano/7 on 28-pixel grey images such as Fashion-MNIST: ten minutes on two
    cores."""
    return _small(vit_nano7_e12_b256(), "macrl_nano7_e12_b256", queue=4096)


def _small(base: Config, recipe: str, *, queue: int) -> Config:
    """A small recipe of MoCo v3 with MACRL: crops and flips alone for the second view."""
    return replace(
        base,
        recipe=recipe,
        model=replace(base.model, pooling="norm_mean", freeze_patch_embed=False),
        objective=MACRLConfig(decoder_width=32, decoder_depth=1, decoder_heads=4, queue=queue),
        optim=replace(base.optim, betas=(0.9, 0.95)),
        data=replace(base.data, view2=plain_crops(base.data.view2)),
    )
