"""Encoders and heads."""

from fastmoco.models.heads import predictor, projector
from fastmoco.models.vit import (
    ARCHITECTURES,
    VisionTransformer,
    sincos_positions,
    vit_base,
    vit_conv_base,
    vit_conv_small,
    vit_huge,
    vit_large,
    vit_micro,
    vit_nano,
    vit_small,
    vit_tiny,
)

__all__ = [
    "ARCHITECTURES",
    "VisionTransformer",
    "predictor",
    "projector",
    "sincos_positions",
    "vit_base",
    "vit_conv_base",
    "vit_conv_small",
    "vit_huge",
    "vit_large",
    "vit_micro",
    "vit_nano",
    "vit_small",
    "vit_tiny",
]
