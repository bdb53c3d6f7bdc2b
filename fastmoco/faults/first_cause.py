"""When one rank fails, all end soon, and every one of them says why the first one did.

The first rank that fails leaves its reason in the store through which the ranks have met. The others then break off in the
middle of an exchange, with an error that only says that a peer is gone: they show the reason instead. A thread of each
rank looks at the store too: an exchange on a GPU may wait for a lost peer much longer than anybody wants to.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastmoco.distributed.mesh import World, lost_a_peer
from fastmoco.distributed.store import connect
from fastmoco.errors import EXIT_FAILED, RunError, say
from fastmoco_pipelines import ShardError

_KEY = "first-cause"
_LOOK_SECONDS = 0.5
_TELL_SECONDS = 3.0
"""How long a rank whose peer is gone waits for that peer's reason: one that was killed leaves none."""
GRACE_SECONDS = 10.0
"""After a peer has failed, a rank that is still in the middle of something is ended."""
_LONGEST = 4000


class PeerError(RunError):
    """Another rank failed first; the text quotes it."""


@contextmanager
def first_cause(world: World) -> Iterator[None]:
    """Within it, an error of any rank ends all ranks, with that error's text.

    Args:
        world: this process among its peers; alone it needs none of this.

    Raises:
        PeerError: in the place of a later error, quoting the peer that failed first.
    """
    if world.world_size == 1:
        yield
        return
    store, over = connect(world), threading.Event()
    watcher = threading.Thread(target=_watch, args=(connect(world), over), name="fastmoco-peers", daemon=True)
    watcher.start()
    try:
        yield
    except Exception as error:
        echo = lost_a_peer(error)
        first = _reported(store, _TELL_SECONDS if echo else 0.0)
        if first is None:
            mine = f"rank {world.rank}: {_words(error)}"[:_LONGEST]
            first = report(store, mine)
            if first == mine:
                raise
        raise PeerError(f"ended by the failure of {first}") from (None if echo else error)
    finally:
        over.set()


def _words(error: Exception) -> str:
    """The text alone where it was written for people."""
    return str(error) if isinstance(error, (RunError, ShardError, ValueError)) else f"{type(error).__name__}: {error}"


def report(store: Any, text: str) -> str:
    """Leave a reason unless there is one; returns the one that is there then."""
    try:
        first = store.compare_set(_KEY, "", text)
    except (RuntimeError, ValueError):  # the store went down with the rank that held it
        return text
    first = first.decode() if isinstance(first, bytes) else str(first)
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and first == text:  # torchrun's closing report quotes it
        content = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))}}
        with open(path, "w") as file:
            json.dump({"message": content}, file)
    return first


def _reported(store: Any, wait_seconds: float) -> str | None:
    """The reason that the first rank left, if there is one within a time."""
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
    """End this process some time after a peer has failed, unless it ends by itself."""
    while not over.wait(_LOOK_SECONDS):
        first = _reported(store, 0.0)
        if first is not None and not over.wait(GRACE_SECONDS):
            say(f"ended by the failure of {first}")
            os._exit(EXIT_FAILED)  # the main thread waits in a library, where no exception reaches it
