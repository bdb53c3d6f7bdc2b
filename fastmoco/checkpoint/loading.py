"""Verify and read checkpoints, of both layouts, on any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from fastmoco.checkpoint.dcp_metadata import read_metadata
from fastmoco.checkpoint.errors import CheckpointError
from fastmoco.checkpoint.folder import METADATA, STATE, TENSORS, list_checkpoints, step_of, verify
from fastmoco.checkpoint.shards import read_shards_into, shard_entries
from fastmoco.checkpoint.whole_file import read_whole_into, whole_entries


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose every byte was verified; its tensors are read when they are asked for.

    Attributes:
        step: optimizer steps done when it was saved.
        state: the JSON part; tuples come back as lists.
        path: its folder.
        entries: shape and dtype of every tensor by name, as tensors on the meta device.
        run_id: of the run that wrote it; "" if it was saved outside a run.
        skipped: newer committed folders that could not be believed, newest first, each with the reason. Print them.
        metadata: where DCP finds each piece of the tensors; None where one process wrote one file.
    """

    step: int
    state: dict[str, Any]
    path: Path
    entries: Mapping[str, Tensor]
    run_id: str = ""
    skipped: tuple[tuple[Path, str], ...] = ()
    metadata: Metadata | None = None

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor whole, on the CPU, contiguous, in the dtype it was saved in; they own their memory.

        Raises:
            CheckpointError: if the files have changed since they were verified.
        """
        whole = {name: torch.empty_like(entry, device="cpu") for name, entry in self.entries.items()}
        self.read_into(whole)
        return whole

    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        """Fill tensors in place, of a sharded one this rank's part: no rank ever holds more. Nothing is sent.

        Args:
            targets: by name, plain or sharded over any number of ranks, on any device; values of another dtype are
                converted. Entries that are not named are not read.

        Raises:
            CheckpointError: naming what is missing or of another shape, or if the files have changed.
        """
        missing = [name for name in targets if name not in self.entries]
        if missing:
            raise CheckpointError(f"{self.path} has no {missing[:5]}; was the model changed since the save?")
        for name, target in targets.items():
            if target.shape != self.entries[name].shape:
                raise CheckpointError(
                    f"{self.path}: {name} has shape {tuple(self.entries[name].shape)}, the model's "
                    f"{tuple(target.shape)}; was the model changed since the save?"
                )
        plain = {name: target.detach() for name, target in targets.items()}
        try:
            if self.metadata is None:
                read_whole_into(self.path / TENSORS, plain)
            else:
                read_shards_into(self.path, self.metadata, plain)
        except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
            raise CheckpointError(
                f"{self.path} cannot be read any more: {error}. Run the same command again."
            ) from error


Admit: TypeAlias = Callable[[Path, str], None]
"""Told a folder whose every byte is as its marker says, and the id of the run that wrote it; raises what refuses it."""


def load_latest(
    root: Path, *, among: Callable[[int], bool] = lambda step: True, admit: Admit = lambda path, run_id: None
) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None where nothing was ever committed.

    Every rank hashes every file by itself: what a rank reads is what it has checked.

    Args:
        root: folder of the run's checkpoints.
        among: which steps count; the others are not looked at.
        admit: what it raises is raised here: a checkpoint that is refused is not passed over.

    Returns:
        The checkpoint, with every newer one that was passed over and why in `skipped`.

    Raises:
        CheckpointError: if committed folders exist and none verifies. Starting from scratch is the user's decision.
    """
    skipped: list[tuple[Path, str]] = []
    for path in reversed([path for path in list_checkpoints(root) if among(step_of(path))]):
        try:
            loaded = load_checkpoint(path, admit=admit)
        except CheckpointError as error:
            skipped.append((path, str(error)))
            continue
        return replace(loaded, skipped=tuple(skipped))
    if not skipped:
        return None
    reasons = "\n  ".join(reason for _, reason in skipped)
    raise CheckpointError(
        f"{root}: {len(skipped)} checkpoint(s) exist and none can be trusted:\n  {reasons}\n"
        f"Put back an intact copy of one of these folders, or move {root} away to start from scratch."
    )


def load_checkpoint(path: Path, *, admit: Admit = lambda path, run_id: None) -> Checkpoint:
    """Verify one committed folder and open it; `admit` is asked in between, before anything is parsed.

    Raises:
        CheckpointError: naming the file that is missing, changed, unreadable or hostile, and the cure.
    """
    cure = f"Restore {path.name} from a copy, or remove it to continue from an earlier checkpoint."
    try:
        promised = verify(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}. {cure}") from error
    run_id = promised["run_id"]
    admit(path, run_id)
    try:
        state = json.loads((path / STATE).read_bytes())
        if not isinstance(state, dict):
            raise ValueError(f"{STATE} holds a {type(state).__name__} where an object is due")
        metadata = None
        if METADATA in promised["files"]:
            metadata = read_metadata(path / METADATA, promised["files"])
        entries = whole_entries(path / TENSORS) if metadata is None else shard_entries(metadata)
    except (OSError, ValueError, RecursionError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {error}. {cure}") from error
    return Checkpoint(step=promised["step"], state=state, path=path, entries=entries, run_id=run_id, metadata=metadata)
