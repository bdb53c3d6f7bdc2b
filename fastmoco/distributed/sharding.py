"""FSDP2 on the networks of an objective: what is a unit, what stays whole, and three traps that
torch leaves open.

A unit is put together while it computes and given back afterwards: each block, each head, and what
remains of a network.

* Networks (encoder, momentum encoder, predictor) are roots of their own, each with its own streams
  and its own record of
  forwards. In one tree the backward of the encoder would fetch units of the momentum encoder in
  advance (torch goes backwards through the record of forwards), nothing would wait for them, and
  the next step would compute with old weights.
* Roots give their weights back too. By default torch keeps them whole until a backward, and a
  momentum encoder has none: its
  average would be written to a copy that is thrown away.
* FSDP2 records each forward for its backward. A network without one has its records cleared;
  otherwise they would accumulate.

Parameters that neither train nor average (positions, the patch projection) stay whole on every
rank: two encoders may share the tokens they make, outside of any unit. They are small, and equal by
`require_equal_start`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from fastmoco.distributed.mesh import World


def shard_(objective: Any, world: World, *, copies_of: int = 0, bf16: bool = False) -> None:
    """Shard the networks of an objective over all ranks, in place; parameters become DTensors under
    their old names.

    Args:
        objective: an `Objective`, initialised, equal on all ranks.
        world: this process's place, not alone.
        copies_of: processes that hold one copy (HSDP); 0: all hold one.
        bf16: whether the forward runs under bf16 autocast. Weights then cross ranks in bf16, as
            autocast would round them; shards, reductions of gradients, and averages stay float32,
            and batch norms compute in it.

    Raises:
        ValueError: if ``copies_of`` does not make several groups of several processes.
    """
    mesh = _mesh(world, copies_of)
    # Inputs are left to autocast, so that the stream between blocks is as wide as under DDP.
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None,
        reduce_dtype=torch.float32 if bf16 else None,
        cast_forward_inputs=False,
    )
    averages = {id(average) for own, average in objective.averages().items() if own.requires_grad}

    def unit(module: nn.Module, whole: set[nn.Parameter] | None = None) -> None:
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy, ignored_params=whole)

    for name, parts in objective.parts().items():
        network = objective.networks()[name]
        whole = {p for p in network.parameters() if not p.requires_grad and id(p) not in averages}

        # From the inside out: blocks, stem and heads first, then what remains.
        for block in parts.blocks:
            unit(block)
        for module in parts.stem.values():
            if any(p not in whole for p in module.parameters()):
                unit(module)
        for module in parts.heads.values():
            if module is not network:
                unit(module)
        unit(network, whole)

        # A trunk may be called piece by piece, not through forward.
        for path, methods in parts.methods.items():
            for method in methods:
                register_fsdp_forward_method(network.get_submodule(path), method)
        for before, after in zip([network, *parts.blocks[:-1]], parts.blocks, strict=bool(len(parts.blocks))):
            before.set_modules_to_forward_prefetch([after])
        if not any(p.requires_grad for p in network.parameters()) and parts.methods.get(""):
            _forget_forwards(network, parts.methods[""][0])


def is_sharded(objective: nn.Module) -> bool:
    """Whether some of its modules are units of FSDP2."""
    return any(isinstance(part, FSDPModule) for part in objective.modules())


def trunk_units(network: nn.Module, parts: Any) -> list[FSDPModule]:
    """Units of a network that see images, a chunk at a time; none where it is not sharded.

    Args:
        network: of an objective.
        parts: its parts.
    """
    heads = {part for head in parts.heads.values() for part in head.modules()}
    return [part for part in network.modules() if isinstance(part, FSDPModule) and part not in heads]


def _mesh(world: World, copies_of: int) -> DeviceMesh:
    size, kind = world.world_size, world.device.type
    if not copies_of:
        return init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
    if size % copies_of or not 1 < copies_of < size:
        raise ValueError(
            f"parallel.shard_size={copies_of}: hsdp needs several groups of at least 2 among the {size} processes; "
            "give a number that divides them, or take parallel.strategy fsdp"
        )
    return init_device_mesh(kind, (size // copies_of, copies_of), mesh_dim_names=("replicate", "shard"))


def _forget_forwards(network: nn.Module, method: str) -> None:
    """Make a method of a network clear what FSDP2 notes for a backward that never comes."""
    call: Callable[[Tensor], Tensor] = getattr(network, method)
    states = [part._get_fsdp_state() for part in network.modules() if isinstance(part, FSDPModule)]

    def forgetful(tokens: Tensor) -> Tensor:
        out = call(tokens)
        for group in (state._fsdp_param_group for state in states):
            if group is not None:
                group.comm_ctx.post_forward_order.clear()
                group._post_forward_indices.clear()
        return out

    setattr(network, method, forgetful)
