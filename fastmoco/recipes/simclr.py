"""SimCLR: its numbers, and its recipes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from fastmoco.config import Config, ModelConfig, ObjectiveConfig, OptimConfig
from fastmoco.recipes.expected import ON_VIT, PAPER, RELEASE, Expected, expects
from fastmoco.recipes.moco_v3 import vit_b16_e300_b4096, vit_s16_e300_b4096
from fastmoco.recipes.small import quickstart_digits, vit_nano7_e12_b256
from fastmoco_pipelines.spec import Resume, ViewSpec, require


@dataclass(frozen=True, slots=True, kw_only=True)
class SimCLRConfig(ObjectiveConfig):
    """The projector and the loss of SimCLR (Chen, Kornblith, Norouzi, Hinton 2020). The defaults
    are those for ViT."""

    kind: ClassVar[str] = "simclr"

    temperature: Annotated[float, Resume.WITH_ALLOW] = 0.2
    """Softmax temperature of the loss: 0.2 for ViT (MoCo v3's), 0.1 for ResNet (SimCLR's)."""
    loss_scale: Annotated[float, Resume.WITH_ALLOW] = 1.0
    """Factor on the mean loss of all rows: 1 as in the paper; 2 as in the official code, whose
    learning rates belong to it."""
    layers: int = 3
    """Linear layers of the projector: 3, or 2 as in the first paper."""
    last_norm_weight: bool = False
    """Whether the last batch norm of the projector has a trained weight, as in the official code;
    MoCo v3's has none."""
    joint_batch_statistics: bool = True
    """Whether batch norms see both views as one batch, as in SimCLR, or each view alone."""

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", self.temperature, "must be positive")
        require(self.loss_scale > 0, "loss_scale", self.loss_scale, "must be positive")
        require(self.layers >= 1, "layers", self.layers, "must be at least 1")


def simclr_view(size: int = 224, *, strength: float = 1.0) -> ViewSpec:
    """The augmentation of SimCLR, equal for both views.

    Crops from 8 % of the area, color jitter of 0.8, 0.8, 0.8, 0.2 times `strength` with probability
    0.8, greyscale 0.2, blur 0.5, no solarize; pixels in [0, 1], without mean and deviation.

    What differs from the official code: it resizes by bicubic interpolation where fastmoco is
    bilinear with antialiasing, and draws one sigma of the blur for a device's batch where fastmoco
    draws one for each image.

    Args:
        size: output height and width in pixels. The blur, defined at 224, is scaled with it.
        strength: of the color jitter, at most 1.25; 0.5 on CIFAR-10.
    """
    return ViewSpec(
        size=size,
        brightness=0.8 * strength,
        contrast=0.8 * strength,
        saturation=0.8 * strength,
        hue=0.2 * strength,
        blur_probability=0.5,
        blur_sigma=(0.1 * size / 224, 2.0 * size / 224),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )


@expects(Expected(linear=69.0, source=PAPER, note=ON_VIT))
def simclr_vit_s16_e300_b4096() -> Config:
    """SimCLR with ViT-S/16 on ImageNet, 300 epochs, batch 4096: views, schedule and projector of
    MoCo v3."""
    return _vit(vit_s16_e300_b4096(), "simclr_vit_s16_e300_b4096")


@expects(Expected(linear=73.9, source=PAPER, note=ON_VIT))
def simclr_vit_b16_e300_b4096() -> Config:
    """SimCLR with ViT-B/16 on ImageNet, 300 epochs, batch 4096: views, schedule and projector of
    MoCo v3."""
    return _vit(vit_b16_e300_b4096(), "simclr_vit_b16_e300_b4096")


@expects(
    Expected(
        linear=64.5,
        source=f"{RELEASE} of SimCLR",
        hardware="32 TPU v3 cores, 6 hours",
        note="Weight decay 1e-6 is the default of that release; its example command has 1e-4. "
        "VISSL reproduces 64.4 %.",
    )
)
def simclr_r50_e100_b4096() -> Config:
    """SimCLR with ResNet-50 on ImageNet, 100 epochs, batch 4096: views, projector, loss, LARS and
    schedule of the official code."""
    view = simclr_view()
    return Config(
        recipe="simclr_r50_e100_b4096",
        epochs=100,
        global_batch_size=4096,
        model=ModelConfig(architecture="resnet50", hidden_dim=2048, projection_dim=128),
        objective=SimCLRConfig(temperature=0.1, loss_scale=2.0, last_norm_weight=True),
        optim=OptimConfig(
            name="lars",
            lr=0.3,
            schedule="cosine_steps",
            warmup_epochs=10,
            weight_decay=1e-6,
            lr_in_buffer=True,
        ),
        data=replace(vit_s16_e300_b4096().data, view1=view, view2=view),
    )


def simclr_digits() -> Config:
    """SimCLR with a tiny ViT on 8x8 handwritten digits: a few minutes on two cores."""
    return replace(quickstart_digits(), recipe="simclr_digits", objective=SimCLRConfig())


def simclr_nano7_e12_b256() -> Config:
    """SimCLR with ViT-nano/7 on 28-pixel grey images such as Fashion-MNIST: ten minutes on two
    cores."""
    base = vit_nano7_e12_b256()
    return replace(base, recipe="simclr_nano7_e12_b256", objective=SimCLRConfig())


def _vit(base: Config, recipe: str) -> Config:
    """A recipe of MoCo v3 with SimCLR, and the learning rate that its paper found for it."""
    optim = replace(base.optim, lr=2e-4)
    return replace(base, recipe=recipe, objective=SimCLRConfig(), optim=optim)
