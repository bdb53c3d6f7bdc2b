"""Inspect the checkpoints of a run from outside, and export their tensors to
one file for other tools.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from fastmoco.checkpoint.choose import Score, score_in
from fastmoco.checkpoint.errors import CheckpointError
from fastmoco.checkpoint.folder import (
    flush,
    is_committed,
    list_checkpoints,
    read_marker,
    unfinished_saves,
)
from fastmoco.checkpoint.loading import Checkpoint, load_checkpoint
from fastmoco.checkpoint.whole_file import write_whole
from fastmoco_pipelines.files.whole import whole_file


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The result of inspecting one folder.

    Attributes:
        path: the folder.
        step: from its name; -1 if the name has none.
        size: bytes of all its files.
        saved_at: UTC, ISO 8601; "" without a sound marker.
        world_size: ranks that wrote it; 0 without a sound marker.
        committed: whether it has a marker; a folder without one was left by a killed save, and
            every reader ignores it.
        fault: "" if it can be trusted, else the reason why not.
        score: the accuracy measured at its step; None without one, or with a fault.
    """

    path: Path
    step: int
    size: int
    saved_at: str
    world_size: int
    committed: bool
    fault: str
    score: Score | None = None


def inspect_checkpoints(path: Path) -> list[Inspection]:
    """Verify every checkpoint of a folder as loading would, oldest first, and
    report unfinished saves as faults.

    Args:
        path: folder of a run, of its checkpoints, or of one checkpoint.
    """
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints"
    folders = list_checkpoints(path) + unfinished_saves(path)
    if not folders and path.name.startswith("step_") and path.is_dir():
        folders = [path]
    return sorted(
        (_inspect(folder) for folder in folders), key=lambda found: (found.step, found.path)
    )


def _inspect(folder: Path) -> Inspection:
    marker: dict[str, object] = {}
    fault = ""
    score = None
    try:
        marker = read_marker(folder)
        score = score_in(load_checkpoint(folder).state)
    except (ValueError, OSError, CheckpointError) as error:
        fault = str(error)
    digits = folder.name.partition("step_")[2].partition("-")[0]
    return Inspection(
        path=folder,
        step=int(digits) if digits.isdecimal() and digits.isascii() else -1,
        size=sum(file.lstat().st_size for file in folder.iterdir()),
        saved_at=str(marker.get("saved_at", "")),
        world_size=int(str(marker.get("world_size", 0))),
        committed=is_committed(folder),
        fault=fault,
        score=score,
    )


def consolidate(
    checkpoint: Checkpoint,
    out: Path,
    *,
    encoder_only: bool,
    network: str = "encoder",
    header: Mapping[str, str] | None = None,
) -> int:
    """Write the tensors of a checkpoint, saved on any number of ranks, into one safetensors file.

    Args:
        checkpoint: see `load_latest`.
        out: a new file (mode 0600); it is complete or does not exist.
        encoder_only: only an encoder, under its own names (`blocks.0.norm1.weight`), without the
            projector, which has no use after pre-training. Otherwise every tensor, including
            optimizer and momentum encoder.
        network: that encoder, `ObjectiveConfig.evaluated`.
        header: written into the file beside `format` and `step`.

    Returns:
        The number of tensors written.

    Raises:
        CheckpointError: if `out` exists or cannot be written, or the checkpoint has no encoder.
    """
    tensors = checkpoint.tensors
    beginning = f"model.{network}."
    if encoder_only:
        tensors = {
            name.removeprefix(beginning): tensor
            for name, tensor in tensors.items()
            if name.startswith(beginning) and not name.startswith(f"{beginning}head.")
        }
    if not tensors:
        raise CheckpointError(
            f"{checkpoint.path} has no tensors {beginning}*: it is no checkpoint of a run"
        )
    if os.path.lexists(out):
        raise CheckpointError(f"{out} exists; choose another --out")
    try:
        with whole_file(out) as fresh:
            notes = {"format": "pt", "step": str(checkpoint.step), **(header or {})}
            write_whole(fresh, tensors, notes)
        flush(out.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{out} was not written: {error}. Free space or choose another --out"
        ) from error
    return len(tensors)
