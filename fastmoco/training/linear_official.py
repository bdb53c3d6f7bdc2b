"""A linear classifier by the official protocol of MoCo v3: a run of the trainer on a frozen encoder.

The run is an ordinary one with the objective `supervised`, of which only the head trains. So it
continues after a kill, runs on several processes, and draws its curves.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from fastmoco.checkpoint import CheckpointError, find_checkpoint
from fastmoco.config import AccuracyConfig, Config, DataConfig, ModelConfig
from fastmoco.config.serial import from_json
from fastmoco.models.encoder_file import describe_run
from fastmoco.models.vit import ARCHITECTURES, VisionTransformer
from fastmoco.run.folder import RunFolder
from fastmoco.training import setup
from fastmoco.training.encoder_source import EncoderSource
from fastmoco.training.linear_fast import accuracies, official_lr, probe_batch, probe_view
from fastmoco_pipelines import ShardSet
from fastmoco_pipelines.files import write_file

ENCODER = "encoder.safetensors"
"""File of the frozen encoder in the folder of a probe."""


@dataclass(frozen=True, kw_only=True)
class OfficialOptions:
    """Options of the official protocol.

    Attributes:
        lr: for a batch of 256 images; None: 3 for a ViT, 0.1 for a ResNet.
        weight_decay: 0 in the official protocol.
        epochs: passes over the training images.
        batch_size: 0: `probe_batch`.
        crop_min: as of `probe_view`.
        seed: of the classifier, the order and the crops.
    """

    lr: float | None = None
    weight_decay: float = 0.0
    epochs: int = 90
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

    Raises:
        ValueError: if no config describes this encoder, or an option is out of range.
        ShardError: if the training set cannot be opened.
        OSError: if the folder cannot be written.
    """
    for name, value, least in (
        ("epochs", options.epochs, 1),
        ("batch", options.batch_size, 0),
        ("seed", options.seed, 0),
    ):
        if value < least:
            raise ValueError(f"{name}={value}: must be at least {least}")
    before = source.config
    data = before.data if before is not None else DataConfig()
    view = probe_view(source.image, before, options.crop_min)
    with closing(ShardSet.open(train, cache=data)) as shards:
        images = len(shards)
    model = _model(source)
    lr = official_lr(source.encoder) if options.lr is None else options.lr
    config = replace(
        recipe,
        epochs=options.epochs,
        global_batch_size=options.batch_size or probe_batch(images),
        seed=options.seed,
        model=replace(model, init=str(out / ENCODER)),
        optim=replace(recipe.optim, lr=lr, weight_decay=options.weight_decay),
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
    _write_encoder(source.encoder, config, out / ENCODER)
    return config


def official_result(source: EncoderSource, out: Path) -> dict[str, Any]:
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

    # Accuracies by step, the one before the first step left out.
    folder = RunFolder(out)
    history = {
        name: {step: value for step, value in folder.read_metric(name) if step}
        for name in ("top1", "top5")
    }
    if not history["top1"]:
        raise CheckpointError(
            f"{out}: has no accuracy after its first step; delete it and begin again"
        )
    last = max(history["top1"])
    best = max(history["top1"], key=lambda step: (history["top1"][step], -step))
    with (
        closing(ShardSet.open(config.accuracy.test_shards, cache=config.data)) as tested,
        closing(ShardSet.open(config.data.shards, cache=config.data)) as trained,
    ):
        images, train_images = len(tested), len(trained)
        classes = max(trained.class_count, tested.class_count)
    per_epoch = train_images // config.global_batch_size

    def shares(step: int) -> dict[str, Any]:
        top1, top5 = (round(history[name][step] * images) for name in ("top1", "top5"))
        return accuracies(top1, top5, images)

    return {
        **source.facts,
        "protocol": "official",
        **shares(last),
        "best": {"epoch": round(best / per_epoch), **shares(best)},
        "images": images,
        "train_images": train_images,
        "classes": classes,
        "lr": config.optim.lr,
        "weight_decay": config.optim.weight_decay,
        "run": str(out),
        "settings": {
            "epochs": config.epochs,
            "batch_size": config.global_batch_size,
            "seed": config.seed,
            "momentum": config.optim.sgd_momentum,
            "crop_scale": config.data.view1.crop_scale,
            "flip_probability": config.data.view1.flip_probability,
            "precision": config.precision,
            "image": asdict(source.image),
        },
        "versions": setup.versions(),
    }


def require_unchanged(encoder: nn.Module, tensors: dict[str, Any], named: str) -> None:
    """Check that a trained checkpoint has every tensor of the encoder, to the bit.

    Raises:
        CheckpointError: naming those that differ.
    """
    differ = [
        name
        for name, value in _trunk(encoder).items()
        if not _equal(tensors.get(f"model.encoder.{name}"), value)
    ]
    if differ:
        raise CheckpointError(
            f"{named}: {len(differ)} tensors of the frozen encoder are not those of the source "
            f"({', '.join(differ[:3])}); the result is not that of a linear classifier: choose "
            "another --out"
        )


def _equal(found: torch.Tensor | None, value: torch.Tensor) -> bool:
    return found is not None and torch.equal(found.cpu(), value.cpu())


def _trunk(encoder: nn.Module) -> dict[str, torch.Tensor]:
    state = encoder.state_dict()
    return {name: value for name, value in state.items() if not name.startswith("head.")}


def _write_encoder(encoder: nn.Module, config: Config, path: Path) -> None:
    """Write the file that the run starts from; each process writes the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.cpu().contiguous() for name, value in _trunk(encoder).items()}
    write_file(path, save(tensors, describe_run(config).to_metadata()), mode=0o600)


def _model(source: EncoderSource) -> ModelConfig:
    """The config of an encoder, of a run or as far as a file shows it."""
    if source.config is not None:
        # Nothing random in the encoder, and no products in float8.
        return replace(
            source.config.model,
            drop_path=0.0,
            attention="auto",
            linears="native",
            momentum_linears="native",
        )
    encoder, size = source.encoder, source.image.size
    if isinstance(encoder, VisionTransformer):
        blocks: Any = encoder.blocks
        shape = (encoder.embed_dim, len(blocks), int(blocks[0].attn.num_heads))
        for name, known in ARCHITECTURES.items():
            conv = "conv" in str(source.facts.get("header", {}).get("stem", known.stem))
            if shape == (known.width, known.depth, known.heads) and conv == (known.stem == "conv"):
                return ModelConfig(
                    architecture=name,  # type: ignore[arg-type]
                    image_size=size,
                    patch_size=encoder.patch_size,
                )
    raise ValueError(
        f"source={source.facts['source']!r}: no architecture of a run has the shape of this "
        "encoder, so the official protocol cannot train on it; give --fast"
    )
