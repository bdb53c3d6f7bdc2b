"""Check the environment for variables that would disable a safeguard, before
any library reads it.
"""

from __future__ import annotations

from collections.abc import MutableMapping

FORBIDDEN = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
DROPPED = ("GOPEN_REWRITE", "GOPEN_VERBOSE", "GOPEN_BUFFER", "WDS_")
"""Variables (or prefixes) of other readers that may be installed; the first
turns a path into a shell command."""


def clean_environment(environment: MutableMapping[str, str]) -> None:
    """Refuse the variable that lets torch unpickle any file; remove those of
    readers that fastmoco does not use.

    Raises:
        ValueError: if that variable is set.
    """
    if environment.get(FORBIDDEN, "").lower() in ("1", "y", "yes", "true"):
        raise ValueError(
            f"{FORBIDDEN}={environment[FORBIDDEN]} is set: with it every file that torch loads may "
            "run code as you. "
            f"Start again without it (unset {FORBIDDEN}); fastmoco loads tensors only and never "
            "needs it"
        )
    for name in [name for name in environment if name.startswith(DROPPED)]:
        del environment[name]
