"""SDSSL on MoCo v3, BYOL and SimCLR: its numbers, and its recipes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, get_args

from fastmoco.config import Config, ObjectiveConfig, OptimConfig
from fastmoco.config.objective import require_ema
from fastmoco.recipes.expected import Expected, expects
from fastmoco.recipes.moco_v3 import vit_b16_e300_b4096, vit_s16_e300_b1024
from fastmoco.recipes.small import quickstart_digits, vit_nano7_e12_b256
from fastmoco_pipelines.spec import Resume, require

Base = Literal["moco_v3", "byol", "simclr"]
"""The methods that SDSSL extends."""
UNKNOWN = Expected(
    linear=None,
    source="the official code of SDSSL",
    hardware="8 GPUs of 128 images each",
    note="It publishes its accuracies as an image.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SDSSLConfig(ObjectiveConfig):
    """SDSSL (Jang et al. 2023): every block of a ViT learns from the last one."""

    kind: ClassVar[str] = "sdssl"

    on: Base = "moco_v3"
    """The method that it extends."""
    temperature: Annotated[float, Resume.WITH_ALLOW] = 0.2
    """Softmax temperature of `moco_v3` and `simclr`."""
    ratio: Annotated[float, Resume.WITH_ALLOW] = 1.0
    """Weight of the intermediate blocks at the end of the run, to which it rises from 0 by half a
    cosine: 1 for `moco_v3`, 0.8 for `byol` and `simclr`."""
    intermediate_hidden_dim: int = 0
    """Hidden width of the projectors of all blocks but the last, whose own is `model.hidden_dim`.
    0: half of that, 2048 in the official code."""
    ema_momentum: Annotated[float, Resume.WITH_ALLOW] = 0.996
    """Momentum of the momentum encoder at step 0; `simclr` has none."""
    ema_schedule: Annotated[Literal["cosine", "constant"], Resume.WITH_ALLOW] = "cosine"
    """`cosine` lets the momentum rise to 1 over the run."""
    local_gradient: Annotated[bool, Resume.WITH_ALLOW] = False
    """`simclr` on several processes: take the gradient of the official code, which leaves out what
    the losses of other processes say of a row. False: that of the global loss."""

    def __post_init__(self) -> None:
        kinds = get_args(Base)
        require(self.on in kinds, "on", self.on, f"must be one of {kinds}")
        require(self.temperature > 0, "temperature", self.temperature, "must be positive")
        require(self.ratio >= 0, "ratio", self.ratio, "must not be negative")
        width = self.intermediate_hidden_dim
        require(width >= 0, "intermediate_hidden_dim", width, "must not be negative")
        require_ema(self.ema_momentum, self.ema_schedule)
        local = self.local_gradient
        rule = "is a choice of on=simclr alone"
        require(not local or self.on == "simclr", "local_gradient", local, rule)


@expects(UNKNOWN)
def sdssl_vit_s16_e300_b1024() -> Config:
    """SDSSL on MoCo v3 with ViT-S/16 on ImageNet, 300 epochs, batch 1024."""
    return _official("sdssl_vit_s16_e300_b1024", vit_s16_e300_b1024(), "moco_v3")


@expects(UNKNOWN)
def sdssl_vit_b16_e300_b1024() -> Config:
    """SDSSL on MoCo v3 with ViT-B/16 on ImageNet, 300 epochs, batch 1024."""
    base = replace(vit_b16_e300_b4096(), global_batch_size=1024)
    return _official("sdssl_vit_b16_e300_b1024", base, "moco_v3")


@expects(UNKNOWN)
def sdssl_byol_vit_s16_e300_b1024() -> Config:
    """SDSSL on BYOL with ViT-S/16 on ImageNet, 300 epochs, batch 1024."""
    return _official("sdssl_byol_vit_s16_e300_b1024", vit_s16_e300_b1024(), "byol")


@expects(UNKNOWN)
def sdssl_simclr_vit_s16_e300_b1024() -> Config:
    """SDSSL on SimCLR with ViT-S/16 on ImageNet, 300 epochs, batch 1024."""
    return _official("sdssl_simclr_vit_s16_e300_b1024", vit_s16_e300_b1024(), "simclr", lr=1.3e-4)


def sdssl_digits() -> Config:
    """SDSSL on MoCo v3 with a tiny ViT on 8x8 handwritten digits: a few minutes on two cores."""
    return _small("sdssl_digits", quickstart_digits(), "moco_v3")


def sdssl_byol_digits() -> Config:
    """SDSSL on BYOL with a tiny ViT on 8x8 handwritten digits: a few minutes on two cores."""
    return _small("sdssl_byol_digits", quickstart_digits(), "byol")


def sdssl_simclr_digits() -> Config:
    """SDSSL on SimCLR with a tiny ViT on 8x8 handwritten digits: a few minutes on two cores."""
    return _small("sdssl_simclr_digits", quickstart_digits(), "simclr")


def sdssl_nano7_e12_b256() -> Config:
    """SDSSL on MoCo v3 with ViT-nano/7 on 28-pixel grey images such as Fashion-MNIST: ten minutes
    on two cores."""
    return _small("sdssl_nano7_e12_b256", vit_nano7_e12_b256(), "moco_v3")


def sdssl_byol_nano7_e12_b256() -> Config:
    """SDSSL on BYOL with ViT-nano/7 on 28-pixel grey images such as Fashion-MNIST: ten minutes on
    two cores."""
    return _small("sdssl_byol_nano7_e12_b256", vit_nano7_e12_b256(), "byol")


def sdssl_simclr_nano7_e12_b256() -> Config:
    """SDSSL on SimCLR with ViT-nano/7 on 28-pixel grey images such as Fashion-MNIST: ten minutes on
    two cores."""
    return _small("sdssl_simclr_nano7_e12_b256", vit_nano7_e12_b256(), "simclr")


def _small(recipe: str, base: Config, on: Base) -> Config:
    """A recipe for small images with SDSSL."""
    more: dict[str, Any] = {} if on == "moco_v3" else {"ratio": 0.8}
    return replace(base, recipe=recipe, objective=SDSSLConfig(on=on, ema_momentum=0.97, **more))


def _official(recipe: str, base: Config, on: Base, *, lr: float = 1.5e-4) -> Config:
    """The numbers of the official code: AdamW with a warm-up that reaches its peak, and views of
    MoCo v3."""
    more: dict[str, Any] = {} if on == "moco_v3" else {"ratio": 0.8}
    return replace(
        base,
        recipe=recipe,
        objective=SDSSLConfig(on=on, **more),
        optim=OptimConfig(lr=lr, schedule="cosine_inclusive"),
    )
