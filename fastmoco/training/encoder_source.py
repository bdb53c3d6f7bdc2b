"""The encoder that an evaluation or an export works on: from a run, a checkpoint or a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fastmoco.checkpoint import CheckpointError
from fastmoco.config import Config
from fastmoco.models.encoder_file import load_encoder
from fastmoco.training.load_run import load_run
from fastmoco_pipelines.spec import EvalSpec

Which = Literal["base", "momentum"]
"""Which encoder of a run: the trained one, or its moving average."""


@dataclass(frozen=True, kw_only=True)
class EncoderSource:
    """An encoder, and where it comes from.

    Attributes:
        encoder: maps [B, 3, H, W] images, normalised as `image` says, to [B, E] features without
            its `head`; as trained, not in eval mode.
        image: how its images are resized, cropped and normalised.
        config: of the run; None for a file.
        step: optimizer steps of the run; 0 for a file.
        facts: what a report must say of it, for JSON: source, which encoder, step, identity.
        notes: what a user should know, in sentences.
    """

    encoder: Any
    image: EvalSpec
    config: Config | None
    step: int
    facts: dict[str, Any]
    notes: Sequence[str] = ()


def load_source(
    source: Path,
    device: torch.device | str = "cpu",
    *,
    which: Which = "base",
    best: bool = False,
) -> EncoderSource:
    """Load an encoder to evaluate, to export or to start from.

    Args:
        source: folder of a run, or of one checkpoint in it; or a file of weights.
        device: of the encoder.
        which: the encoder of a run. A file of fastmoco has one.
        best: the checkpoint with the highest kNN accuracy, in place of the newest.

    Raises:
        RunError, CheckpointError: if there is no such encoder, with the cure.
    """
    if Path(source).is_file():
        loaded = load_encoder(source, device=device)
        step = int(loaded.header.get("step", 0))
        facts: dict[str, Any] = {"source": str(source), "encoder": which, "step": step}
        return EncoderSource(
            encoder=loaded.encoder,
            image=loaded.image,
            config=None,
            step=step,
            facts=facts | {"header": loaded.header},
        )
    objective, config, checkpoint = load_run(source, device, best=best)
    name = "encoder" if which == "base" else "momentum_encoder"
    if name not in objective.networks():
        raise CheckpointError(
            f"{checkpoint.path}: {config.objective.kind} has no momentum encoder; take the base one"
        )
    facts = {
        "source": str(source),
        "checkpoint": checkpoint.path.name,
        "run_id": checkpoint.run_id,
        "recipe": config.recipe,
        "method": config.objective.kind,
        "encoder": which,
        "step": checkpoint.step,
    }
    return EncoderSource(
        encoder=getattr(objective, name),
        image=config.eval_spec(),
        config=config,
        step=checkpoint.step,
        facts=facts,
        notes=[f"passed over {path.name}: {reason}" for path, reason in checkpoint.skipped],
    )
