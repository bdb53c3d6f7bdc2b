"""A run that starts from the encoder of an evaluation: its model config, and the file that it
starts from."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save

from fastmoco.config import Config, ModelConfig
from fastmoco.errors import RunError
from fastmoco.models.encoder import trunk_of
from fastmoco.models.encoder_file import CUSTOM, EncoderDescription, SwinDescription, describe_run
from fastmoco.training.encoder_source import EncoderSource
from fastmoco_pipelines.files.small import UnfitFileError, read_json
from fastmoco_pipelines.files.whole import write_file

ENCODER = "encoder.safetensors"
"""File of the encoder in the folder of the run."""
FACTS = "source.json"
"""File of the facts of its source there, the first that is written."""
RUN_ENTRIES = ("config.json", "checkpoints")
"""What the folder of any run contains."""


def model_config(source: EncoderSource, **changes: Any) -> ModelConfig:
    """The config of a source's encoder, with every parameter trainable that it lets train.

    Args:
        source: a run or a file.
        changes: other fields, e.g. `drop_path`.

    Raises:
        ValueError: if no architecture has this shape, or a change does not suit the encoder.
    """
    found = source.description
    if found is None or found.architecture == CUSTOM:
        raise ValueError(
            f"source={source.facts['source']!r}: no architecture of fastmoco has the shape of this "
            "encoder, so no run can train it; give an encoder of a size in docs/encoder.md"
        )
    known: dict[str, Any] = {
        "architecture": found.architecture,
        "image_size": found.image.size,
        "attention": "auto",
        "linears": "native",
        "momentum_linears": "native",
        "drop_path": 0.0,
        "keep_tokens": "1",
        "patch_schedule": "",
        "init": "",
    }
    if isinstance(found, EncoderDescription):
        known |= {
            "patch_size": found.patch_size,
            "pooling": found.pooling,
            "positions": found.positions,
            "mlp_norm": found.mlp_norm,
            "freeze_patch_embed": False,
        }
    if isinstance(found, SwinDescription):
        known |= {"window": found.window, "norm_eps": found.norm_eps}
    base = source.config.model if source.config is not None else ModelConfig()
    return replace(base, **(known | changes))


def read_facts(out: Path) -> dict[str, Any]:
    """The facts of the source of a run.

    Raises:
        RunError: if the file is missing, or no JSON object.
    """
    try:
        found = read_json(out / FACTS, follow=False)
    except (OSError, UnfitFileError) as error:
        raise RunError(f"{error}; choose another --out") from error
    if not isinstance(found, dict):
        raise RunError(f"{out / FACTS}: holds no JSON object; choose another --out")
    return found


def log_every(steps_per_epoch: int) -> int:
    """Steps between two log lines, so that the last step of each epoch has one.

    Accuracy is measured at steps that are logged. It is the largest divisor of an epoch between 5
    and 100, otherwise the epoch.
    """
    return next((n for n in range(100, 4, -1) if steps_per_epoch % n == 0), max(1, steps_per_epoch))


def prepare(source: EncoderSource, config: Config, out: Path) -> Config:
    """Write the encoder into the folder of a run, and return the config that starts from it.

    Each process writes the same. A run that continues must have the same source.

    Raises:
        RunError: if the run in the folder began with another encoder, is another run, or its
            file of facts is damaged or a link.
        OSError: if the folder cannot be written.
    """
    facts = json.loads(json.dumps(source.facts))
    if os.path.lexists(out / FACTS):
        before = read_facts(out)
        names = sorted((facts.keys() | before.keys()) - {"source"})  # whose name may change
        differ = [name for name in names if facts.get(name) != before.get(name)]
        if differ:
            changes = ", ".join(f"{n} {before.get(n)!r} -> {facts.get(n)!r}" for n in differ)
            raise RunError(
                f"{out}: the run there began with another encoder ({changes}); name its checkpoint "
                "in place of the run, or choose another --out"
            )
    else:
        # `consolidate` suggests a file of this name in the folder of a run.
        others = [name for name in (ENCODER, *RUN_ENTRIES) if (out / name).exists()]
        if others:
            raise RunError(
                f"{out} is the folder of another run: it has {' and '.join(others)}; choose another "
                "--out"
            )
    out.mkdir(parents=True, exist_ok=True)
    state = trunk_of(source.encoder.state_dict())
    trunk = {name: value.cpu().contiguous() for name, value in state.items()}
    write_file(out / FACTS, json.dumps(facts).encode() + b"\n", mode=0o600)
    write_file(out / ENCODER, save(trunk, describe_run(config).to_metadata()), mode=0o600)
    return replace(config, model=replace(config.model, init=str(out / ENCODER)))
