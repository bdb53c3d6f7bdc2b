"""The store through which the ranks have met, as a notice board beside the process group."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from fastmoco.distributed.mesh import World

StoreTimeoutError: type[RuntimeError] = dist.DistStoreError
"""The store has not answered in time: its holder hangs."""


def connect(world: World, timeout_s: float = 30.0) -> Any:
    """A new connection to the store of the ranks.

    That of the process group may be busy in another thread.
    """
    host = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(host, port, is_master=False, timeout=timeout)  # type: ignore[attr-defined]
    # A launcher that restarts the ranks keeps its store.
    return dist.PrefixStore(f"fastmoco/{world.attempt}", store)  # type: ignore[attr-defined]
