"""glibc's heaps, shared by all threads of a process: kept apart, each hoards what its busiest
moment took.

malloc gives a thread that finds no free heap ("arena") one of its own, up to eight for each core,
and none of them is given back. DALI starts about 25 threads for each pipeline, hence after each
image that it refuses; a remote set's transfers are threads that come and go too. Each time others
land on other arenas, and RSS climbs towards the number of arenas times the largest of their needs,
while the memory in use stays what it was. docs/data.md has the figures, and what else malloc keeps.
"""

from __future__ import annotations

import ctypes
import gc
import os

ARENAS = 4
"""Arenas of a process that loads data: what is common for long-lived servers, and plenty for a
decoder's few large buffers."""
_M_ARENA_MAX = -8  # of malloc.h


def share_arenas(arenas: int = ARENAS) -> bool:
    """Have all threads of this process share a number of arenas, including the first one.

    It works from the start of a process until eight arenas exist: then glibc has settled its limit.
    A user's own `MALLOC_ARENA_MAX` or `GLIBC_TUNABLES` stays. No result depends on it.

    Args:
        arenas: number of arenas at most; at least 1.

    Returns:
        Whether the limit was set: not if the user has set one, nor with another C library.

    Raises:
        ValueError: for fewer than 1.
    """
    if arenas < 1:
        raise ValueError(f"arenas={arenas}: malloc needs one")
    if "MALLOC_ARENA_MAX" in os.environ or "malloc.arena_max" in os.environ.get(
        "GLIBC_TUNABLES", ""
    ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt is not None and mallopt(_M_ARENA_MAX, arenas))


def give_back_memory() -> None:
    """Free dead cycles, DALI's graphs among them, and have glibc give free pages back to the
    system: some tens of ms.

    For moments when much memory has just been released, e.g. the end of a loader.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
