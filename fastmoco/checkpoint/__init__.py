"""The whole state or nothing: what a save writes, in which order, and what loading refuses to believe.

One fresh folder a save, never written twice::

    root/step_00000123/tensors.safetensors       written by a process alone: weights, twin, buffers, optimizer moments
                       .metadata, __R_N.distcp   instead, written by several ranks (torch.distributed.checkpoint)
                       state.json                everything that is not a tensor
                       COMMITTED                 JSON: step, ranks, time, run, size and SHA-256 of every file and of itself

The files are written into a hidden folder beside the final one and flushed to the disk; when those of all ranks are there
the folder gets its name by one rename; the marker comes last. So a process killed at any moment leaves either a folder
whose marker vouches for every byte or a folder without a marker, which is no checkpoint and is ignored. Loading reads
every byte for its SHA-256 before anything is parsed, falls back to the checkpoint before if one differs, and says so.
Nothing is executed on loading: the formats are safetensors and JSON, `.metadata` is read by an unpickler that knows
DCP's classes alone, and files that the marker does not name are never opened.
"""

from fastmoco.checkpoint.errors import CheckpointError
from fastmoco.checkpoint.folder import list_checkpoints, require_writable, unfinished_saves
from fastmoco.checkpoint.inspection import Verdict, consolidate, inspect_checkpoints
from fastmoco.checkpoint.loading import Checkpoint, load_checkpoint, load_latest
from fastmoco.checkpoint.optimizer_state import flatten_optimizer, restore_optimizer
from fastmoco.checkpoint.ranks import group_for_saving, on_every_rank
from fastmoco.checkpoint.saver import Saver
from fastmoco.checkpoint.store import JSON, save_checkpoint

__all__ = [
    "JSON",
    "Checkpoint",
    "CheckpointError",
    "Saver",
    "Verdict",
    "consolidate",
    "flatten_optimizer",
    "group_for_saving",
    "inspect_checkpoints",
    "list_checkpoints",
    "load_checkpoint",
    "load_latest",
    "on_every_rank",
    "require_writable",
    "restore_optimizer",
    "save_checkpoint",
    "unfinished_saves",
]
