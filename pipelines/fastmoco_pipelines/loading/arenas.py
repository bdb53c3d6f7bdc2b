"""Settings of glibc's malloc for this process: a few of its heaps ("arenas") for all threads, so
that memory stays flat; and freed blocks that stay, where a trainer computes on the CPU.

malloc gives a thread that finds no free arena one of its own, up to eight for each core, and each
keeps the memory of its peak. DALI starts about 25 threads for each pipeline, and a new pipeline
after each image that it refuses; transfers of a remote set are short-lived threads too. Over time
threads use all arenas, and RSS grows towards their number times the largest peak, while the memory
in use stays the same. docs/data.md has the figures, and what else malloc keeps.
"""

from __future__ import annotations

import ctypes
import gc
import os

ARENAS = 4
"""Arenas of a process that loads data: what is common for long-lived servers, and plenty for a
decoder's few large buffers."""
# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_NEVER = -1  # of the trim threshold
_OWN_THRESHOLDS = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


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


def keep_freed_memory() -> bool:
    """Have glibc keep what this process frees, for its next allocations.

    Otherwise it gives each freed block above 32 MiB back to the system and takes the next one from
    it, page by page, zeroed: for a training step on a CPU, which allocates the same tensors in
    each step, a fifth of the time. RSS then stays at its peak until `give_back_memory`. No result
    depends on it.

    Returns:
        Whether it was set: not if the user has set one of the three `MALLOC_*` variables of it or
        `GLIBC_TUNABLES` for it, nor with another C library.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if any(name in os.environ for name in _OWN_THRESHOLDS) or any(
        f"malloc.{name}" in tunables for name in ("mmap_max", "mmap_threshold", "trim_threshold")
    ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))


def give_back_memory() -> None:
    """Free dead cycles, DALI's graphs among them, and have glibc give free pages back to the
    system: some tens of ms.

    For moments when much memory has just been released, e.g. the end of a loader.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
