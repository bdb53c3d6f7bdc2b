"""When one rank fails, end all ranks soon, and let each report the reason of the first failure.

The first rank that fails writes its reason to the store through which the ranks have met. The other
ranks then fail inside a collective, with an error that only reports a lost peer, and show the
reason from the store instead. A thread of each rank also polls the store, because a collective on a
GPU may wait for a lost peer for a very long time.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastmoco.distributed.mesh import World, lost_a_peer
from fastmoco.distributed.store import connect
from fastmoco.errors import EXIT_FAILED, RunError, say_again
from fastmoco_pipelines import ShardError

_KEY = "first-cause"
_POLL_SECONDS = 0.5
_REASON_SECONDS = 3.0
"""How long a rank that lost a peer waits for the peer's reason; a killed peer writes none."""
GRACE_SECONDS = 10.0
"""Time after the failure of a peer at which a rank that is still running is ended."""
_LONGEST = 4000
_CONNECTION = re.compile(
    r"connection (closed|reset|refused|was closed)|broken pipe|remote process|unhandled system error",
    re.IGNORECASE,
)
"""Words of gloo and NCCL for a peer that has ended."""


class PeerError(RunError):
    """Another rank failed first; the message quotes its reason, which that rank prints too."""

    repeats = True


class LostPeerError(RunError):
    """Another rank has ended and has left no reason. A launcher of our own reports how it ended."""

    repeats = True


@contextmanager
def first_cause(world: World) -> Iterator[None]:
    """A context in which an error of any rank ends all ranks, with the text of the first error.

    Args:
        world: this process among its peers; a single process is not watched.

    Raises:
        PeerError: instead of a later error; quotes the rank that failed first.
    """
    if world.world_size == 1:
        yield
        return

    store = connect(world)
    over = threading.Event()
    watcher = threading.Thread(
        target=_watch, args=(connect(world), over), name="fastmoco-peers", daemon=True
    )
    watcher.start()
    try:
        yield
    except Exception as error:
        # A lost peer is a consequence: its reason is the first cause.
        echo = lost_a_peer(error)
        first = _reported(store, _REASON_SECONDS if echo else 0.0)
        if first is None:
            mine = _storable(f"rank {world.rank}: {_words(error)}")
            first = report(store, mine)
            if first == mine:
                if echo and _CONNECTION.search(str(error)):
                    # Not a fault of this rank: a traceback would only lead to the collective.
                    raise LostPeerError(f"{mine.partition('. ')[0]}: a peer has ended") from error
                raise
        raise PeerError(f"ended by the failure of {first}") from (None if echo else error)
    finally:
        over.set()


def _words(error: Exception) -> str:
    """The message of an error, with its type unless the message was written for users."""
    return (
        str(error)
        if isinstance(error, (RunError, ShardError, ValueError))
        else f"{type(error).__name__}: {error}"
    )


def _storable(text: str) -> str:
    """Not too long, with names of files that are not UTF-8 escaped: the store takes UTF-8 only."""
    return text.encode("utf-8", "backslashreplace").decode()[:_LONGEST]


def report(store: Any, text: str) -> str:
    """Write a reason to the store unless it contains one; return the one that it contains then."""
    try:
        first = store.compare_set(_KEY, "", text)
    except (RuntimeError, ValueError):  # the store ended with the rank that hosted it
        return text
    first = first.decode() if isinstance(first, bytes) else str(first)
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and first == text:  # torchrun's final report quotes it
        content = {
            "message": text,
            "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))},
        }
        with open(path, "w") as file:
            json.dump({"message": content}, file)
    return first


def _reported(store: Any, wait_seconds: float) -> str | None:
    """The reason of the rank that failed first, or None if there is none within the time."""
    until = time.monotonic() + wait_seconds
    while True:
        try:
            if store.check([_KEY]):
                return str(store.get(_KEY).decode())
        except RuntimeError:
            return None
        if time.monotonic() >= until:
            return None
        time.sleep(0.05)


def _watch(store: Any, over: threading.Event) -> None:
    """End this process some time after a peer has failed, unless it ends on its own."""
    while not over.wait(_POLL_SECONDS):
        first = _reported(store, 0.0)
        if first is not None and not over.wait(GRACE_SECONDS):
            say_again(f"ended by the failure of {first}")
            os._exit(EXIT_FAILED)  # an exception cannot interrupt the main thread inside a library
