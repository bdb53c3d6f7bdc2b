"""`fastmoco eval finetune`: train an encoder end to end with labels, and report its accuracy."""

from __future__ import annotations

import json as json_module
from dataclasses import fields, replace
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from fastmoco.cli.collection import collection_paused
from fastmoco.cli.images import normalisation, of_options
from fastmoco.cli.labelled_run import read_labelled, run_to_result, show_accuracies
from fastmoco.cli.opening import say_first
from fastmoco.cli.output import json_log, print_result, run_logged
from fastmoco.errors import EXIT_FINISHED, EXIT_REFUSED, one_line, show
from fastmoco.errors.log import Style
from fastmoco.recipes.supervised import FineTuning, fine_tuning
from fastmoco_pipelines.files.whole import write_file

RESULT = "finetune.json"
"""File of the result in the folder of the run."""


def eval_finetune(
    run: Positional[Path],
    *,
    train: str,
    test: str,
    out: Path,
    which: Literal["base", "momentum"] | None = None,
    best: bool = False,
    heads: int | None = None,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    epochs: float | None = None,
    batch: int = 0,
    lr: float | None = None,
    weight_decay: float = 0.05,
    warmup_epochs: float | None = None,
    layer_decay: float | None = None,
    layer_decay_by: Literal["block", "group"] = "block",
    drop_path: float | None = None,
    label_smoothing: float = 0.1,
    mixup: float = 0.8,
    cutmix: float = 1.0,
    crop_min: float | None = None,
    pooling: Literal["class", "mean_norm"] | None = None,
    seed: int = 0,
    log: Style = "auto",
    json: bool = False,
) -> int:
    """Accuracy of an encoder that is trained on with labels (fine-tuning).

    A run of its own, which the same command continues and which several processes may share. The
    defaults are those of MAE for the size of the ViT (docs/evaluation.md), without RandAugment.

    Args:
        run: Folder of the run, as given to `fastmoco train --out`, of one checkpoint, or a file of
            weights.
        train: Labelled shards to train on, or a folder with one folder of images per class.
        test: Labelled shards to classify, or a folder with one folder of images per class.
        out: Folder of the fine-tuning and its result, finetune.json.
        which: The trained encoder (base), or its moving average (default: the one that the
            method evaluates: for DINO, EsViT and ExtreMA the average, else the trained one).
        best: The checkpoint of the highest kNN accuracy, not the newest.
        heads: Attention heads, for a file of a ViT that does not show them.
        mean: Of red, green, blue by which images were normalised, for a file that does not say.
        std: The standard deviations.
        epochs: Passes over the training images (default: 100; 50 for ViT-L).
        batch: Images of a step; 0: 1024, halved until an epoch has 16 steps, down to 32.
        lr: Rate of the head for 256 images (default: 5e-4; 1e-3 for ViT-L).
        weight_decay: Weight decay of AdamW, except of biases, norms, class token and positions.
        warmup_epochs: Epochs of warm-up (default: epochs / 20; / 10 for ViT-L).
        layer_decay: Factor of the rate from a layer to the one before it (default: 0.65 for a
            ViT, 0.75 for ViT-L, otherwise 1).
        layer_decay_by: Layers of a ConvNeXt V2: its blocks, or its stages with a layer for three
            blocks of the third (group).
        drop_path: Rate of stochastic depth of the last block (default: 0.1; 0.2 for ViT-L,
            0 for a ResNet).
        label_smoothing: Share of the target that is spread over all classes.
        mixup: Parameter of the Beta distribution; 0: none.
        cutmix: That of cutmix; 0: none.
        crop_min: Smallest share of an image's area in a crop; default: 0.08, and for images of at
            most 64 pixels, crops and flips of the run's first view.
        pooling: Feature of a ViT; default: mean_norm, of the patch tokens, after masked methods.
        seed: Of the head, the order, the views and the mixing.
        log: How progress is shown; json is for programs.
        json: Print JSON instead of text.
    """
    given = locals()
    options = FineTuning(**{field.name: given[field.name] for field in fields(FineTuning)})
    return run_logged(
        log,
        lambda: _finetune(
            run,
            train,
            test,
            out,
            options,
            which,
            best,
            heads,
            mean=mean,
            std=std,
            as_json=json,
        ),
    )


def _finetune(
    run: Path,
    train: str,
    test: str,
    out: Path,
    options: FineTuning,
    which: Literal["base", "momentum"] | None,
    best: bool,
    heads: int | None,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    as_json: bool,
) -> int:
    """Train or continue, and print the result; returns the exit code."""
    say_first(f"fine-tuning of {run}: importing torch")
    with one_line(EXIT_REFUSED, ValueError, OSError), of_options({"train": train, "test": test}):
        with collection_paused():
            from fastmoco.training.finetune import finetune_result
            from fastmoco.training.source_model import log_every, model_config, prepare

        source, train, test = read_labelled(
            run,
            train,
            test,
            which=which,
            best=best,
            heads=heads,
            normalised=normalisation(mean, std),
            needed_by="fine-tuning",
        )
        images = _images(train)
        config = fine_tuning(
            model_config(source),
            source.image,
            options,
            train=train,
            test=test,
            images=images,
            before=source.config,
        )
        every = log_every(images // config.global_batch_size)
        config = replace(config, log_every_steps=every)
        config = prepare(source, config, out)
        code, reports = run_to_result(config, out)
        if not reports:
            return code
        found = finetune_result(out)
        line = json_module.dumps(found)
        write_file(out / RESULT, f"{line}\n".encode())
        if as_json or json_log() is not None:
            print_result(line)
            return EXIT_FINISHED
        settings = found["settings"]
        show_accuracies(found, f"epoch {found['epoch']:g}, the last")
        at_best = found["best"]
        show_accuracies(at_best, f"epoch {at_best['epoch']:g}, the best of all on the test images")
        show(
            f"{found['images']:,} test images, {found['classes']} classes; {settings['epochs']:g} "
            f"epochs on {found['train_images']:,} images, lr {settings['lr']:g}"
        )
        show(f"wrote {out / RESULT}")
    return EXIT_FINISHED


def _images(pattern: str) -> int:
    """Images of a set."""
    from fastmoco_pipelines import ShardSet

    with ShardSet.open(pattern) as shards:
        return len(shards)
