"""The result of a run that has fine-tuned an encoder, for JSON."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastmoco.checkpoint import find_checkpoint
from fastmoco.config.serial import from_json
from fastmoco.training import setup
from fastmoco.training.accuracies import read_accuracies
from fastmoco.training.source_model import read_facts


def finetune_result(out: Path) -> dict[str, Any]:
    """Accuracies after the last epoch and after the best one, settings, and facts of the source.

    The best epoch is chosen on the test images, so its accuracy is too high by a little: `top1` is
    that of the last epoch.

    Args:
        out: folder of a finished run.

    Raises:
        CheckpointError: if the run has no accuracy.
    """
    checkpoint = find_checkpoint(out)
    config = from_json(checkpoint.state["config"])
    measured = read_accuracies(out, checkpoint)
    objective = asdict(config.objective)
    return {
        "protocol": "finetune",
        **measured.of(measured.last),
        "best": measured.of(measured.best),
        "images": measured.images,
        "train_images": checkpoint.state["resolved"]["sample_count"],
        "classes": objective["classes"],
        "run": str(out),
        "settings": {
            "epochs": config.epochs,
            "warmup_epochs": config.optim.warmup_epochs,
            "batch": config.global_batch_size,
            "lr": config.optim.lr,
            "weight_decay": config.optim.weight_decay,
            "betas": config.optim.betas,
            **{
                name: objective[name]
                for name in (
                    "layer_decay",
                    "layer_decay_by",
                    "label_smoothing",
                    "mixup",
                    "cutmix",
                    "head_std",
                )
            },
            "drop_path": config.model.drop_path,
            "crop_scale": config.data.view1.crop_scale,
            "flip_probability": config.data.view1.flip_probability,
            "seed": config.seed,
            "precision": checkpoint.state["resolved"]["precision"],
        },
        "source": read_facts(out),
        "versions": setup.versions(),
    }
