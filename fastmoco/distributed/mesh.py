"""Who this process is among its peers, and the one place where a process group begins and ends."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """One process's place among all processes of a run."""

    rank: int = 0
    """This process's number, from 0 to `world_size - 1`."""
    world_size: int = 1
    """Number of processes of the run."""
    local_rank: int = 0
    """This process's number on its own machine: the index of its GPU."""
    local_world_size: int = 1
    """Number of processes on this machine."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where this process's model and batches live."""
    attempt: str = ""
    """What the ranks of this start, and none of an earlier one under the same launcher, have in common."""


def _device_of(device: Literal["auto", "cpu", "cuda"], local_rank: int) -> torch.device:
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f'device={device!r}: is "auto", "cpu" or "cuda"')
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 0:
        raise ValueError('device="cuda": this machine shows no CUDA device; use "cpu" or "auto"')
    if local_rank >= count:
        raise ValueError(
            f"local_rank={local_rank}: this machine shows {count} CUDA devices; start one process per device"
        )
    return torch.device("cuda", local_rank)


def start_world(device: Literal["auto", "cpu", "cuda"] = "auto", *, timeout_s: float = 600.0) -> World:
    """Read torchrun's environment and, where there is more than one process, join the process group.

    A run without torchrun is a world of one and starts no process group. Several processes talk through gloo on the
    CPU and through NCCL on CUDA; each CUDA process takes the device of its local rank.

    Args:
        device: "auto" takes CUDA where there is a device.
        timeout_s: seconds after which a collective that a peer never joins ends in an error.

    Returns:
        This process's place; pass it on, nothing else reads the environment.

    Raises:
        ValueError: if `device` is unknown, or if there are fewer CUDA devices than local processes.
    """
    defaults = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    rank, world_size, local_rank, local_world_size = (int(os.environ.get(name, n)) for name, n in defaults.items())
    place = _device_of(device, local_rank)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    attempt = ""
    if world_size > 1 and not dist.is_initialized():
        timeout = timedelta(seconds=timeout_s)
        # From the environment, as init_process_group does it by itself.
        meeting: Any = dist.rendezvous("env://", rank, world_size, timeout=timeout)  # type: ignore[attr-defined]
        store, _, _ = next(meeting)
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


def agree_on_attempt(store: Any, rank: int, world_size: int, *, timeout_s: float) -> str:
    """A name that the ranks of this start alone know, agreed through a store that may hold what dead ranks left.

    torchrun keeps one store over all its restarts, and the addresses of the dead in it are what new ranks then try to reach
    (about every second restart on gloo fails so). Its own count of restarts is no name for a start: each machine's agent
    counts the failures of its own workers. So rank 0 draws one, and tells it to each rank that shows a fresh number.

    Raises:
        RuntimeError: on rank 0 if ranks are missing after `timeout_s`, naming them; on another if rank 0 never answers.
    """
    mine = uuid.uuid4().hex
    if rank > 0:
        store.set(f"fastmoco/hello/{rank}", mine)
        attempt = str(store.get(f"fastmoco/welcome/{rank}/{mine}").decode())
        store.set(f"fastmoco/here/{attempt}/{rank}", "")
        return attempt
    missing, answered, until = set(range(1, world_size)), set(), time.monotonic() + timeout_s
    while missing:
        for peer in sorted(missing):
            if store.check([f"fastmoco/here/{mine}/{peer}"]):
                missing.discard(peer)
            elif store.check([f"fastmoco/hello/{peer}"]):
                hello = store.get(f"fastmoco/hello/{peer}").decode()
                if hello not in answered:  # of this start, or a dead rank's, which nobody waits for
                    store.set(f"fastmoco/welcome/{peer}/{hello}", mine)
                    answered.add(hello)
        if missing and time.monotonic() > until:
            raise RuntimeError(f"ranks {sorted(missing)} of {world_size} did not start within {timeout_s:.0f} s")
        time.sleep(0.01)
    return mine


def stop_world() -> None:
    """Leave the process group, if there is one, together: what a rank takes with it may be in use by a slower one."""
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # a peer that died after its work is no failure of this one
            dist.barrier()
        dist.destroy_process_group()


def lost_a_peer(error: BaseException) -> bool:
    """Whether an error says no more than that an exchange broke: a plain RuntimeError of gloo, a DistError of NCCL."""
    return dist.is_initialized() and (type(error) is RuntimeError or isinstance(error, dist.DistError))


def group_size() -> int:
    """Number of processes that collectives reach now: 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def group_rank() -> int:
    """This process's number in the process group: 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0
