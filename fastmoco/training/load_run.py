"""Load the model of a run from its folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from fastmoco.checkpoint import Checkpoint, CheckpointError, find_checkpoint
from fastmoco.checkpoint.folder import STATE
from fastmoco.config import Config
from fastmoco.config.serial import from_json
from fastmoco.objectives.build import build_objective
from fastmoco.objectives.interface import Objective
from fastmoco.training import state as training_state


def load_run(
    run: Path | str, device: torch.device | str = "cpu", *, best: bool = False
) -> tuple[Objective, Config, Checkpoint]:
    """Load the model of a checkpoint: the newest of a run, its best, or any.

    `objective.encoder` is the trained encoder, `objective.evaluation_encoder` the one that is
    evaluated: for DINO, EsViT and ExtreMA the momentum encoder, else the same. In eval mode it maps
    [B, 3, H, W] images, normalised
    by mean and standard deviation of `config.data.view1`, to [B, E] class-token features. It does
    not apply its `head`, the projector.

    Args:
        run: the folder given to `fastmoco train --out`, or one checkpoint in it
            (`runs/first/checkpoints/step_00000400`).
        device: of the model.
        best: the checkpoint with the highest kNN accuracy, in place of the newest.

    Returns:
        The objective with the trained weights, the config of the run, and the checkpoint.

    Raises:
        RunError: if the folder holds no checkpoint.
        CheckpointError: if it holds checkpoints but none verifies, or none has an accuracy and
            `best` is set.
    """
    checkpoint = find_checkpoint(run, best=best)
    if "config" not in checkpoint.state:
        raise CheckpointError(f"{checkpoint.path} has no config: it is no checkpoint of a run")
    config = from_json(checkpoint.state["config"], file=checkpoint.path / STATE)
    # This device may lack the backends that the run trained with. All attention backends agree to
    # rounding, and native products are more precise than those in float8.
    native = replace(config.model, attention="auto", linears="native", momentum_linears="native")
    anywhere = replace(config, model=native)
    objective = build_objective(anywhere, torch.device(device))
    training_state.restore_model(objective, checkpoint)
    return objective, config, checkpoint
