"""The one exception of this package."""

from fastmoco.errors import RunError


class CheckpointError(RunError):
    """A checkpoint cannot be written or believed; the text says which, why, and what to do."""
