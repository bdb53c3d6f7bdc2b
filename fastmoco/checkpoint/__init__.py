"""The whole state or nothing: what a save writes, in which order, and what loading refuses to believe.

One fresh folder a save, never written twice::

    root/step_00000123/tensors.safetensors    weights, twin, buffers, optimizer moments
                       state.json             everything that is not a tensor
                       COMMITTED              JSON: step, and size and SHA-256 of the other two

Both files are written into a hidden folder beside the final one and flushed to the disk; the folder gets its name by
one rename; the marker comes last. So a process killed at any moment leaves either a folder whose marker vouches for
every byte or a folder without a marker, which is no checkpoint and is ignored. Loading reads every byte for its
SHA-256 before anything is parsed, falls back to the checkpoint before if one differs, and says so. Nothing is executed
on loading: the formats are safetensors and JSON, and files that the marker does not name are never opened.
"""

from fastmoco.checkpoint.errors import CheckpointError
from fastmoco.checkpoint.folder import list_checkpoints, unfinished_saves
from fastmoco.checkpoint.optimizer_state import flatten_optimizer, restore_optimizer
from fastmoco.checkpoint.store import JSON, Checkpoint, load_checkpoint, load_latest, save_checkpoint

__all__ = [
    "JSON",
    "Checkpoint",
    "CheckpointError",
    "flatten_optimizer",
    "list_checkpoints",
    "load_checkpoint",
    "load_latest",
    "restore_optimizer",
    "save_checkpoint",
    "unfinished_saves",
]
