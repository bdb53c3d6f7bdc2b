"""The exceptions of checkpoints."""

import sys

from safetensors import SafetensorError

from fastmoco.errors import RunError


class CheckpointError(RunError):
    """A checkpoint cannot be written or trusted; the message names it, the reason and the cure."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose damage is proven: files that are missing or differ from their SHA-256."""


class DamageError(ValueError):
    """Files of a checkpoint are missing, or differ from what was written; the message names them."""


def storage_errors() -> tuple[type[BaseException], ...]:
    """What writing and reading tensors may raise, for an `except` clause.

    The class of torch.distributed.checkpoint is among them once that package is imported; before,
    nothing can raise it.
    """
    known = (OSError, RuntimeError, ValueError, MemoryError, SafetensorError)
    api = sys.modules.get("torch.distributed.checkpoint.api")
    return known if api is None else (*known, api.CheckpointException)
