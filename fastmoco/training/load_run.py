"""From the folder of a run to its model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from fastmoco.checkpoint import Checkpoint, load_latest
from fastmoco.config import Config
from fastmoco.config.serial import from_json
from fastmoco.errors import no_checkpoint
from fastmoco.objectives.build import build_objective
from fastmoco.objectives.interface import Objective
from fastmoco.run.folder import RunFolder
from fastmoco.training import state as training_state


def load_run(run: Path | str, device: torch.device | str = "cpu") -> tuple[Objective, Config, Checkpoint]:
    """The model of a run's newest checkpoint.

    ``objective.encoder`` is the trained encoder: in eval mode it maps [B, 3, H, W] images, normalised as ``config.data.view1``
    says, to [B, E] class-token features; its ``head`` (the projector) is not part of that.

    Args:
        run: the folder given to `fastmoco train --out`.
        device: where the model goes.

    Returns:
        The objective with its weights, the run's config, and the checkpoint they came from.

    Raises:
        RunError: if the folder holds no checkpoint.
        CheckpointError: if it holds checkpoints and none verifies.
    """
    checkpoint = load_latest(RunFolder(Path(run)).checkpoints)
    if checkpoint is None:
        raise no_checkpoint(run)
    config = from_json(checkpoint.state["config"])
    # What a run trained with may not run on this device: all backends of attention agree to rounding, and float8 is one.
    native = replace(config.model, attention="auto", linears="native", momentum_linears="native")
    anywhere = replace(config, model=native)
    objective = build_objective(anywhere, torch.device(device))
    training_state.restore_model(objective, checkpoint)
    return objective, config, checkpoint
