"""MoBY on DeiT-S and Swin-T: its numbers, and its recipes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from fastmoco.config import Config, DataConfig, ModelConfig, ObjectiveConfig, OptimConfig
from fastmoco.config.objective import require_ema
from fastmoco.recipes.expected import RELEASE, Expected, expects
from fastmoco.recipes.small import quickstart_digits, vit_nano7_e12_b256
from fastmoco_pipelines.spec import Resume, require


@dataclass(frozen=True, slots=True, kw_only=True)
class MoBYConfig(ObjectiveConfig):
    """Temperature, queues and momentum encoder of MoBY (Xie et al. 2021)."""

    kind: ClassVar[str] = "moby"

    temperature: Annotated[float, Resume.WITH_ALLOW] = 0.2
    """Softmax temperature of the InfoNCE loss."""
    ema_momentum: Annotated[float, Resume.WITH_ALLOW] = 0.99
    """Momentum of the momentum encoder at step 0."""
    ema_schedule: Annotated[Literal["cosine", "constant"], Resume.WITH_ALLOW] = "cosine"
    """`cosine` raises the momentum to 1 over the run."""
    queue: int = 4096
    """Keys of earlier batches of either view, over all processes, that are the negatives of every
    query of the other view; a multiple of the global batch."""

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", self.temperature, "must be positive")
        require_ema(self.ema_momentum, self.ema_schedule)
        require(self.queue >= 1, "queue", self.queue, "must be at least 1")


@expects(Expected(linear=72.8, source=f"{RELEASE} of MoBY"))
def moby_deit_s16_e300_b512() -> Config:
    """MoBY with ViT-S/16 of 6 heads (DeiT-S) on ImageNet, 300 epochs, batch 512."""
    model = ModelConfig(
        architecture="deit_small", positions="learned", freeze_patch_embed=False, drop_path=0.2
    )
    return _e300_b512("moby_deit_s16_e300_b512", model)


@expects(Expected(linear=75.3, source=f"{RELEASE} of MoBY"))
def moby_swin_t4_e300_b512() -> Config:
    """MoBY with Swin-T, patches of 4 and windows of 7, on ImageNet, 300 epochs, batch 512."""
    model = ModelConfig(architecture="swin_tiny", drop_path=0.2)
    return _e300_b512("moby_swin_t4_e300_b512", model)


def _e300_b512(recipe: str, model: ModelConfig) -> Config:
    """What the official runs share; the views are those of MoCo v3."""
    return Config(
        recipe=recipe,
        epochs=300,
        global_batch_size=512,
        model=model,
        objective=MoBYConfig(),
        optim=OptimConfig(
            lr=5e-4,
            schedule="cosine_unshifted",
            warmup_lr=5e-7,
            final_lr=5e-6,
            warmup_epochs=5,
            weight_decay=0.05,
            clip_norm=5.0,
        ),
        data=DataConfig(),
    )


def moby_digits() -> Config:
    """MoBY with a tiny ViT on 8x8 handwritten digits: a few minutes on two cores."""
    # A queue of 512 is a third of the set: of a longer one many keys are of the same images.
    return _small(quickstart_digits(), "moby_digits", MoBYConfig(queue=512))


def moby_nano7_e12_b256() -> Config:
    """MoBY with ViT-nano/7 on 28-pixel grey images such as Fashion-MNIST: ten minutes on two
    cores."""
    return _small(vit_nano7_e12_b256(), "moby_nano7_e12_b256", MoBYConfig())


def _small(base: Config, recipe: str, objective: MoBYConfig) -> Config:
    """A recipe for small images with MoBY: trunk and views of the base."""
    return replace(base, recipe=recipe, objective=objective)
