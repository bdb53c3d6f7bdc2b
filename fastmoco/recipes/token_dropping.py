"""MoCo v3 whose encoder trains on a part of the tokens: fewer FLOPs for the same number of images.

The shares are those of FLIP (Li et al. 2023); no result of MoCo v3 with them is published.
"""

from __future__ import annotations

from dataclasses import replace

from fastmoco.config import Config
from fastmoco.recipes.expected import Expected, expects
from fastmoco.recipes.moco_v3 import vit_s16_e300_b4096
from fastmoco.recipes.small import quickstart_digits, vit_nano7_e12_b256

NOTE = "No result of MoCo v3 with half of the tokens is published."


@expects(Expected(linear=None, source="ViT-S/16 with all tokens", note=NOTE))
def vit_s16_e300_b4096_drop50() -> Config:
    """ViT-S/16 on ImageNet, 300 epochs, batch 4096, half of the tokens in the first 95 % of it."""
    return _dropping(vit_s16_e300_b4096(), "vit_s16_e300_b4096_drop50")


def vit_nano7_e12_b256_drop50() -> Config:
    """ViT-nano/7 on 28-pixel grey images such as Fashion-MNIST, half of the tokens."""
    return _dropping(vit_nano7_e12_b256(), "vit_nano7_e12_b256_drop50")


def digits_drop50() -> Config:
    """A tiny ViT on 8x8 handwritten digits, half of the tokens: a few minutes on two cores."""
    return _dropping(quickstart_digits(), "digits_drop50")


def _dropping(config: Config, recipe: str) -> Config:
    """A recipe with half of the tokens, and all of them in the last 5 % of the run."""
    return replace(config, recipe=recipe, model=replace(config.model, keep_tokens="0.5"))
