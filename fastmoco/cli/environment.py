"""Check the environment for variables that would disable a safeguard, before
any library reads it.
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping

from fastmoco_pipelines.spec import MOST_THREADS

FORBIDDEN = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
DROPPED = ("GOPEN_REWRITE", "GOPEN_VERBOSE", "GOPEN_BUFFER", "WDS_")
"""Variables (or prefixes) of other readers that may be installed; the first
turns a path into a shell command."""

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_THREAD_LIMIT")
"""Variables with a number of threads. Libraries read them when they are loaded: they print what is no
number as it is, and end the process for a number that the system does not have."""


def clean_environment(environment: MutableMapping[str, str]) -> None:
    """Refuse the variable that lets torch unpickle any file; remove those of
    readers that fastmoco does not use.

    Raises:
        ValueError: if that variable is set, or if one with a number of threads has none.
    """
    if environment.get(FORBIDDEN, "").lower() in ("1", "y", "yes", "true"):
        raise ValueError(
            f"{FORBIDDEN}={environment[FORBIDDEN]} is set: with it every file that torch loads may "
            "run code as you. "
            f"Start again without it (unset {FORBIDDEN}); fastmoco loads tensors only and never "
            "needs it"
        )
    for name in THREADS:
        text = environment.get(name, "").strip()
        counts = [int(part) for part in text.split(",") if re.fullmatch(r"[0-9]{1,9}", part)]
        valid = len(counts) == text.count(",") + 1 and all(1 <= c <= MOST_THREADS for c in counts)
        if text and not valid:
            raise ValueError(
                f"{name}={environment[name]!r}: must be a whole number from 1 to {MOST_THREADS:,}, "
                f"or several with commas between them; correct it, or unset {name}"
            )
    for name in [name for name in environment if name.startswith(DROPPED)]:
        del environment[name]
