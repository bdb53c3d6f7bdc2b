"""The result of a run that has fine-tuned an encoder, for JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastmoco.checkpoint import CheckpointError, find_checkpoint
from fastmoco.config.serial import from_json
from fastmoco.evaluation.confidence import wilson
from fastmoco.run.folder import RunFolder
from fastmoco.training import setup
from fastmoco.training.source_model import FACTS

FIGURES = ("top1", "top5")


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
    monitor = checkpoint.state["monitors"].get("accuracy", {})
    folder = RunFolder(out)
    history = {
        name: {step: value for step, value in folder.read_metric(name) if step} for name in FIGURES
    }
    if not history["top1"] or not monitor.get("classified"):
        raise CheckpointError(
            f"{out}: the run has no accuracy after its first step; delete it and begin again"
        )
    last = max(history["top1"])
    best = max(history["top1"], key=lambda step: (history["top1"][step], -step))
    images, per_epoch = monitor["classified"], checkpoint.state["resolved"]["steps_per_epoch"]

    def shown(step: int) -> dict[str, Any]:
        found: dict[str, Any] = {"epoch": round(step / per_epoch, 3)}
        for name in FIGURES:
            value = history[name][step]
            found[name] = round(value, 6)
            interval = wilson(round(value * images), images)
            found[f"{name}_interval"] = [round(bound, 6) for bound in interval]
        return found

    objective = asdict(config.objective)
    return {
        "protocol": "finetune",
        **shown(last),
        "best": shown(best),
        "images": images,
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
                for name in ("layer_decay", "label_smoothing", "mixup", "cutmix", "head_std")
            },
            "drop_path": config.model.drop_path,
            "crop_scale": config.data.view1.crop_scale,
            "flip_probability": config.data.view1.flip_probability,
            "seed": config.seed,
            "precision": checkpoint.state["resolved"]["precision"],
        },
        "source": json.loads((out / FACTS).read_text()),
        "versions": setup.versions(),
    }
