"""SupMAE on vision transformers: its numbers, and its recipes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from fastmoco.config import Config
from fastmoco.recipes.expected import RELEASE, Expected, expects
from fastmoco.recipes.mae import MAEConfig, mae_vit_b16_e800_b4096, small
from fastmoco.recipes.small import quickstart_digits, vit_nano7_e12_b256
from fastmoco_pipelines.spec import Resume, require


@dataclass(frozen=True, slots=True, kw_only=True)
class SupMAEConfig(MAEConfig):
    """MAE with a branch that learns the classes of the images (Liang et al. 2022). The hidden width
    of the branch is `model.hidden_dim`."""

    kind: ClassVar[str] = "supmae"

    decoder_depth: int = 1
    """Blocks of the decoder."""
    classes: int = 0
    """Classes of the branch; 0: those of the training set."""
    class_weight: Annotated[float, Resume.WITH_ALLOW] = 0.01
    """Factor on the cross entropy, which is added to the loss of MAE."""
    class_temperature: Annotated[float, Resume.WITH_ALLOW] = 10.0
    """What logits are divided by."""

    def __post_init__(self) -> None:
        MAEConfig.__post_init__(self)
        classes, weight, temperature = self.classes, self.class_weight, self.class_temperature
        rule = "must be at least 2, or 0 for those of the training set"
        require(classes == 0 or classes >= 2, "classes", classes, rule)
        require(0 <= weight < math.inf, "class_weight", weight, "must be finite, not negative")
        known = 0 < temperature < math.inf
        require(known, "class_temperature", temperature, "must be finite and positive")

    @property
    def label_count(self) -> int | None:
        """Classes of the labels that the training images must have; 0: as many as there are."""
        return self.classes


@expects(
    Expected(
        linear=None,
        source=RELEASE,
        note="Fine-tuned, that release has 83.6 %.",
    )
)
def supmae_vit_b16_e400_b2048() -> Config:
    """SupMAE with ViT-B/16 on ImageNet with labels, 400 epochs, batch 2048: the numbers of the
    official code."""
    base = mae_vit_b16_e800_b4096()
    return replace(
        base,
        recipe="supmae_vit_b16_e400_b2048",
        epochs=400,
        global_batch_size=2048,
        model=replace(base.model, hidden_dim=3072),
        objective=SupMAEConfig(),
        optim=replace(base.optim, warmup_epochs=20),
    )


def supmae_digits() -> Config:
    """SupMAE with a tiny ViT on 8x8 handwritten digits with labels: a few minutes on two cores."""
    return small(quickstart_digits(), "supmae_digits", SupMAEConfig)


def supmae_nano7_e12_b256() -> Config:
    """SupMAE with ViT-nano/7 on 28-pixel grey images with labels: minutes on two cores."""
    return small(vit_nano7_e12_b256(), "supmae_nano7_e12_b256", SupMAEConfig)
