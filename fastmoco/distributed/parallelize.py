"""Wrap an objective for training on all ranks. No other module applies DDP or FSDP2.

The order is:

1. activation checkpointing, inside the blocks, when the model is built;
2. torch.compile of each block (`models/compiled.py`), before `parallelize`;
3. checks that all ranks start equal and that norms are synchronised;
4. DistributedDataParallel, or FSDP2 (`sharding.py`), which turns parameters into DTensors;
5. the optimizer, after `parallelize`.
"""

from __future__ import annotations

import hashlib
import warnings
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from fastmoco.distributed.agree import any_rank
from fastmoco.distributed.mesh import World
from fastmoco.distributed.sharding import shard_

Strategy = Literal["ddp", "fsdp", "hsdp"]
STATE_SHARE = 0.25
"""Share of a GPU's memory above which `auto` shards the state, to leave memory for activations."""


def _digest(module: nn.Module) -> torch.Tensor:
    """SHA-256 over names and bytes of all parameters and buffers, as [4] int64.

    Buffers that differ between ranks on purpose (`Objective.per_rank`) are left out.
    """
    per_rank: frozenset[str] = getattr(module, "per_rank", frozenset())
    sha = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if name in per_rank:
            continue
        sha.update(name.encode())
        sha.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(sha.digest()), dtype=torch.int64)


def require_equal_start(module: nn.Module, world: World) -> None:
    """Compare the module's parameters and buffers over all ranks.

    No later check would notice a difference: the ranks would train a mixture of several
    initialisations.

    Raises:
        ValueError: on every rank, naming the ranks that differ from rank 0.
    """
    mine = _digest(module).to(world.device)
    rows = [torch.empty_like(mine) for _ in range(world.world_size)]
    dist.all_gather(rows, mine)
    digests = torch.stack(rows)
    differing = (digests != digests[0]).any(dim=1).nonzero().flatten().tolist()
    if differing:
        raise ValueError(
            f"ranks={differing}: parameters or buffers differ from rank 0's before the first step; "
            "build the model from the same seed, or load the same checkpoint, on every rank"
        )


def require_synchronised_norms(module: nn.Module) -> None:
    """Refuse torch's batch norms, because their statistics would be local.

    Raises:
        ValueError: naming the first such module.
    """
    for name, part in module.named_modules():
        if isinstance(part, _BatchNorm) and not isinstance(part, nn.SyncBatchNorm):
            raise ValueError(
                f"{name}={type(part).__name__}: its statistics would cover one rank only; "
                "use fastmoco.distributed.BatchNorm where several ranks train"
            )


def choose_strategy(
    strategy: Literal["auto", "ddp", "fsdp", "hsdp"], objective: nn.Module, world: World
) -> Strategy:
    """Resolve `parallel.strategy` for a model on a device, the same on every rank.

    `auto` shards if weights, gradients and two moments exceed `STATE_SHARE` of the memory of the
    smallest GPU. It never shards on a CPU, whose processes share one memory.
    """
    if strategy != "auto":
        return strategy
    if world.device.type != "cuda" or world.world_size == 1:
        return "ddp"
    parameters = list(objective.parameters())
    state = sum(p.nbytes * (4 if p.requires_grad else 1) for p in parameters)
    total = torch.cuda.get_device_properties(world.device).total_memory
    return "fsdp" if any_rank(state > STATE_SHARE * total, world.device) else "ddp"


def parallelize(
    objective: nn.Module,
    world: World,
    *,
    strategy: Strategy = "ddp",
    shard_size: int = 0,
    bf16: bool = False,
    average_gradients: bool = True,
) -> nn.Module:
    """Wrap an objective for data-parallel training; call the result instead of the objective.

    The module docstring describes the order. Buffers are never broadcast, because synchronised
    statistics keep them equal. Gradients are averaged over ranks, so losses that are means over the
    local batch give the gradient of the mean over the global batch.

    Args:
        objective: on `world.device`, initialised, all its trainable parameters used in every
            forward. For `fsdp` and `hsdp` it must be an `Objective`; it is changed in place, so the
            optimizer is built after this call.
        world: this process's rank and device.
        strategy: has no effect with one process.
        shard_size: processes that hold one copy under `hsdp`; 0: those of this machine.
        bf16: whether the forward runs under bf16 autocast; shards are then gathered in bf16.
        average_gradients: False if the caller averages, as for a step with several backward passes
            (`gradient_average.py`).

    Returns:
        The wrapper for `ddp`, whose `module` is `objective`; otherwise `objective` itself.

    Raises:
        ValueError: if parameters or buffers differ between ranks, a batch norm is not synchronised,
            or `shard_size` does not divide the number of processes.
    """
    if world.world_size == 1:
        return objective
    require_synchronised_norms(objective)
    require_equal_start(objective, world)
    if strategy != "ddp":
        shard_(
            objective,
            world,
            copies_of=(shard_size or world.local_world_size) if strategy == "hsdp" else 0,
            bf16=bf16,
        )
        return objective
    if not average_gradients:
        return objective
    with warnings.catch_warnings():
        # torch 2.13 renames broadcast_buffers and warns; older versions have only the old name.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        return DistributedDataParallel(
            objective,
            device_ids=[world.device.index] if world.device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
