"""MoCo v3 on ImageNet: every configuration of the official release, and sizes of the paper that are
not in it."""

from __future__ import annotations

from dataclasses import replace

from fastmoco.config import Config, MoCoV3Config, ModelConfig, OptimConfig
from fastmoco.config.model import Architecture
from fastmoco.recipes.expected import PAPER, RELEASE, Expected, expects

V100 = "V100 GPUs of 32 GB"


@expects(
    Expected(
        linear=73.2,
        source=RELEASE,
        hardware=f"4 nodes, 32 {V100}",
        note="mmpretrain reproduces 73.6 %.",
    )
)
def vit_s16_e300_b4096() -> Config:
    """ViT-S/16 on ImageNet, 300 epochs, batch 4096."""
    return Config(recipe="vit_s16_e300_b4096")


@expects(Expected(linear=None, source=f"the {RELEASE}", hardware=f"1 node, 8 {V100}"))
def vit_s16_e300_b1024() -> Config:
    """ViT-S/16 on ImageNet, 300 epochs, batch 1024: the official single-node set-up."""
    return replace(vit_s16_e300_b4096(), recipe="vit_s16_e300_b1024", global_batch_size=1024)


@expects(
    Expected(
        linear=76.7,
        source=RELEASE,
        hardware=f"8 nodes, 64 {V100}",
        note="mmpretrain reproduces 76.9 %.",
    )
)
def vit_b16_e300_b4096() -> Config:
    """ViT-B/16 on ImageNet, 300 epochs, batch 4096."""
    return _vit("vit_b16_e300_b4096", "vit_base")


@expects(
    Expected(
        linear=77.6,
        source=PAPER,
        note="Not in the official release; other numbers are those of ViT-B.",
    )
)
def vit_l16_e300_b4096() -> Config:
    """ViT-L/16 on ImageNet, 300 epochs, batch 4096."""
    return _vit("vit_l16_e300_b4096", "vit_large")


@expects(
    Expected(
        linear=78.1,
        source=PAPER,
        note="Not in the official release; other numbers are those of ViT-B.",
    )
)
def vit_h14_e300_b4096() -> Config:
    """ViT-H/14 on ImageNet, 300 epochs, batch 4096."""
    return _vit("vit_h14_e300_b4096", "vit_huge", patch_size=14)


@expects(
    Expected(
        linear=None,
        source="ViT-S",
        note="The release has the encoder without a result; its authors report 1 to 2 points more "
        "than with linear patches.",
    )
)
def vit_conv_s16_e300_b4096() -> Config:
    """ViT-S with the convolutional stem on ImageNet, 300 epochs, batch 4096."""
    return _vit("vit_conv_s16_e300_b4096", "vit_conv_small")


@expects(
    Expected(
        linear=None,
        source="ViT-B",
        note="The release has the encoder without a result; its authors report 1 to 2 points more "
        "than with linear patches.",
    )
)
def vit_conv_b16_e300_b4096() -> Config:
    """ViT-B with the convolutional stem on ImageNet, 300 epochs, batch 4096."""
    return _vit("vit_conv_b16_e300_b4096", "vit_conv_base")


@expects(
    Expected(
        linear=68.9,
        source=RELEASE,
        hardware=f"2 nodes, 16 {V100}",
        note="mmpretrain reproduces 69.6 %, one of its users 68.4 %.",
    )
)
def resnet50_e100_b4096() -> Config:
    """ResNet-50 on ImageNet, 100 epochs, batch 4096, LARS."""
    return _resnet50("resnet50_e100_b4096", epochs=100, lr=0.6)


@expects(
    Expected(
        linear=72.8,
        source=RELEASE,
        hardware=f"2 nodes, 16 {V100}",
        note="mmpretrain reproduces 72.8 %.",
    )
)
def resnet50_e300_b4096() -> Config:
    """ResNet-50 on ImageNet, 300 epochs, batch 4096, LARS."""
    return _resnet50("resnet50_e300_b4096", epochs=300, lr=0.3)


@expects(
    Expected(
        linear=74.6,
        source=RELEASE,
        hardware=f"2 nodes, 16 {V100}",
        note="A user of the release reports 74.4 %; mmpretrain has 74.4 % after 800 epochs.",
    )
)
def resnet50_e1000_b4096() -> Config:
    """ResNet-50 on ImageNet, 1000 epochs, batch 4096, LARS."""
    return _resnet50(
        "resnet50_e1000_b4096", epochs=1000, lr=0.3, weight_decay=1.5e-6, ema_momentum=0.996
    )


def _vit(recipe: str, architecture: Architecture, *, patch_size: int = 16) -> Config:
    """Another encoder with the numbers of ViT-S."""
    model = ModelConfig(architecture=architecture, patch_size=patch_size)
    return replace(vit_s16_e300_b4096(), recipe=recipe, model=model)


def _resnet50(
    recipe: str, *, epochs: int, lr: float, weight_decay: float = 1e-6, ema_momentum: float = 0.99
) -> Config:
    """ResNet-50: LARS, softer targets, and crops from 20 % of the area."""
    data = Config().data
    view1, view2 = (replace(view, crop_scale=(0.2, 1.0)) for view in (data.view1, data.view2))
    return Config(
        recipe=recipe,
        epochs=epochs,
        model=ModelConfig(architecture="resnet50"),
        objective=MoCoV3Config(temperature=1.0, ema_momentum=ema_momentum),
        optim=OptimConfig(name="lars", lr=lr, weight_decay=weight_decay, warmup_epochs=10),
        data=replace(data, view1=view1, view2=view2),
    )
