"""FSDP2 on an objective with a twin: what is a unit, what stays whole, and three traps that torch leaves open.

A unit is put together while it computes and given back afterwards: each block, each head, and what remains of an encoder.

* Encoder, twin and predictor are three roots, each with its own streams and its own record of forwards. In one tree the
  backward of the encoder would fetch units of the twin in advance (torch goes backwards through the record of forwards),
  nobody would wait for them, and the next step would compute with the twin as it was.
* Roots give their weights back too. By default torch keeps them whole until a backward, and the twin has none: its average
  would be written to a copy that is thrown away.
* Every forward leaves a note for the backward; the twin's are torn up, or they would pile up for ever.

Frozen parameters (positions, the patch projection) stay whole on every rank: both encoders share the tokens they make,
outside of any unit. They are small, and equal by `require_equal_start`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from fastmoco.distributed.mesh import World


def shard_(objective: Any, world: World, *, copies_of: int = 0, half: bool = False) -> None:
    """Shard encoder, twin and predictor over all ranks, in place; parameters become DTensors under their old names.

    Args:
        objective: a `MoCoV3`, initialised, equal on all ranks.
        world: this process's place, not alone.
        copies_of: processes that hold one copy (HSDP); 0: all hold one.
        half: whether the forward runs under bf16 autocast. Weights then cross ranks in bf16, as autocast would round them;
            shards, reductions of gradients, and the twin stay float32, and batch norms compute in it.

    Raises:
        ValueError: if ``copies_of`` does not make several groups of several processes.
    """
    mesh = _mesh(world, copies_of)
    # Inputs are left to autocast, so that the stream between blocks is as wide as under DDP.
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if half else None,
        reduce_dtype=torch.float32 if half else None,
        cast_forward_inputs=False,
    )
    frozen = {name for name, p in objective.encoder.named_parameters() if not p.requires_grad}

    def unit(module: nn.Module, whole: set[nn.Parameter] | None = None) -> None:
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy, ignored_params=whole)

    for encoder in (objective.encoder, objective.momentum_encoder):
        whole = {p for name, p in encoder.named_parameters() if name in frozen}
        for block in encoder.blocks:
            unit(block)
        if any(p not in whole for p in encoder.patch_embed.parameters()):
            unit(encoder.patch_embed)
        unit(encoder.head)
        unit(encoder, whole)
        # The trunk is called piece by piece, not through forward.
        register_fsdp_forward_method(encoder, "encode")
        register_fsdp_forward_method(encoder.blocks[-1], "class_row")
        for before, after in zip([encoder, *encoder.blocks[:-1]], encoder.blocks, strict=True):
            before.set_modules_to_forward_prefetch([after])
    unit(objective.predictor)
    _forget_forwards(objective.momentum_encoder)


def trunk_units(encoder: Any) -> list[FSDPModule]:
    """Units of an encoder that see images, a chunk at a time; none where it is not sharded."""
    heads = set(encoder.head.modules())
    return [part for part in encoder.modules() if isinstance(part, FSDPModule) and part not in heads]


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


def _forget_forwards(twin: Any) -> None:
    """Make ``twin.encode`` tear up what FSDP2 notes for a backward that never comes."""
    encode: Callable[[Tensor], Tensor] = twin.encode
    states = [part._get_fsdp_state() for part in twin.modules() if isinstance(part, FSDPModule)]

    def forgetful(tokens: Tensor) -> Tensor:
        out = encode(tokens)
        for group in (state._fsdp_param_group for state in states):
            if group is not None:
                group.comm_ctx.post_forward_order.clear()
                group._post_forward_indices.clear()
        return out

    twin.encode = cast(Any, forgetful)
