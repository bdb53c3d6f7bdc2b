"""A linear classifier by the official protocol of MoCo v3: a run of the trainer on a frozen encoder.

The run is an ordinary one with the objective `supervised`, of which only the head trains. So it
continues after a kill, runs on several processes, and draws its curves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastmoco.checkpoint import CheckpointError, find_checkpoint
from fastmoco.config import AccuracyConfig, Config, DataConfig
from fastmoco.config.labelled import labelled_batch
from fastmoco.config.serial import from_json
from fastmoco.models.encoder import trunk_of
from fastmoco.training import setup
from fastmoco.training.accuracies import read_accuracies
from fastmoco.training.encoder_source import EncoderSource
from fastmoco.training.probe import official_lr, probe_sets, probe_view
from fastmoco.training.source_model import log_every, model_config, prepare


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a release trains its linear classifiers.

    Attributes:
        epochs: passes over the training images.
        epochs_of_large: for a ViT-L or ViT-H, with as long a warm-up; None: as for others.
        lr: for a batch of 256 images; None: `official_lr`.
        warmup_epochs: of the learning rate; in proportion for another number of epochs.
        label_smoothing: share of a target that is spread over all classes.
        nesterov: whether SGD has Nesterov's momentum.
        lars: whether the optimizer is LARS with a cosine over steps, not SGD with one over epochs.
        feature_norm: whether the feature passes a batch norm before the linear layer.
    """

    epochs: int
    epochs_of_large: int | None = None
    lr: float | None = None
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    nesterov: bool = False
    lars: bool = False
    feature_norm: bool = False


PROTOCOLS = {
    "moco_v3": Protocol(epochs=90),
    "moby": Protocol(epochs=100, lr=0.5, warmup_epochs=5, label_smoothing=0.1, nesterov=True),
    "mae": Protocol(
        epochs=90, epochs_of_large=50, lr=0.1, warmup_epochs=10, lars=True, feature_norm=True
    ),
}
"""Protocols by name. That of MoBY (Xie et al. 2021) also keeps the frozen trunk in training mode with
stochastic depth; here every trunk is in evaluation mode. That of MAE (He et al. 2022) has a batch of
16,384 and batch norms of each process alone; here they are of all."""
LARGE = ("vit_large", "vit_huge")
"""Architectures with `Protocol.epochs_of_large`."""


def protocol_of(name: str, architecture: str) -> Protocol:
    """The protocol for an architecture."""
    found = PROTOCOLS[name]
    if architecture in LARGE and found.epochs_of_large:
        return replace(found, epochs=found.epochs_of_large)
    return found


@dataclass(frozen=True, kw_only=True)
class OfficialOptions:
    """Options of the official protocol.

    Attributes:
        protocol: name of the numbers that follow where they are None.
        lr: for a batch of 256 images; None: of the protocol, 3 for a ViT and 0.1 for a ResNet in that
            of MoCo v3.
        weight_decay: 0 in the official protocol.
        epochs: passes over the training images; None: of the protocol.
        batch_size: 0: `labelled_batch`.
        crop_min: as of `probe_view`.
        seed: of the classifier, the order and the crops.
    """

    protocol: str = "moco_v3"
    lr: float | None = None
    weight_decay: float = 0.0
    epochs: int | None = None
    batch_size: int = 0
    crop_min: float | None = None
    seed: int = 0


def official_config(
    source: EncoderSource,
    train: str,
    test: str,
    out: Path,
    options: OfficialOptions,
    *,
    recipe: Config,
    tell: Callable[[str], None] = lambda text: None,
) -> Config:
    """The config of the run, whose frozen encoder is written into its folder.

    Training images are cropped and flipped (`probe_view`), and the test images are resized and
    cropped as in every evaluation. Accuracy is measured after each epoch.

    Args:
        source: the encoder.
        train: pattern of labelled shards.
        test: pattern of labelled shards of the same classes.
        out: folder of the run; created.
        options: see there.
        recipe: `recipes.supervised.linear_probe`.
        tell: called with sentences for the user.

    Raises:
        ValueError: if no architecture has the shape of this encoder, an option is out of range, or
            the sets do not fit.
        RunError: if the run in the folder began with another encoder.
        ShardError: if a set cannot be opened.
        OSError: if the folder cannot be written.
    """
    model = model_config(source)
    protocol = protocol_of(options.protocol, model.architecture)
    epochs = protocol.epochs if options.epochs is None else options.epochs
    for name, value, least in (
        ("epochs", epochs, 1),
        ("batch", options.batch_size, 0),
        ("seed", options.seed, 0),
    ):
        if value < least:
            raise ValueError(f"{name}={value}: must be at least {least}")
    before = source.config
    data = before.data if before is not None else DataConfig()
    view = probe_view(source.image, before, options.crop_min, protocol=options.protocol)
    with probe_sets(train, test, data) as sets:
        images = len(sets.train.shards)
        for note in sets.notes:
            tell(f"warning: {note}")
    lr = protocol.lr if options.lr is None else options.lr
    changes: dict[str, Any] = {
        "label_smoothing": protocol.label_smoothing,
        "feature_norm": protocol.feature_norm,
    }
    batch = options.batch_size or labelled_batch(images)
    config = replace(
        recipe,
        epochs=epochs,
        global_batch_size=batch,
        log_every_steps=log_every(images // batch),
        seed=options.seed,
        model=model,
        objective=replace(recipe.objective, **changes),
        optim=replace(
            recipe.optim,
            name="lars" if protocol.lars else recipe.optim.name,
            schedule="cosine" if protocol.lars else recipe.optim.schedule,
            lr=official_lr(source.encoder) if lr is None else lr,
            weight_decay=options.weight_decay,
            warmup_epochs=protocol.warmup_epochs * epochs / protocol.epochs,
            nesterov=protocol.nesterov,
        ),
        data=replace(
            data,
            shards=train,
            images="",
            view1=view,
            view2=replace(view, copies=0),
            more_views=(),
            synthetic=False,
        ),
        knn=replace(recipe.knn, resize=source.image.resize),
        accuracy=AccuracyConfig(test_shards=test, every_epochs=1, max_share=1.0),
    )
    return prepare(source, config, out)


def official_result(source: EncoderSource, out: Path, options: OfficialOptions) -> dict[str, Any]:
    """The result of a finished run, for JSON.

    Which epoch the field publishes is not known, so there are both: `top1` is that of the last
    epoch, and `best` that of the epoch with the highest accuracy on the test images, which are no
    longer independent of such a choice.

    Raises:
        CheckpointError: if an encoder tensor differs from the source's, or there is no accuracy.
    """
    checkpoint = find_checkpoint(out)
    config = from_json(checkpoint.state["config"])
    require_unchanged(source.encoder, dict(checkpoint.tensors), str(checkpoint.path))

    measured = read_accuracies(out, checkpoint)
    return {
        **source.facts,
        "protocol": "official",
        **measured.of(measured.last),
        "best": measured.of(measured.best),
        "images": measured.images,
        "train_images": checkpoint.state["resolved"]["sample_count"],
        "classes": config.objective.label_count,
        "lr": config.optim.lr,
        "weight_decay": config.optim.weight_decay,
        "run": str(out),
        "settings": {
            "epochs": config.epochs,
            "batch_size": config.global_batch_size,
            "seed": config.seed,
            "protocol": options.protocol,
            "optimizer": config.optim.name,
            "momentum": config.optim.sgd_momentum,
            "nesterov": config.optim.nesterov,
            "warmup_epochs": config.optim.warmup_epochs,
            "label_smoothing": getattr(config.objective, "label_smoothing", 0.0),
            "feature_norm": getattr(config.objective, "feature_norm", False),
            "crop_scale": config.data.view1.crop_scale,
            "crop_misfit": config.data.view1.crop_misfit,
            "interpolation": config.data.view1.interpolation,
            "flip_probability": config.data.view1.flip_probability,
            "precision": config.precision,
            "image": asdict(source.image),
        },
        "versions": setup.versions(),
    }


def require_unchanged(encoder: nn.Module, tensors: dict[str, Any], named: str) -> None:
    """Check that a trained checkpoint has every tensor of the encoder, to the bit; those of a float64
    encoder as float32, in which the protocol computes.

    Raises:
        CheckpointError: naming those that differ.
    """
    differ = [
        name
        for name, value in trunk_of(encoder.state_dict()).items()
        if not _equal(tensors.get(f"model.encoder.{name}"), value)
    ]
    if differ:
        raise CheckpointError(
            f"{named}: {len(differ)} tensors of the frozen encoder are not those of the source "
            f"({', '.join(differ[:3])}); the result is not that of a linear classifier: choose "
            "another --out"
        )


def _equal(found: torch.Tensor | None, value: torch.Tensor) -> bool:
    return found is not None and torch.equal(found.cpu(), value.cpu().to(found.dtype))
