"""MoCo v3 on ImageNet, with the official numbers."""

from __future__ import annotations

from dataclasses import replace

from fastmoco.config import Config, ModelConfig


def vit_s16_e300_b4096() -> Config:
    """ViT-S/16 on ImageNet, 300 epochs, batch 4096: 73.2 % linear top-1 in the official release."""
    return Config(recipe="vit_s16_e300_b4096")


def vit_s16_e300_b1024() -> Config:
    """ViT-S/16 on ImageNet, 300 epochs, batch 1024: the official single-node set-up."""
    return replace(vit_s16_e300_b4096(), recipe="vit_s16_e300_b1024", global_batch_size=1024)


def vit_b16_e300_b4096() -> Config:
    """ViT-B/16 on ImageNet, 300 epochs, batch 4096: 76.7 % linear top-1 in the official release."""
    return replace(
        vit_s16_e300_b4096(),
        recipe="vit_b16_e300_b4096",
        model=ModelConfig(architecture="vit_base"),
    )
