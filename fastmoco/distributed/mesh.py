"""The rank and device of this process, and the only place where a process group starts and ends."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from fastmoco.config.launched import Launched, read_launcher
from fastmoco.errors import RunError, say

WAIT_SECONDS = 20.0
"""Time after which a process reports that it waits for the others at the start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The ranks, counts and device of one process of a run."""

    rank: int = 0
    """This process's number, from 0 to `world_size - 1`."""
    world_size: int = 1
    """Number of processes of the run."""
    local_rank: int = 0
    """This process's number on its own machine: the index of its GPU."""
    local_world_size: int = 1
    """Number of processes on this machine."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Device of this process's model and batches."""
    attempt: str = ""
    """A name that only the ranks of this start share, not those of an earlier
    start under the same launcher."""


def _device_of(device: Literal["auto", "cpu", "gpu", "cuda"], local_rank: int) -> torch.device:
    if device not in ("auto", "cpu", "gpu", "cuda"):
        raise ValueError(f'device={device!r}: is "auto", "cpu" or "gpu"')
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 0:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = f" that CUDA_VISIBLE_DEVICES={hidden!r} shows" if hidden is not None else ""
        raise ValueError(f'device="gpu": this machine has no CUDA device{why}; use "cpu" or "auto"')
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if count == 1 and visible and "TORCHELASTIC_RUN_ID" not in os.environ:
        # Each process sees only its own device, as under `srun --gpus-per-task=1`. NCCL refuses two
        # processes on one device.
        return torch.device("cuda", 0)
    if local_rank >= count:
        limit = f" (CUDA_VISIBLE_DEVICES={visible})" if visible is not None else ""
        raise ValueError(
            f"local_rank={local_rank}: this machine has {count} CUDA devices{limit}; "
            "start one process per device"
        )
    return torch.device("cuda", local_rank)


def start_world(
    device: Literal["auto", "cpu", "gpu", "cuda"] = "auto", *, timeout_s: float = 600.0
) -> World:
    """Read the launcher's variables and, if there is more than one process, join the process group.

    A run without a launcher has one process and no process group. Several processes communicate with
    gloo on the CPU and with NCCL on CUDA; each CUDA process uses the device of its local rank.

    Args:
        device: "auto" uses CUDA if there is a device; "cuda" is "gpu".
        timeout_s: seconds until a collective that a peer never joins ends in an error.

    Returns:
        Ranks and device of this process. No other code reads the environment.

    Raises:
        ValueError: if `device` is unknown, if there are fewer CUDA devices than local processes, or
            if the launcher's variables do not fit together.
        RunError: on rank 0 if the port of the store is in use.
    """
    launched = read_launcher(os.environ)
    os.environ.update(launched.variables())
    rank, world_size = launched.rank, launched.world_size
    local_rank, local_world_size = launched.local_rank, launched.local_world_size
    place = _device_of(device, local_rank)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    attempt = ""
    if world_size > 1 and not dist.is_initialized():
        timeout = timedelta(seconds=timeout_s)
        # The same as in init_process_group, but its store is needed first.
        meeting: Any = dist.rendezvous("env://", rank, world_size, timeout=timeout)  # type: ignore[attr-defined]
        with _announced_wait(launched):
            try:
                store, _, _ = next(meeting)
            except (dist.DistNetworkError, dist.DistStoreError) as error:
                raise RunError(_no_store(launched, error)) from error
            attempt = agree_on_attempt(store, rank, world_size, timeout_s=timeout_s)
        dist.init_process_group(
            "nccl" if place.type == "cuda" else "gloo",
            store=dist.PrefixStore(attempt, store),  # type: ignore[attr-defined]
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=place if place.type == "cuda" else None,
        )
    return World(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        device=place,
        attempt=attempt,
    )


@contextlib.contextmanager
def _announced_wait(launched: Launched) -> Iterator[None]:
    """Say what this process waits for, unless its peers arrive soon."""
    text = (
        f"rank {launched.rank} of {launched.world_size} waits for its peers at "
        f"{launched.address}:{launched.port} (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT); "
        "to train in this process alone, unset WORLD_SIZE"
    )
    timer = threading.Timer(WAIT_SECONDS, say, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _no_store(launched: Launched, error: Exception) -> str:
    """The message if the ranks cannot meet."""
    place = f"{launched.address}:{launched.port}"
    first = str(error).partition("\n")[0]
    if launched.rank == 0 and "in use" in str(error).lower():
        return (
            f"port {launched.port} of this machine is in use: set MASTER_PORT to a free one, "
            "the same for all ranks"
        )
    return (
        f"rank {launched.rank} cannot reach the store of the ranks at {place} (MASTER_ADDR and "
        f"MASTER_PORT): {first}"
    )


def agree_on_attempt(store: Any, rank: int, world_size: int, *, timeout_s: float) -> str:
    """Agree on a name that only the ranks of this start share, through a store that may have
    entries of dead ranks.

    torchrun keeps one store over all its restarts, and new ranks would try to connect to the
    addresses of dead ranks in it (on gloo about every second restart fails for this reason).
    torchrun's count of restarts does not identify a start, because the agent of each machine counts
    the failures of its own workers. Rank 0 therefore draws a name and answers every rank that
    presents a new random number.

    Raises:
        RuntimeError: on rank 0 if ranks are missing after `timeout_s`, naming them; on others if
            rank 0 never answers.
    """
    mine = uuid.uuid4().hex
    if rank > 0:
        store.set(f"fastmoco/hello/{rank}", mine)
        attempt = str(store.get(f"fastmoco/welcome/{rank}/{mine}").decode())
        store.set(f"fastmoco/here/{attempt}/{rank}", "")
        return attempt
    missing = set(range(1, world_size))
    answered: set[str] = set()
    until = time.monotonic() + timeout_s
    while missing:
        for peer in sorted(missing):
            if store.check([f"fastmoco/here/{mine}/{peer}"]):
                missing.discard(peer)
            elif store.check([f"fastmoco/hello/{peer}"]):
                hello = store.get(f"fastmoco/hello/{peer}").decode()
                # From a rank of this start, or from a dead one, whose answer no process reads.
                if hello not in answered:
                    store.set(f"fastmoco/welcome/{peer}/{hello}", mine)
                    answered.add(hello)
        if missing and time.monotonic() > until:
            raise RuntimeError(
                f"ranks {sorted(missing)} of {world_size} did not start within {timeout_s:.0f} s"
            )
        time.sleep(0.01)
    return mine


def stop_world() -> None:
    """Leave the process group, if there is one.

    A barrier comes first, because a slower rank may still need the others.
    """
    if dist.is_initialized():
        # A rank that dies after its work is not a failure of this process.
        with contextlib.suppress(RuntimeError):
            dist.barrier()
        dist.destroy_process_group()


def lost_a_peer(error: BaseException) -> bool:
    """Whether an error only reports a broken collective (gloo: RuntimeError, NCCL: DistError)."""
    return dist.is_initialized() and (
        type(error) is RuntimeError or isinstance(error, dist.DistError)
    )


def group_size() -> int:
    """Number of processes in the process group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def group_rank() -> int:
    """Rank of this process in the process group; 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0
