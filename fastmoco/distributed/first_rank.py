"""Long work of rank 0 whose result all ranks need: the others wait without a collective, which would
time out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from fastmoco.distributed.mesh import World
from fastmoco.distributed.store import connect

POLL_SECONDS = 0.5
BEAT_SECONDS = 5.0
SILENCE_SECONDS = 120.0
"""A rank 0 from which nothing came for this time is lost."""


def first_rank_does(world: World, name: str, work: Callable[[], str]) -> str:
    """Run `work` on rank 0, and return its result on all ranks, which call this together.

    Meanwhile rank 0 shows in the store that it is alive, so the work may take hours.

    Args:
        world: this process among its peers.
        name: of the work, unique within a start.
        work: called on rank 0 alone.

    Raises:
        RuntimeError: on the other ranks, if rank 0 has failed or is lost; `first_cause` replaces it
            by the reason.
    """
    if world.world_size == 1:
        return work()
    store = connect(world)
    if world.rank > 0:
        return _result(store, name)
    over = threading.Event()
    beats = threading.Thread(
        target=_beat, args=(connect(world), name, over), name="fastmoco-beat", daemon=True
    )
    beats.start()
    try:
        result = work()
    except BaseException:
        store.set(f"{name}/failed", "1")
        raise
    finally:
        over.set()
        beats.join()
    store.set(f"{name}/result", result)
    return result


def _beat(store: Any, name: str, over: threading.Event) -> None:
    """Count in the store until the work is over."""
    while not over.wait(BEAT_SECONDS):
        store.add(f"{name}/beat", 1)


def _result(store: Any, name: str) -> str:
    """Wait for the result of rank 0."""
    count, heard = -1, time.monotonic()
    while True:
        if store.check([f"{name}/result"]):
            return str(store.get(f"{name}/result").decode())
        if store.check([f"{name}/failed"]):
            raise RuntimeError(f"rank 0 failed ({name})")
        now = store.add(f"{name}/beat", 0)
        if now != count:
            count, heard = now, time.monotonic()
        if time.monotonic() - heard > SILENCE_SECONDS:
            raise RuntimeError(f"rank 0 has not answered for {SILENCE_SECONDS:.0f} s ({name})")
        time.sleep(POLL_SECONDS)
