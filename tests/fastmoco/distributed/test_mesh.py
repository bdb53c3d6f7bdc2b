"""Ranks of one start find each other through a store that is full of what dead ranks left."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch.distributed as dist

from fastmoco.distributed.mesh import agree_on_attempt


def start(store: dist.Store, ranks: range | list[int], world_size: int) -> list[str]:
    """What each of the ranks comes to; all start at once."""
    found: dict[int, str] = {}

    def join(rank: int) -> Callable[[], None]:
        return lambda: found.update({rank: agree_on_attempt(store, rank, world_size, timeout_s=10)})

    threads = [threading.Thread(target=join(rank), daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return [found[rank] for rank in ranks]


def test_every_start_agrees_on_a_name_of_its_own() -> None:
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=10))
    names = [start(store, range(3), 3) for _ in range(4)]
    assert all(len(set(one)) == 1 for one in names)
    assert len({one[0] for one in names}) == 4


def test_what_a_start_left_that_never_met_does_not_mislead_the_next() -> None:
    """A rank that died before rank 0 answered, and rank 0 itself that died waiting for it."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=10))
    store.set("fastmoco/hello/1", "a dead rank's")
    with pytest.raises(RuntimeError, match=r"ranks \[1, 2\] of 3 did not start within 0 s"):
        agree_on_attempt(store, 0, 3, timeout_s=0.3)
    names = start(store, [2, 0, 1], 3)
    assert len(set(names)) == 1
