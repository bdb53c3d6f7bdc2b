"""MoCo v3 with an average of the projector alone: its numbers, and its recipes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from fastmoco.config import Config, ObjectiveConfig
from fastmoco.config.objective import Keys, require_ema, require_keys
from fastmoco.recipes.expected import Expected, expects
from fastmoco.recipes.moco_v3 import vit_b16_e300_b4096, vit_s16_e300_b4096
from fastmoco.recipes.small import quickstart_digits, vit_nano7_e12_b256
from fastmoco_pipelines.spec import Resume, require


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectorMomentumConfig(ObjectiveConfig):
    """The loss of MoCo v3 with a momentum average of the projector alone (Pham et al. 2022)."""

    kind: ClassVar[str] = "projector_momentum"

    temperature: Annotated[float, Resume.WITH_ALLOW] = 0.2
    """Softmax temperature of the InfoNCE loss."""
    ema_momentum: Annotated[float, Resume.WITH_ALLOW] = 0.99
    """Momentum of the projector's average at step 0."""
    ema_schedule: Annotated[Literal["cosine", "constant"], Resume.WITH_ALLOW] = "cosine"
    """`cosine` raises the momentum to 1 over the run."""
    keys: Annotated[Keys, Resume.FREE] = "auto"
    """How the keys of other processes come to the loss: `gathered`, in a `ring`, or `auto`, as for
    MoCo v3. Results differ by rounding only."""

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", self.temperature, "must be positive")
        require_ema(self.ema_momentum, self.ema_schedule)
        require_keys(self.keys)


OWN = Expected(
    linear=None,
    source="MoCo v3",
    note="The paper of the method has no code, and fastmoco's composition no published accuracy.",
)


@expects(OWN)
def projector_momentum_vit_s16_e300_b4096() -> Config:
    """MoCo v3 with an average of the projector alone, ViT-S/16 on ImageNet, 300 epochs, batch
    4096: all numbers of MoCo v3."""
    return _on(vit_s16_e300_b4096(), "projector_momentum_vit_s16_e300_b4096")


@expects(OWN)
def projector_momentum_vit_b16_e300_b4096() -> Config:
    """MoCo v3 with an average of the projector alone, ViT-B/16 on ImageNet, 300 epochs, batch
    4096: all numbers of MoCo v3."""
    return _on(vit_b16_e300_b4096(), "projector_momentum_vit_b16_e300_b4096")


def projector_momentum_digits() -> Config:
    """MoCo v3 with an average of the projector alone and a tiny ViT, on 8x8 handwritten digits: a
    few minutes on two cores."""
    return _on(quickstart_digits(), "projector_momentum_digits", ema_momentum=0.97)


def projector_momentum_nano7_e12_b256() -> Config:
    """MoCo v3 with an average of the projector alone and ViT-nano/7, on 28-pixel grey images such
    as Fashion-MNIST: ten minutes on two cores."""
    return _on(vit_nano7_e12_b256(), "projector_momentum_nano7_e12_b256")


def _on(base: Config, recipe: str, *, ema_momentum: float = 0.99) -> Config:
    """A recipe of MoCo v3 with an average of the projector alone."""
    objective = ProjectorMomentumConfig(ema_momentum=ema_momentum)
    return replace(base, recipe=recipe, objective=objective)
