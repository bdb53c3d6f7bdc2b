"""Compare the state that ranks share, bit by bit, to detect faults of memory and devices.

A rank whose weights differ in one bit would continue without an error and contribute wrong
gradients to every step. The comparison reads each tensor once on its device and sends 8 bytes per
tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmoco.distributed.gather import all_gather_single
from fastmoco.distributed.mesh import World
from fastmoco.errors import RunError
from fastmoco_kernels.tensors import is_dtensor, local

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bit_sums(tensors: list[Tensor]) -> Tensor:
    """The sum of the elements of each tensor as integers, modulo 2**64.

    Any single flipped bit changes the sum.

    Args:
        tensors: on one device; for a DTensor, this rank's shard.

    Returns:
        [number of tensors] int64 on that device; no host sync.
    """
    return torch.stack(
        [
            own.reshape(-1).view(_INTEGERS[own.element_size()]).sum(dtype=torch.int64)
            for own in local([tensor.detach() for tensor in tensors])
        ]
    )


def require_equal_replicas(objective: nn.Module, world: World) -> None:
    """Compare parameters and buffers over all ranks that hold the same ones.

    Under DDP these are all of them; under FSDP2 buffers of batch norms and frozen parameters; under
    HSDP also the shards of the copies.

    Args:
        objective: between two steps; buffers named in its `per_rank` are left out.
        world: ranks; all of them must call this function.

    Raises:
        RunError: on every rank, naming the first tensor that differs and the ranks that differ from
            the majority.
    """
    if world.world_size == 1:
        return
    own: frozenset[str] = getattr(objective, "per_rank", frozenset())
    named = {
        name: tensor
        for name, tensor in objective.state_dict(keep_vars=True).items()
        if name not in own
    }
    names = list(named)
    tensors = list(named.values())
    mine = bit_sums(tensors).to(world.device)
    rows = mine.new_empty(world.world_size * mine.numel())
    all_gather_single(rows, mine)
    table = rows.view(world.world_size, -1).cpu()
    for column, (name, tensor) in enumerate(zip(names, tensors, strict=True)):
        for peers in _holders(tensor, world.world_size):
            odd = _minority(table[peers, column].tolist(), peers)
            if odd:
                where = f"on ranks={odd} from the others" if odd != peers else f"among ranks={odd}"
                raise RunError(
                    f"{name} differs {where}: a bit flipped in memory, or an operation there gives "
                    "other results. Remove that machine, and continue from a checkpoint that is "
                    "older than the last comparison (parallel.verify_replicas_every)"
                )


def _holders(tensor: Tensor, world_size: int) -> list[list[int]]:
    """Groups of ranks that hold the same elements of a tensor."""
    if not is_dtensor(tensor):
        return [list(range(world_size))]
    mesh = tensor.device_mesh.mesh
    copied = [dim for dim, placement in enumerate(tensor.placements) if placement.is_replicate()]
    kept = [dim for dim in range(mesh.ndim) if dim not in copied]
    copies = 1
    for dim in copied:
        copies *= mesh.shape[dim]
    groups: list[list[int]] = mesh.permute(*kept, *copied).reshape(-1, copies).tolist()
    return groups if copies > 1 else []


def _minority(values: list[int], peers: list[int]) -> list[int]:
    """Ranks whose value is not the most common one; all of them if no value has a majority."""
    commonest = max(set(values), key=values.count)
    if values.count(commonest) == len(values):
        return []
    if 2 * values.count(commonest) <= len(values):
        return peers
    return [peer for peer, value in zip(peers, values, strict=True) if value != commonest]
