"""FCMAE on ConvNeXt V2: its numbers, and its recipes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from fastmoco.config import Config, ModelConfig, ObjectiveConfig, OptimConfig
from fastmoco.recipes.expected import RELEASE, Expected, expects
from fastmoco.recipes.mae import masked_view, plain_crops
from fastmoco.recipes.small import vit_nano8_e60_b256
from fastmoco.recipes.supervised import one_view
from fastmoco_pipelines.spec import Resume, require


@dataclass(frozen=True, slots=True, kw_only=True)
class FCMAEConfig(ObjectiveConfig):
    """The masks, targets and decoder of FCMAE (Woo et al. 2023)."""

    kind: ClassVar[str] = "fcmae"
    masked: ClassVar[bool] = True

    mask_ratio: Annotated[float, Resume.WITH_ALLOW] = 0.6
    """Share of the patches that the encoder does not see and the decoder predicts."""
    normalise_pixels: Annotated[bool, Resume.WITH_ALLOW] = True
    """Whether the pixels of each patch are normalised before they are predicted."""
    decoder_width: int = 512
    """Channels of the decoder."""
    decoder_depth: int = 1
    """Blocks of the decoder."""
    response_norms: Annotated[Literal["image", "batch"], Resume.WITH_ALLOW] = "image"
    """Positions of the norms in the encoder's global response normalization: those of one image, as
    the paper, or those of all images of a process, as the official PyTorch release. The second
    refuses micro-batches, and has other numbers on another number of processes."""

    def __post_init__(self) -> None:
        ratio, kinds = self.mask_ratio, ("image", "batch")
        require(0 < ratio < 1, "mask_ratio", ratio, "must be above 0 and below 1")
        for name in ("decoder_width", "decoder_depth"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        known = self.response_norms in kinds
        require(known, "response_norms", self.response_norms, f"must be one of {kinds}")


@expects(Expected(linear=None, source=RELEASE, note="Fine-tuned, that release has 83.0 %."))
def fcmae_convnextv2_tiny_e800_b4096() -> Config:
    """FCMAE with ConvNeXt V2-T on ImageNet, 800 epochs, batch 4096: the numbers of the official
    code, and the norms of the paper."""
    return Config(
        recipe="fcmae_convnextv2_tiny_e800_b4096",
        epochs=800,
        global_batch_size=4096,
        precision="fp32",
        model=ModelConfig(architecture="convnextv2_tiny"),
        objective=FCMAEConfig(),
        optim=OptimConfig(lr=1.5e-4, weight_decay=0.05, betas=(0.9, 0.95), warmup_epochs=40),
        data=one_view(masked_view()),
    )


@expects(Expected(linear=None, source=RELEASE, note="Fine-tuned, that release has 84.9 %."))
def fcmae_convnextv2_base_e800_b4096() -> Config:
    """FCMAE with ConvNeXt V2-B on ImageNet, 800 epochs, batch 4096: the numbers of the official
    code, and the norms of the paper."""
    base = fcmae_convnextv2_tiny_e800_b4096()
    return replace(
        base,
        recipe="fcmae_convnextv2_base_e800_b4096",
        model=replace(base.model, architecture="convnextv2_base"),
    )


def fcmae_micro_e60_b256() -> Config:
    """FCMAE with a tiny ConvNeXt V2 on 32-pixel color images, on a CPU."""
    base = vit_nano8_e60_b256()
    return replace(
        base,
        recipe="fcmae_micro_e60_b256",
        model=ModelConfig(architecture="convnextv2_micro", image_size=32),
        objective=FCMAEConfig(decoder_width=64),
        optim=replace(base.optim, betas=(0.9, 0.95)),
        data=one_view(plain_crops(base.data.view1)),
    )
