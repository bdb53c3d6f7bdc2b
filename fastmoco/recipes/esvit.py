"""EsViT on Swin-T: its numbers, and its recipes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastmoco.config import Config, ModelConfig
from fastmoco.recipes.dino import DINOConfig, official, small
from fastmoco.recipes.expected import RELEASE, Expected, expects
from fastmoco.recipes.small import quickstart_digits, vit_nano7_e12_b256

RELEASE_OF_ESVIT = f"{RELEASE} of EsViT"


@dataclass(frozen=True, slots=True, kw_only=True)
class EsViTConfig(DINOConfig):
    """EsViT (Li et al. 2022): DINO, and the same task between matched regions of the crops."""

    kind: ClassVar[str] = "esvit"

    region: bool = True
    """Whether regions are compared too, with half of the weight. Without them the loss is DINO's,
    and the encoder may be of any kind."""


@expects(
    Expected(
        linear=78.0,
        source=RELEASE_OF_ESVIT,
        hardware="16 GPUs",
        note="k-NN 75.7 %, both of the momentum encoder. Its probe reads four blocks.",
    )
)
def esvit_swin_t4_e300_b512() -> Config:
    """EsViT with Swin-T, windows of 7, on ImageNet, 300 epochs, batch 512: two crops of 224 pixels
    and eight of 96."""
    return _swin_t4("esvit_swin_t4_e300_b512", region=True)


@expects(
    Expected(
        linear=77.0,
        source=RELEASE_OF_ESVIT,
        hardware="16 GPUs",
        note="k-NN 74.2 %, both of the momentum encoder. Its probe reads four blocks.",
    )
)
def esvit_view_swin_t4_e300_b512() -> Config:
    """EsViT without its regions, which is DINO with Swin-T."""
    return _swin_t4("esvit_view_swin_t4_e300_b512", region=False)


def _swin_t4(recipe: str, *, region: bool) -> Config:
    """What the official runs on Swin-T share."""
    own = EsViTConfig(
        region=region, teacher_temperature=0.07, teacher_warmup_epochs=30, train_last_norm=True
    )
    model = ModelConfig(architecture="swin_tiny", norm_eps=1e-6, drop_path=0.1, hidden_dim=2048)
    return official(recipe, own, model, epochs=300, batch=512)


def esvit_digits() -> Config:
    """EsViT with a tiny ViT on 8x8 handwritten digits: a few minutes on two cores."""
    base = quickstart_digits()
    return small(base, "esvit_digits", EsViTConfig, lr=base.optim.lr)


def esvit_nano7_e12_b256() -> Config:
    """EsViT with ViT-nano/7 on 28-pixel grey images such as Fashion-MNIST: ten minutes on two
    cores."""
    return small(vit_nano7_e12_b256(), "esvit_nano7_e12_b256", EsViTConfig, lr=4e-3)
