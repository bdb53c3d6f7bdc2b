"""The encoder that an evaluation or an export works on: from a run, a checkpoint or a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmoco.checkpoint import CheckpointError
from fastmoco.checkpoint.safetensors_file import read_header
from fastmoco.config import Config
from fastmoco.models.encoder_file import (
    Description,
    LoadedEncoder,
    describe_run,
    description_of,
    encoder_header,
    load_encoder,
)
from fastmoco.models.weights.building import load_foreign
from fastmoco.models.weights.foreign import ENCODERS, Normalised, Which, which_of
from fastmoco.models.weights.reading import is_weights
from fastmoco.training.load_run import load_run
from fastmoco_pipelines.files.whole import hash_file
from fastmoco_pipelines.spec import EvalSpec

__all__ = ["EncoderSource", "Which", "load_source"]


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
        description: its sizes, for building it again; None for an encoder that has none.
        header: where it comes from, as the header of a file.
        networks: the tensors of all networks of the run or file with heads, `encoder.*`,
            `momentum_encoder.*`, `predictor.*`, ...; empty for a file of one encoder.
        notes: what a user should know, in sentences.
    """

    encoder: Any
    image: EvalSpec
    config: Config | None
    step: int
    facts: dict[str, Any]
    description: Description | None = None
    header: Mapping[str, str] = field(default_factory=dict)
    networks: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Sequence[str] = ()


def load_source(
    source: Path,
    device: torch.device | str = "cpu",
    *,
    which: Which | None = None,
    best: bool = False,
    heads: int | None = None,
    normalised: Normalised | None = None,
) -> EncoderSource:
    """Load an encoder to evaluate or to export.

    Args:
        source: folder of a run, or of one checkpoint in it; or weights of moco-v3, timm,
            torchvision, Hugging Face or fastmoco: a file, or a folder of Hugging Face.
        device: of the encoder.
        which: the encoder of a run, or of a checkpoint with two. None: of a run the one that its
            objective evaluates (`Objective.evaluated`), of a file as of `find_encoder`.
        best: the checkpoint with the highest kNN accuracy, in place of the newest.
        heads: attention heads, for a file of a ViT that does not show them.
        normalised: how images were normalised, for a file of another package.

    Raises:
        RunError, CheckpointError: if there is no such encoder, with the cure.
    """
    if is_weights(Path(source)):
        if best:
            raise CheckpointError(
                f"{source} is a file of weights; --best needs the folder of a run"
            )
        return _of_file(Path(source), device, which, heads, normalised)
    objective, config, checkpoint = load_run(source, device, best=best)
    description = describe_run(config)
    _require_heads(source, description.heads, heads)
    _require_unknown(source, normalised)
    which = which or which_of(objective.evaluated)
    name = ENCODERS[which].removesuffix(".")
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
        description=description,
        header={
            **encoder_header(checkpoint),
            "step": str(checkpoint.step),
            "encoder": which,
        },
        networks=objective.state_dict(),
        notes=[f"passed over {path.name}: {reason}" for path, reason in checkpoint.skipped],
    )


def _of_file(
    source: Path,
    device: torch.device | str,
    which: Which | None,
    heads: int | None,
    normalised: Normalised | None,
) -> EncoderSource:
    """The encoder of a file: our own by its header, another one by its names."""
    if _is_ours(source):
        loaded = load_encoder(source, device=device)
        own = "momentum" if loaded.header.get("encoder") == "momentum" else "base"
        if which not in (None, own):
            raise CheckpointError(
                f"{source} is a {own} encoder; leave out --which {which}, or give the run"
            )
        description = description_of(loaded.header)
        _require_heads(source, description.heads, heads)
        _require_unknown(source, normalised)
        step = _step(loaded)
        return EncoderSource(
            encoder=loaded.encoder,
            image=loaded.image,
            config=None,
            step=step,
            facts={
                "source": str(source),
                "sha256": hash_file(source),
                "encoder": own,
                "step": step,
                "header": loaded.header,
            },
            description=description,
            header=loaded.header,
        )
    found = load_foreign(source, which, heads=heads, normalised=normalised, device=device)
    facts = {
        "source": str(source),
        "sha256": hash_file(Path(found.weights.source)),
        "format": found.weights.format,
        "encoder": found.weights.which,
        "step": 0,
        "heads": found.description.heads,
        **{key: value for key, value in found.weights.facts.items() if key != "header"},
    }
    return EncoderSource(
        encoder=found.encoder,
        image=found.description.image,
        config=None,
        step=0,
        facts=facts,
        description=found.description,
        header={
            **found.description.to_metadata(),
            "source_format": found.weights.format,
            "encoder": found.weights.which,
        },
        networks=found.weights.networks,
        notes=found.weights.notes,
    )


def _require_heads(source: Path, own: int | None, given: int | None) -> None:
    """Refuse a number of heads that the source contradicts."""
    if given is not None and given != own:
        has = "no attention heads" if own is None else f"{own} attention heads"
        raise CheckpointError(f"{source} has {has}; leave out --heads {given}")


def _require_unknown(source: Path, given: Normalised | None) -> None:
    """Refuse a normalisation where the source has its own."""
    if given is not None:
        raise CheckpointError(
            f"{source} knows how its images were normalised; leave out --mean and --std"
        )


def _is_ours(source: Path) -> bool:
    """Whether a file has a header of fastmoco."""
    if not source.is_file():
        return False
    try:
        return "architecture" in read_header(source).notes
    except (OSError, ValueError):
        return False


def _step(loaded: LoadedEncoder) -> int:
    value = loaded.header.get("step", "0")
    return int(value) if value.isascii() and value.isdigit() else 0
