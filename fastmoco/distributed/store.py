"""A connection to the ranks' rendezvous store, for messages outside of the process group."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from fastmoco.distributed.mesh import World

StoreTimeoutError: type[RuntimeError] = dist.DistStoreError
"""Raised if the store does not answer in time because its process hangs."""


def connect(world: World, timeout_s: float = 30.0) -> Any:
    """Open a new connection to the store of the ranks.

    The connection of the process group may be in use by another thread.
    """
    host = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(host, port, is_master=False, timeout=timeout)  # type: ignore[attr-defined]
    # A launcher keeps its store when it restarts the ranks, so keys contain the attempt.
    return dist.PrefixStore(f"fastmoco/{world.attempt}", store)  # type: ignore[attr-defined]
