"""Who this process is among its peers, and the one place where a process group begins and ends."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """One process's place among all processes of a run."""

    rank: int = 0
    """This process's number, from 0 to ``world_size - 1``."""
    world_size: int = 1
    """Number of processes of the run."""
    local_rank: int = 0
    """This process's number on its own machine: the index of its GPU."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where this process's model and batches live."""


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
        ValueError: if ``device`` is unknown, or if there are fewer CUDA devices than local processes.
    """
    rank, world_size, local_rank = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    place = _device_of(device, local_rank)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group(
            "nccl" if place.type == "cuda" else "gloo",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
            device_id=place if place.type == "cuda" else None,
        )
    return World(rank=rank, world_size=world_size, local_rank=local_rank, device=place)


def stop_world() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def group_size() -> int:
    """Number of processes that collectives reach now: 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def group_rank() -> int:
    """This process's number in the process group: 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0
