"""The exception of this package."""

from fastmoco.errors import RunError


class CheckpointError(RunError):
    """A checkpoint cannot be written or trusted; the message names it, the reason and the cure."""
