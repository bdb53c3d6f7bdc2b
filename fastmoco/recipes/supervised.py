"""A supervised ViT: its numbers, and its recipes.

It is a baseline for throughput, for the interface (one view, labels), and a yardstick beside
self-supervised runs of the same encoder. It is no claim about supervised accuracy. The published
recipes (DeiT, Touvron et al. 2021; MAE's ViT from scratch, He et al. 2022, appendix A.2) also use
RandAugment, random erasing, repeated augmentation (DeiT) and an average of the weights (MAE), which
fastmoco does not have; the learning rate starts and ends at 0; and the encoder is that of MoCo v3,
whose ViT-S has 12 heads and whose positions are a fixed table.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Annotated, ClassVar, Literal

from fastmoco.config import (
    AccuracyConfig,
    Config,
    DataConfig,
    KnnConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
)
from fastmoco.config.labelled import labelled_batch, own_crops
from fastmoco.config.model import Pooling, Positions
from fastmoco.recipes.expected import PAPER, Expected, expects
from fastmoco.recipes.small import quickstart_digits, vit_nano7_e12_b256
from fastmoco_pipelines.spec import EvalSpec, LoaderOptions, Resume, ViewSpec, require


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisedConfig(ObjectiveConfig):
    """Cross entropy of a linear layer on the encoder's feature, with labels of the training set."""

    kind: ClassVar[str] = "supervised"

    classes: int = 0
    """Classes of the linear layer; 0: those of the training set."""
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
    """Factor of the learning rate of a ViT or ConvNeXt V2 from one layer to the one before it: the
    head has the whole rate, block i of n has layer_decay^(n - i), counted from 0, and patches,
    positions and class token of a ViT have layer_decay^(n + 1)."""
    layer_decay_by: Annotated[Literal["block", "group"], Resume.WITH_ALLOW] = "block"
    """Layers of a ConvNeXt V2: its blocks (`block`); or its stages, of which the third has a layer
    for three blocks (`group`)."""
    head_std: float = 0.02
    """Standard deviation of the head's start values; its bias starts at 0."""
    feature_norm: bool = False
    """Normalise the feature over the batch before the linear layer, by a batch norm without weight
    and bias, as MAE's linear probe does."""

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
        by, choices = self.layer_decay_by, ("block", "group")
        require(by in choices, "layer_decay_by", by, f"must be one of {choices}")
        rule = "has no effect with train_from=head, which has one layer: take 1"
        require(decay == 1 or self.train_from != "head", "layer_decay", decay, rule)

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


@expects(
    Expected(
        linear=None,
        source="DeiT",
        measure="Top-1 of this encoder",
        note=f"DeiT-S itself has 79.8 % ({PAPER}), with augmentation that fastmoco does not have.",
    )
)
def supervised_vit_s16() -> Config:
    """ViT-S/16 on ImageNet with labels, 300 epochs, batch 1024, numbers of DeiT."""
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


@expects(
    Expected(
        linear=None,
        source="MAE's ViT-B from scratch",
        measure="Top-1 of this encoder",
        note=f"That ViT-B has 82.3 % ({PAPER}), with augmentation and averaged weights that "
        "fastmoco lacks.",
    )
)
def supervised_vit_b16() -> Config:
    """ViT-B/16 on ImageNet with labels, 300 epochs, batch 4096, numbers of MAE."""
    base = supervised_vit_s16()
    return replace(
        base,
        recipe="supervised_vit_b16",
        global_batch_size=4096,
        model=replace(base.model, architecture="vit_base"),
        optim=OptimConfig(lr=1e-4, weight_decay=0.3, betas=(0.9, 0.95), warmup_epochs=20),
    )


def _beside(base: Config, recipe: str, *, epochs: float, lr: float) -> Config:
    """The encoder and views of a small self-supervised recipe, trained with labels."""
    return replace(
        base,
        recipe=recipe,
        epochs=epochs,
        model=replace(base.model, freeze_patch_embed=False),
        objective=SupervisedConfig(label_smoothing=0.1),
        optim=replace(base.optim, lr=lr, warmup_epochs=epochs / 20),
        data=one_view(base.data.view1),
        knn=replace(base.knn, every_epochs=0),
    )


def supervised_digits() -> Config:
    """A tiny ViT on 8x8 handwritten digits with labels: a minute on two cores, the yardstick beside
    quickstart_digits. 95.8 % top-1 on the 360 test images."""
    return _beside(quickstart_digits(), "supervised_digits", epochs=120, lr=5e-3)


def supervised_nano7_e12_b256() -> Config:
    """ViT-nano/7 on 28-pixel grey images such as Fashion-MNIST with labels: minutes on two cores,
    the yardstick beside vit_nano7_e12_b256."""
    return _beside(vit_nano7_e12_b256(), "supervised_nano7_e12_b256", epochs=12, lr=3e-3)


@dataclass(frozen=True, kw_only=True)
class FineTuningSize:
    """What follows from the size of an encoder in a fine-tuning: the numbers of MAE for ViT-B, which
    all encoders have that are not in `FINE_TUNING_SIZES`."""

    epochs: float = 100
    warmup_epochs: float = 5
    lr: float = 5e-4
    """For a batch of 256 images."""
    layer_decay: float = 0.65
    """Of a ViT."""
    drop_path: float = 0.1


FINE_TUNING_SIZES = {
    "vit_large": FineTuningSize(epochs=50, lr=1e-3, layer_decay=0.75, drop_path=0.2),
    "vit_huge": FineTuningSize(epochs=50, lr=1e-3, layer_decay=0.75, drop_path=0.3),
}
"""By architecture, as MAE has them."""


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """Options of a fine-tuning, with the numbers of MAE (He et al. 2022, appendix A.2).

    Attributes:
        epochs: passes over the training images; None: `FineTuningSize`.
        batch: images of a step; 0: 1024, halved until an epoch has 16 steps, down to 32.
        lr: for a batch of 256 images; None: `FineTuningSize`.
        weight_decay: of AdamW.
        warmup_epochs: None: 5 of the epochs of `FineTuningSize`, in proportion for other epochs.
        layer_decay: None: `FineTuningSize` for a ViT, else 1; a Swin and a ResNet have no layers to
            decay by.
        layer_decay_by: layers of a ConvNeXt V2, "block" or "group".
        drop_path: None: `FineTuningSize`, 0 for a ResNet.
        label_smoothing: share of a target that is spread over all classes.
        mixup: 0: none.
        cutmix: 0: none.
        crop_min: smallest share of an image's area in a crop; None: 0.08, for images of at most 64
            pixels that of the run's first view.
        pooling: "mean_norm": the norm of the mean of the patch tokens, as MAE; "class": the class
            token. None: "mean_norm" for a masked method on a ViT with a class token, else as the
            encoder.
        seed: of head, order, views and mixing.
    """

    epochs: float | None = None
    batch: int = 0
    lr: float | None = None
    weight_decay: float = 0.05
    warmup_epochs: float | None = None
    layer_decay: float | None = None
    layer_decay_by: Literal["block", "group"] = "block"
    drop_path: float | None = None
    label_smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    crop_min: float | None = None
    pooling: Literal["class", "mean_norm"] | None = None
    seed: int = 0


def fine_tuning(
    model: ModelConfig,
    image: EvalSpec,
    options: FineTuning,
    *,
    train: str,
    test: str,
    images: int,
    before: Config | None,
) -> Config:
    """The config of a run that fine-tunes an encoder end to end.

    AdamW with betas 0.9 and 0.999, a cosine after the warm-up, a head whose start values are almost
    0, crops, flips and the color jitter of DeiT. Every parameter trains that the encoder lets
    train, the patch projection included. An encoder with class attention is fine-tuned as ExtreMA
    is: without it, by the mean of the patch tokens, and with positions that train.

    Args:
        model: of the encoder.
        image: how its images are resized, cropped and normalised.
        options: see there.
        train: pattern of labelled shards.
        test: pattern of labelled shards of the same classes.
        images: in the training set.
        before: config of the run that the encoder is from; None for a file.

    Raises:
        ValueError: if an option does not suit the encoder.
    """
    vit, deep = model.family == "vit", model.family != "resnet"
    layered = model.family in ("vit", "convnextv2")
    for name, value, neutral, known in (
        ("layer_decay", options.layer_decay, 1, layered),
        ("layer_decay_by", options.layer_decay_by, "block", model.family == "convnextv2"),
        ("drop_path", options.drop_path, 0, deep),
    ):
        if not known and value not in (None, neutral):
            blocks = "stages of a ConvNeXt V2" if name == "layer_decay_by" else "blocks of a ViT"
            raise ValueError(
                f"{name}={value}: needs the {blocks}, and {model.architecture} has none; leave it out"
            )
    # A mean of patch tokens in place of a class token, and positions that train, as the official
    # code of MAE and of ExtreMA has it.
    changed: Pooling = _pooling(model, options, before)
    if changed != model.pooling:
        positions: Positions = "none" if model.positions == "none" else "learned"
        model = replace(model, pooling=changed, positions=positions)
    view = replace(plain_view(image.size), mean=image.mean, std=image.std)
    if (own := own_crops(image.size, before)) is not None:
        view = replace(view, crop_scale=own[0], flip_probability=own[1], jitter_probability=0.0)
    if options.crop_min is not None:
        view = replace(view, crop_scale=(options.crop_min, 1.0))
    size = FINE_TUNING_SIZES.get(model.architecture, FineTuningSize())
    epochs = size.epochs if options.epochs is None else options.epochs
    warmup = options.warmup_epochs
    if warmup is None:
        warmup = epochs * size.warmup_epochs / size.epochs
    decay = options.layer_decay
    if decay is None:
        decay = size.layer_decay if vit else 1.0
    drop_path = options.drop_path
    if drop_path is None:
        drop_path = size.drop_path if deep else 0.0
    data = one_view(view)
    if before is not None:
        names = [option.name for option in fields(LoaderOptions)]
        data = replace(data, **{name: getattr(before.data, name) for name in names})
    return Config(
        recipe="finetune",
        epochs=epochs,
        global_batch_size=options.batch or labelled_batch(images),
        seed=options.seed,
        # Fused blocks have no stochastic depth.
        model=replace(model, drop_path=drop_path, blocks="modules" if drop_path else model.blocks),
        objective=SupervisedConfig(
            label_smoothing=options.label_smoothing,
            mixup=options.mixup,
            cutmix=options.cutmix,
            layer_decay=decay,
            layer_decay_by=options.layer_decay_by,
            head_std=2e-5,
        ),
        optim=OptimConfig(
            lr=size.lr if options.lr is None else options.lr,
            weight_decay=options.weight_decay,
            warmup_epochs=warmup,
        ),
        data=replace(data, shards=train, shuffle_window=None),
        knn=KnnConfig(every_epochs=0, resize=image.resize),
        accuracy=AccuracyConfig(test_shards=test),
    )


def _pooling(model: ModelConfig, options: FineTuning, before: Config | None) -> Pooling:
    """The feature that is fine-tuned.

    Raises:
        ValueError: if the encoder has no class token.
    """
    with_class_token = model.family == "vit" and model.pooling in ("class", "mean_norm")
    if options.pooling is not None:
        if not with_class_token:
            raise ValueError(
                f"pooling={options.pooling!r}: needs a ViT with a class token, which this encoder "
                "is not; leave it out"
            )
        return options.pooling
    if model.pooling == "class_attention":
        return "norm_mean"
    masked = before is not None and before.objective.masked
    return "mean_norm" if masked and with_class_token else model.pooling


def linear_probe() -> Config:
    """A linear classifier on a frozen ViT by the official protocol of MoCo v3; `fastmoco eval
    linear` gives it an encoder, sets and the rate of a ResNet."""
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
