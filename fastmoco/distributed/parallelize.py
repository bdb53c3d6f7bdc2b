"""Make an objective train over all ranks: the one place where wrappers are put on, and in which order."""

from __future__ import annotations

import hashlib
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from fastmoco.distributed.mesh import World


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


def parallelize(objective: nn.Module, world: World) -> nn.Module:
    """Wrap an objective for data-parallel training; call the result instead of the objective.

    Order: equal start and synchronised norms are checked first, then the gradient averaging is put on. Buffers are not
    broadcast: synchronised statistics make them equal by themselves. Gradients are averaged over ranks, so losses that
    are means over the local batch give the gradient of the mean over the global batch.

    Args:
        objective: on ``world.device``, all its trainable parameters used in every forward.
        world: this process's place.

    Returns:
        ``objective`` itself where there is one process, else its wrapper, which holds it as ``module``.

    Raises:
        ValueError: if ranks start from different numbers, or a batch norm is not synchronised.
    """
    if world.world_size == 1:
        return objective
    require_synchronised_norms(objective)
    require_equal_start(objective, world)
    with warnings.catch_warnings():
        # torch 2.13 renames broadcast_buffers and warns; older ones know the old name only.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        return DistributedDataParallel(
            objective,
            device_ids=[world.device.index] if world.device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
