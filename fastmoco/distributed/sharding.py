"""Shard the networks of an objective with FSDP2.

The units are each block, each head, and the rest of each network. FSDP2 gathers the weights of a
unit while it computes and frees them afterwards. Three of its defaults are wrong for a momentum
encoder:

* Each network (encoder, momentum encoder, predictor) is a root of its own, with its own streams and
  its own record of forwards. FSDP2 prefetches by walking back through this record. In one tree the
  backward of the encoder would prefetch units of the momentum encoder, nothing would wait for them,
  and the next step would compute with old weights.
* Roots, too, are resharded after the forward. By default FSDP2 keeps them gathered until the
  backward, and a momentum encoder has none: its update would be written to a temporary copy.
* FSDP2 records each forward for its backward. The momentum encoder has none, so its records are
  cleared; otherwise they would accumulate.

Parameters that do not train and are not averages of trained ones (positions, the patch projection)
are not sharded, because two encoders may share the tokens computed from them, outside of any unit.
So is the frozen bias of a projector. They are small, and `require_equal_start` has checked that they are equal.

FSDP2 is imported by `shard_`. Its import takes half as long as that of torch, and most runs do not
need it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastmoco.distributed.mesh import World

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule


def shard_(objective: Any, world: World, *, copies_of: int = 0, bf16: bool = False) -> None:
    """Shard the networks of an objective over all ranks, in place.

    Parameters become DTensors under the same names.

    Args:
        objective: an `Objective`, initialised, equal on all ranks.
        world: this process's rank and device; there are several processes.
        copies_of: processes that share one copy (HSDP); 0: all of them.
        bf16: whether the forward runs under bf16 autocast. Weights are then gathered in bf16, as
            autocast would round them, but for modules with `gathers_wide = True`, which do not
            multiply under autocast. Shards, reductions of gradients, averages and batch norms
            remain float32.

    Raises:
        ValueError: if `copies_of` does not give several groups of several processes.
    """
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    mesh = _mesh(world, copies_of)
    # Autocast casts the inputs, so the stream between blocks has the same dtype as under DDP.
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None,
        reduce_dtype=torch.float32 if bf16 else None,
        cast_forward_inputs=False,
    )
    averages = {id(average) for own, average in objective.averages().items() if own.requires_grad}

    def unit(module: nn.Module, whole: set[nn.Parameter] | None = None) -> None:
        wide = getattr(module, "gathers_wide", False)
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=True,
            mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False) if wide else policy,
            ignored_params=whole,
        )

    for name, parts in objective.parts().items():
        network = objective.networks()[name]
        whole = {p for p in network.parameters() if not p.requires_grad and id(p) not in averages}

        # Inner modules first: blocks, stem and heads, then the rest of the network.
        for block in parts.blocks:
            if any(p not in whole for p in block.parameters()):
                unit(block)
        for module in parts.stem.values():
            if any(p not in whole for p in module.parameters()):
                unit(module)
        for module in parts.heads.values():
            if module is not network:
                unit(module, whole)
        unit(network, whole)

        # Units are gathered also when methods other than forward are called; then prefetching.
        for path, methods in parts.methods.items():
            for method in methods:
                if method != "forward":  # a unit gathers for its forward without this
                    register_fsdp_forward_method(network.get_submodule(path), method)
        units = [block for block in parts.blocks if block in units_of(block)]
        for before, after in zip([network, *units[:-1]], units, strict=bool(units)):
            before.set_modules_to_forward_prefetch([after])
        if not any(p.requires_grad for p in network.parameters()):
            for method in {
                *parts.methods.get("", ()),
                "forward",
            }:  # a head alone has none of its own
                _forget_forwards(network, method)


def is_sharded(objective: nn.Module) -> bool:
    """Whether any module of the objective is a unit of FSDP2."""
    return bool(units_of(objective))


def units_of(module: nn.Module) -> list[FSDPModule]:
    """The FSDP2 units among the modules of a module, itself included.

    There are none before FSDP2 is imported, and this function does not import it.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return []
    return [part for part in module.modules() if isinstance(part, fsdp.FSDPModule)]


def trunk_units(network: nn.Module, parts: Any) -> list[FSDPModule]:
    """The FSDP2 units of a network's trunk, which computes on micro-batches.

    Args:
        network: of an objective.
        parts: its `Parts`.
    """
    heads = {part for head in parts.heads.values() for part in head.modules()}
    return [unit for unit in units_of(network) if unit not in heads]


def _mesh(world: World, copies_of: int) -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh

    size = world.world_size
    kind = world.device.type
    if not copies_of:
        return init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
    if size % copies_of or not 1 < copies_of < size:
        raise ValueError(
            f"parallel.shard_size={copies_of}: hsdp needs several groups of at least 2 among the "
            f"{size} processes; use a number that divides {size}, or parallel.strategy fsdp"
        )
    return init_device_mesh(
        kind, (size // copies_of, copies_of), mesh_dim_names=("replicate", "shard")
    )


def _forget_forwards(network: nn.Module, method: str) -> None:
    """Make a method of a network clear the records that FSDP2 keeps for a backward."""
    states = [unit._get_fsdp_state() for unit in units_of(network)]

    def forget() -> None:
        for group in (state._fsdp_param_group for state in states):
            if group is not None:
                group.comm_ctx.post_forward_order.clear()
                group._post_forward_indices.clear()

    if method == "forward":  # hooks run in their order, and that of FSDP2 makes the last record
        network.register_forward_hook(lambda *_: forget())
        return
    call: Callable[..., Any] = getattr(network, method)

    def forgetful(*args: Tensor | None, **options: Any) -> Any:
        out = call(*args, **options)
        forget()
        return out

    setattr(network, method, forgetful)
