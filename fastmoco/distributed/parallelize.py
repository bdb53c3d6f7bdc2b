"""Make an objective train over all ranks: the one place where wrappers are put on, and in which order.

activation checkpointing (inside the blocks, chosen when the model is built)
-> torch.compile of each block (`models/compiled.py`, called before this)
-> equal start and synchronised norms are checked
-> DistributedDataParallel, or FSDP2 (`sharding.py`), after which parameters are DTensors: the optimizer comes later
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
"""Of a GPU's memory: a larger state is sharded, so that activations keep most of the rest."""


def _digest(module: nn.Module) -> torch.Tensor:
    """SHA-256 over names and bytes of all parameters and buffers, as [4] int64."""
    sha = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        sha.update(name.encode())
        sha.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(sha.digest()), dtype=torch.int64)


def require_equal_start(module: nn.Module, world: World) -> None:
    """Compare the module's parameters and buffers over all ranks.

    Nothing later would notice a difference: the ranks would train one mixture of several initialisations.

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
    """Refuse torch's batch norms, whose statistics would stay local.

    Raises:
        ValueError: naming the first such module.
    """
    for name, part in module.named_modules():
        if isinstance(part, _BatchNorm) and not isinstance(part, nn.SyncBatchNorm):
            raise ValueError(
                f"{name}={type(part).__name__}: its statistics would cover one rank only; "
                "use fastmoco.distributed.BatchNorm where several ranks train"
            )


def choose_strategy(strategy: Literal["auto", "ddp", "fsdp", "hsdp"], objective: nn.Module, world: World) -> Strategy:
    """What ``parallel.strategy`` means for a model on a device, the same on every rank.

    ``auto`` shards where weights, gradients and two moments exceed `STATE_SHARE` of the smallest GPU's memory. On a CPU
    processes share one memory, and it never does.
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

    The order stands at the top of this file. Buffers are never broadcast: synchronised statistics make them equal by
    themselves. Gradients are averaged over ranks, so losses that are means over the local batch give the gradient of the
    mean over the global batch.

    Args:
        objective: on `world.device`, initialised, all its trainable parameters used in every forward. Under `fsdp` and
            `hsdp` an `Objective`: it is changed in place, so build the optimizer after this call.
        world: this process's place.
        strategy: how; nothing to choose for one process.
        shard_size: processes that hold one copy under ``hsdp``; 0: those of this machine.
        bf16: whether the forward runs under bf16 autocast: shards are then put together in bf16.
        average_gradients: False leaves that to the caller, as a step of several backward passes does (`gradient_average.py`).

    Returns:
        The wrapper under ``ddp``, which holds ``objective`` as ``module``; else ``objective`` itself.

    Raises:
        ValueError: if ranks start from different numbers, a batch norm is not synchronised, or ``shard_size`` does not fit.
    """
    if world.world_size == 1:
        return objective
    require_synchronised_norms(objective)
    require_equal_start(objective, world)
    if strategy != "ddp":
        shard_(
            objective, world, copies_of=(shard_size or world.local_world_size) if strategy == "hsdp" else 0, bf16=bf16
        )
        return objective
    if not average_gradients:
        return objective
    with warnings.catch_warnings():
        # torch 2.13 renames broadcast_buffers and warns; older ones know the old name only.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        return DistributedDataParallel(
            objective,
            device_ids=[world.device.index] if world.device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
