"""What ranks exchange of an objective: the FSDP2 units of its networks, and its batch norms.

Read from the modules themselves, built without memory, by the rules of `distributed/sharding.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from fastmoco.config import Config
from fastmoco.distributed.sync_batch_norm import BatchNorm
from fastmoco.objectives.build import build_model
from fastmoco.objectives.interface import Coupling, Objective, Parts
from fastmoco.planning.costs import trunk_passes


class Shape(NamedTuple):
    """Of a parameter: its first dimension, which FSDP2 shards, and all its elements."""

    rows: int
    elements: int

    def padded(self, shards: int) -> int:
        """Elements after padding the first dimension to a multiple of `shards`."""
        return -(-self.rows // shards) * shards * (self.elements // self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A module whose weights FSDP2 gathers together."""

    shapes: tuple[Shape, ...]
    wide: bool
    """Whether it is gathered in float32 even if the forward runs in bf16."""

    def elements(self, shards: int) -> int:
        """Elements of all parameters, padded."""
        return sum(shape.padded(shards) for shape in self.shapes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A tree of units. `rest` are the parameters outside of blocks and heads."""

    name: str
    """In `Objective.networks()`."""
    trained: bool
    rest: Unit | None
    """None if the network has no such parameters."""
    stem: tuple[Unit, ...]
    """What turns pixels into tokens, where that trains."""
    trunk: tuple[Unit, ...]
    """Blocks."""
    heads: tuple[Unit, ...]
    head_norms: tuple[int, ...]
    """Channels of each batch norm of the heads."""
    trunk_norms: tuple[int, ...]
    """Channels of each batch norm of the trunk, that take their statistics over ranks."""
    passes: int
    """Forwards of the trunk in a step of a whole batch: one for each size of the crops it sees."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The networks of an objective, and its trained parameters in the order of the module."""

    networks: tuple[Network, ...]
    trained: tuple[int, ...]
    """Elements of each trained parameter."""
    separate: bool
    """Whether nothing couples images: heads and loss are then of a chunk (`Coupling.NONE`)."""
    width: int
    """Channels of the features of the encoder."""
    per_rank: int
    """Elements that differ between ranks on purpose (`Objective.per_rank`): the averages of batch
    norms that take their statistics on a rank alone. 0: batch norms are of all ranks."""
    element: int
    """Bytes per element of the state."""


def layout_of(config: Config, precision: str) -> Layout:
    """The layout of a config's objective, without memory.

    Args:
        config: its model, heads and views are used.
        precision: "bf16", "fp32" or "fp64".
    """
    with torch.device("meta"):
        objective = build_model(config)
    averages = {id(average) for own, average in objective.averages().items() if own.requires_grad}
    parts = objective.parts()
    passes = trunk_passes(config, precision)
    buffers = dict(objective.named_buffers())
    return Layout(
        networks=tuple(
            _network(
                name,
                network,
                parts[name],
                averages,
                passes=passes.get(name, 1),
                exchanges=objective.trunk_trains and not objective.per_rank,
            )
            for name, network in _networks(objective)
        ),
        trained=tuple(p.numel() for p in objective.parameters() if p.requires_grad),
        separate=objective.coupling is Coupling.NONE,
        width=objective.encoder.embed_dim,
        per_rank=sum(buffers[name].numel() for name in objective.per_rank),
        element=8 if precision == "fp64" else 4,
    )


def _networks(objective: Objective) -> list[tuple[str, nn.Module]]:
    found = objective.networks()
    return [(name, found[name]) for name in objective.parts()]


def _network(
    name: str,
    network: nn.Module,
    parts: Parts,
    averages: set[int],
    *,
    passes: int,
    exchanges: bool,
) -> Network:
    def sharded(parameter: nn.Parameter) -> bool:
        return parameter.requires_grad or id(parameter) in averages

    taken: set[int] = set()

    def unit(module: nn.Module) -> Unit | None:
        own = [p for p in module.parameters() if sharded(p) and id(p) not in taken]
        taken.update(map(id, own))
        shapes = tuple(Shape(p.shape[0] if p.ndim else 1, p.numel()) for p in own)
        return Unit(shapes=shapes, wide=getattr(module, "gathers_wide", False)) if own else None

    trunk = [unit(module) for module in parts.blocks]
    stem = [unit(module) for module in parts.stem.values()]
    heads = [unit(module) for module in parts.heads.values() if module is not network]
    rest = unit(network)
    if any(module is network for module in parts.heads.values()):
        heads, rest = [*heads, rest], None
    in_heads = {id(m) for head in parts.heads.values() for m in head.modules()}
    norms = [module for module in network.modules() if isinstance(module, BatchNorm)]
    return Network(
        name=name,
        trained=any(p.requires_grad for p in network.parameters()),
        rest=rest,
        stem=tuple(one for one in stem if one),
        trunk=tuple(one for one in trunk if one),
        heads=tuple(one for one in heads if one),
        head_norms=tuple(norm.num_features for norm in norms if id(norm) in in_heads),
        trunk_norms=tuple(n.num_features for n in norms if exchanges and id(n) not in in_heads),
        passes=passes,
    )
