"""SwAV with two views and with small crops, on vision transformers and ResNet-50: its numbers, and
its recipes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from fastmoco.config import Config, DataConfig, ModelConfig, ObjectiveConfig, OptimConfig
from fastmoco.recipes.expected import ON_VIT, PAPER, RELEASE, Expected, expects
from fastmoco.recipes.moco_v3 import vit_b16_e300_b4096, vit_s16_e300_b4096
from fastmoco.recipes.small import quickstart_digits, vit_nano7_e12_b256
from fastmoco_pipelines.spec import Resume, require, swav_views

CHOICE = (
    f"{ON_VIT} Projector, prototypes and views are those of SwAV, trunk and schedule those of MoCo "
    "v3; the learning rate is our choice."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SwAVConfig(ObjectiveConfig):
    """Prototypes, assignment and queue of SwAV (Caron et al. 2020)."""

    kind: ClassVar[str] = "swav"

    prototypes: int = 3000
    """Number of prototypes, to which the images of a batch are assigned evenly."""
    temperature: Annotated[float, Resume.WITH_ALLOW] = 0.1
    """Softmax temperature of the predictions."""
    epsilon: Annotated[float, Resume.WITH_ALLOW] = 0.05
    """Temperature of the codes. Where the loss stays at ln(prototypes), 0.03 helps."""
    sinkhorn_iterations: Annotated[int, Resume.WITH_ALLOW] = 3
    """Scalings of the codes, each of all prototypes and then of all images."""
    freeze_prototypes_steps: Annotated[int, Resume.WITH_ALLOW] = 0
    """First steps in which the prototypes stay as they are: 313 at batch 4096 and 5005 at batch 256
    in the official runs, one epoch each."""
    queue: int = 0
    """Embeddings of earlier batches of each view, over all processes, that are assigned together
    with the batch; a multiple of the global batch. 3840 at batch 256; 0 for large batches."""
    queue_start_epoch: Annotated[float, Resume.WITH_ALLOW] = 15
    """Epoch from which the queue is filled; it is used once it is full."""

    def __post_init__(self) -> None:
        require(self.prototypes >= 2, "prototypes", self.prototypes, "must be at least 2")
        require(self.temperature > 0, "temperature", self.temperature, "must be positive")
        rule = "must be at least 0.025: scores over a smaller one underflow in float32"
        require(self.epsilon >= 0.025, "epsilon", self.epsilon, rule)
        for name, least in (
            ("sinkhorn_iterations", 1),
            ("freeze_prototypes_steps", 0),
            ("queue", 0),
            ("queue_start_epoch", 0),
        ):
            value = getattr(self, name)
            require(value >= least, name, value, f"must be at least {least}")

    def schedule_notes(self, epochs: float, total_steps: int) -> list[str]:
        """That the prototypes never train."""
        frozen = self.freeze_prototypes_steps
        if frozen < total_steps:
            return []
        return [
            f"objective.freeze_prototypes_steps={frozen}: the run ends after step {total_steps}, so "
            "the prototypes never train"
        ]


@expects(Expected(linear=67.1, source=PAPER, note=CHOICE))
def swav_vit_s16_e300_b4096() -> Config:
    """SwAV with ViT-S/16 on ImageNet, 300 epochs, batch 4096, two views."""
    return _on_vit("swav_vit_s16_e300_b4096", vit_s16_e300_b4096())


@expects(Expected(linear=71.6, source=PAPER, note=CHOICE))
def swav_vit_b16_e300_b4096() -> Config:
    """SwAV with ViT-B/16 on ImageNet, 300 epochs, batch 4096, two views."""
    return _on_vit("swav_vit_b16_e300_b4096", vit_b16_e300_b4096())


@expects(
    Expected(
        linear=None,
        source=f"{RELEASE} of SwAV",
        note=f"Nobody has published small crops on this trunk. {CHOICE}",
    )
)
def swav_vit_s16_e300_b4096_crops() -> Config:
    """SwAV with ViT-S/16 on ImageNet, 300 epochs, batch 4096, two large and six small crops."""
    base = swav_vit_s16_e300_b4096()
    return replace(base, recipe="swav_vit_s16_e300_b4096_crops", data=_crops(base.data, 6))


def _on_vit(recipe: str, base: Config) -> Config:
    return replace(
        base,
        recipe=recipe,
        model=replace(base.model, projection_dim=128, hidden_dim=2048),
        objective=SwAVConfig(freeze_prototypes_steps=313),
        optim=replace(base.optim, lr=1e-4),
        data=_crops(base.data, 0),
    )


def _crops(data: DataConfig, small: int) -> DataConfig:
    """Two large crops, and a number of small ones."""
    view1, view2, *more = swav_views(local_copies=small)
    return replace(data, view1=view1, view2=view2, more_views=tuple(more))


@expects(
    Expected(
        linear=70.1,
        source=f"{RELEASE} of SwAV",
        hardware="8 nodes, 64 V100 GPUs",
    )
)
def swav_r50_e400_b4096() -> Config:
    """SwAV with ResNet-50 on ImageNet, 400 epochs, batch 4096, two views, with LARC."""
    return _on_r50("swav_r50_e400_b4096", 400, small=0)


@expects(
    Expected(
        linear=75.3,
        source=f"{RELEASE} of SwAV",
        hardware="8 nodes, 64 V100 GPUs",
        note="72.1, 73.9 and 74.6 % after 100, 200 and 400 epochs.",
    )
)
def swav_r50_e800_b4096() -> Config:
    """SwAV with ResNet-50 on ImageNet, 800 epochs, batch 4096, two large and six small crops."""
    return _on_r50("swav_r50_e800_b4096", 800, small=6)


@expects(
    Expected(
        linear=74.3,
        source=f"{RELEASE} of SwAV",
        hardware="4 V100 GPUs",
        note="72.7 % after 200 epochs.",
    )
)
def swav_r50_e400_b256() -> Config:
    """SwAV with ResNet-50 on ImageNet, 400 epochs, batch 256, two large and six small crops, and a
    queue of 3840 images from epoch 15."""
    base = _on_r50("swav_r50_e400_b256", 400, small=6)
    return replace(
        base,
        global_batch_size=256,
        objective=SwAVConfig(freeze_prototypes_steps=5005, queue=3840, queue_start_epoch=15),
        optim=replace(base.optim, lr=0.6, final_lr=0.0006, warmup_lr=0.0, warmup_epochs=0),
    )


def _on_r50(recipe: str, epochs: float, *, small: int) -> Config:
    return Config(
        recipe=recipe,
        epochs=epochs,
        global_batch_size=4096,
        model=ModelConfig(
            architecture="resnet50", projection_dim=128, hidden_dim=2048, zero_residual=False
        ),
        objective=SwAVConfig(freeze_prototypes_steps=313),
        optim=OptimConfig(
            name="larc",
            lr=4.8,
            lr_scaling="none",
            schedule="cosine_inclusive",
            warmup_lr=0.3,
            final_lr=0.0048,
            weight_decay=1e-6,
            warmup_epochs=10,
        ),
        data=_crops(vit_s16_e300_b4096().data, small),
    )


def swav_digits() -> Config:
    """SwAV with a tiny ViT on 8x8 handwritten digits: a few minutes on two cores."""
    base = quickstart_digits()
    objective = SwAVConfig(prototypes=128, freeze_prototypes_steps=10)
    return replace(base, recipe="swav_digits", objective=objective)


def swav_nano7_e12_b256() -> Config:
    """SwAV with ViT-nano/7 on 28-pixel grey images such as Fashion-MNIST: ten minutes on two
    cores."""
    base = vit_nano7_e12_b256()
    objective = SwAVConfig(prototypes=256, freeze_prototypes_steps=20)
    return replace(base, recipe="swav_nano7_e12_b256", objective=objective)


def swav_crops_digits() -> Config:
    """SwAV with a tiny ViT and small crops of 8x8 handwritten digits: a few minutes on two
    cores."""
    base = swav_digits()
    return _small_crops("swav_crops_digits", base, size=6)


def swav_crops_nano7_e12_b256() -> Config:
    """SwAV with ViT-nano/7 and small crops of 28-pixel grey images such as Fashion-MNIST: fifteen
    minutes on two cores."""
    return _small_crops("swav_crops_nano7_e12_b256", swav_nano7_e12_b256(), size=21)


def _small_crops(recipe: str, base: Config, *, size: int) -> Config:
    """Two small crops. Smaller ones, which show a stroke of a digit, or softer codes leave the loss
    at ln K."""
    small = replace(base.data.view1, copies=2, size=size, crop_scale=(0.3, 0.6))
    assert isinstance(base.objective, SwAVConfig)  # noqa: S101 - a type: of the recipes above
    return replace(
        base,
        recipe=recipe,
        objective=replace(base.objective, epsilon=0.03),
        data=replace(base.data, more_views=(small,)),
    )
