"""A supervised ViT: its numbers, and its recipes.

It is a baseline for throughput, for the interface (one view, labels), and a yardstick beside
self-supervised runs of the same encoder. It is no claim about supervised accuracy. The published
recipes (DeiT, Touvron et al. 2021; MAE's ViT from scratch, He et al. 2022, appendix A.2) also use
RandAugment, random erasing, repeated augmentation (DeiT) and an average of the weights (MAE), which
there is none of here; the learning rate starts and ends at 0; and the encoder is that of MoCo v3,
whose ViT-S has 12 heads and whose positions are a fixed table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from fastmoco.config import Config, DataConfig, KnnConfig, ModelConfig, ObjectiveConfig, OptimConfig
from fastmoco.recipes.small import quickstart_digits, vit_nano7_e12_b256
from fastmoco_pipelines.spec import Resume, ViewSpec, require


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisedConfig(ObjectiveConfig):
    """Cross entropy of a linear layer on the encoder's feature, with labels of the training set."""

    kind: ClassVar[str] = "supervised"

    classes: int = 0
    """Classes that the linear layer tells apart; 0: those of the training set."""
    train_from: Literal["everything", "head"] = "everything"
    """The first part that trains: `everything`, or the `head` alone on a frozen encoder, which then
    is in eval mode: it gets no gradient, and its batch norms keep their statistics."""
    label_smoothing: Annotated[float, Resume.WITH_ALLOW] = 0.0
    """Share of the target that is spread evenly over all classes."""
    mixup: Annotated[float, Resume.WITH_ALLOW] = 0.0
    """Mixup of neighbouring images: the share of an image is drawn from Beta(mixup, mixup) once for
    each step; 0: none."""
    cutmix: Annotated[float, Resume.WITH_ALLOW] = 0.0
    """Cutmix of neighbouring images: the share of the image around the box is drawn from
    Beta(cutmix, cutmix) once for each step; 0: none. With mixup, too, a step has one of the two,
    each with probability 1/2."""
    layer_decay: Annotated[float, Resume.WITH_ALLOW] = 1.0
    """Factor of the learning rate from one layer to the one before it: the head has the whole rate,
    block i of n has layer_decay^(n - i), counted from 0, and patches, positions and class token
    have layer_decay^(n + 1)."""
    head_std: float = 0.02
    """Standard deviation of the head's start values; its bias starts at 0."""

    def __post_init__(self) -> None:
        classes = self.classes
        rule = "must be at least 2, or 0 for those of the training set"
        require(classes == 0 or classes >= 2, "classes", classes, rule)
        choices = ("everything", "head")
        rule = f"must be one of {choices}"
        require(self.train_from in choices, "train_from", self.train_from, rule)
        smoothing = self.label_smoothing
        require(0 <= smoothing < 1, "label_smoothing", smoothing, "must be in [0, 1)")
        for name in ("mixup", "cutmix", "head_std"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        decay = self.layer_decay
        require(0 < decay <= 1, "layer_decay", decay, "must be above 0 and at most 1")

    @property
    def label_count(self) -> int | None:
        """Classes of the labels that the training images must have; 0: as many as there are."""
        return self.classes


def one_view(view: ViewSpec) -> DataConfig:
    """Data of an objective that takes one view of an image."""
    return DataConfig(view1=view, view2=replace(view, copies=0))


def plain_view(size: int = 224) -> ViewSpec:
    """Crop, flip and the color jitter of DeiT (0.3, always, without hue)."""
    return ViewSpec(
        size=size,
        jitter_probability=1.0,
        brightness=0.3,
        contrast=0.3,
        saturation=0.3,
        hue=0.0,
        grayscale_probability=0.0,
        blur_probability=0.0,
    )


def supervised_vit_s16() -> Config:
    """ViT-S/16 on ImageNet with labels, 300 epochs, batch 1024, with the numbers of DeiT as far as
    the views can express them. DeiT-S itself reports 79.8 % top-1, with augmentation that there is
    none of here."""
    return Config(
        recipe="supervised_vit_s16",
        epochs=300,
        global_batch_size=1024,
        model=ModelConfig(freeze_patch_embed=False, drop_path=0.1),
        objective=SupervisedConfig(label_smoothing=0.1, mixup=0.8, cutmix=1.0),
        optim=OptimConfig(lr=2.5e-4, weight_decay=0.05, warmup_epochs=5),
        data=one_view(plain_view()),
        knn=KnnConfig(every_epochs=0),
    )


def supervised_vit_b16() -> Config:
    """ViT-B/16 on ImageNet with labels, 300 epochs, batch 4096, with the numbers of MAE's ViT-B
    from scratch as far as the views can express them. MAE reports 82.3 % top-1, with augmentation
    and an average of the weights that there are none of here."""
    base = supervised_vit_s16()
    return replace(
        base,
        recipe="supervised_vit_b16",
        global_batch_size=4096,
        model=replace(base.model, architecture="vit_base"),
        optim=OptimConfig(lr=1e-4, weight_decay=0.3, betas=(0.9, 0.95), warmup_epochs=20),
    )


def _beside(base: Config, recipe: str, *, epochs: float) -> Config:
    """The encoder, optimizer and views of a small self-supervised recipe, trained with labels."""
    return replace(
        base,
        recipe=recipe,
        epochs=epochs,
        model=replace(base.model, freeze_patch_embed=False),
        objective=SupervisedConfig(label_smoothing=0.1),
        data=one_view(base.data.view1),
        knn=replace(base.knn, every_epochs=0),
    )


def supervised_digits() -> Config:
    """A tiny ViT on 8x8 handwritten digits with labels: a minute on two cores, the yardstick beside
    quickstart_digits."""
    return _beside(quickstart_digits(), "supervised_digits", epochs=60)


def supervised_nano7_e12_b256() -> Config:
    """ViT-nano/7 on 28-pixel grey images such as Fashion-MNIST with labels: minutes on two cores,
    the yardstick beside vit_nano7_e12_b256."""
    return _beside(vit_nano7_e12_b256(), "supervised_nano7_e12_b256", epochs=12)


def linear_probe() -> Config:
    """A linear classifier on a frozen ViT by the official protocol of MoCo v3; `fastmoco eval linear`
    gives it an encoder, sets and the rate of a ResNet."""
    return Config(
        recipe="linear_probe",
        epochs=90,
        global_batch_size=1024,
        precision="fp32",
        objective=SupervisedConfig(train_from="head", head_std=0.01),
        optim=OptimConfig(
            name="sgd",
            lr=3.0,
            schedule="cosine_per_epoch",
            weight_decay=0.0,
            sgd_momentum=0.9,
            warmup_epochs=0,
        ),
        knn=KnnConfig(every_epochs=0),
    )
