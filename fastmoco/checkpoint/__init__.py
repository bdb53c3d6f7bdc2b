"""Checkpoints: a save is complete or does not exist, and a load verifies every byte first.

Each save makes a new folder::

    root/step_00000123/tensors.safetensors       one process: weights, momentum encoder, buffers, moments
                       .metadata, __R_N.distcp   or several ranks: torch.distributed.checkpoint
                       state.json                everything that is not a tensor
                       COMMITTED                 size and SHA-256 of every file, written last

README.md beside this file describes the order of writes and what a load refuses.
"""

from fastmoco.checkpoint.choose import Score, find_checkpoint, load_best, score_in
from fastmoco.checkpoint.errors import CheckpointError
from fastmoco.checkpoint.folder import (
    list_checkpoints,
    read_state,
    require_writable,
    unfinished_saves,
)
from fastmoco.checkpoint.inspection import Inspection, consolidate, inspect_checkpoints
from fastmoco.checkpoint.loading import Checkpoint, load_checkpoint, load_latest
from fastmoco.checkpoint.optimizer_state import flatten_optimizer, restore_optimizer
from fastmoco.checkpoint.ranks import group_for_saving, on_every_rank
from fastmoco.checkpoint.saver import Saver
from fastmoco.checkpoint.store import JSON, save_checkpoint

__all__ = [
    "JSON",
    "Checkpoint",
    "CheckpointError",
    "Inspection",
    "Saver",
    "Score",
    "consolidate",
    "find_checkpoint",
    "flatten_optimizer",
    "group_for_saving",
    "inspect_checkpoints",
    "list_checkpoints",
    "load_best",
    "load_checkpoint",
    "load_latest",
    "on_every_rank",
    "read_state",
    "require_writable",
    "restore_optimizer",
    "save_checkpoint",
    "score_in",
    "unfinished_saves",
]
