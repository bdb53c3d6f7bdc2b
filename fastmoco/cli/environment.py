"""What the process finds in its environment, before anything reads it: switches that would undo a safeguard."""

from __future__ import annotations

from collections.abc import MutableMapping

FORBIDDEN = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
DROPPED = ("GOPEN_REWRITE", "GOPEN_VERBOSE", "GOPEN_BUFFER", "WDS_")
"""Variables, or beginnings of them, of readers that may be installed too; the first turns a path into a shell command."""


def clean_environment(environment: MutableMapping[str, str]) -> None:
    """Refuse the switch that lets torch unpickle whatever it loads; drop those of readers that are not used here.

    Raises:
        ValueError: if the switch is on.
    """
    if environment.get(FORBIDDEN, "").lower() in ("1", "y", "yes", "true"):
        raise ValueError(
            f"{FORBIDDEN}={environment[FORBIDDEN]} is set: with it every file that torch loads may run code as you. "
            f"Start again without it (unset {FORBIDDEN}); fastmoco loads tensors only and never needs it"
        )
    for name in [name for name in environment if name.startswith(DROPPED)]:
        del environment[name]
