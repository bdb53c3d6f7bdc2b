"""Seconds of a collective, from bytes, latency and bandwidth.

With n ranks, S bytes of the whole, bandwidth W of the slowest edge of a ring and L seconds for a
trip around n - 1 edges of it:

    all_gather, reduce_scatter:  (n - 1) / n * S / W + L
    all_reduce, as a ring:       2 (n - 1) / n * S / W + 2 L
    all_reduce, as a tree:       2 S / W + 2 ceil(log2 n) * latency
    broadcast, in blocks:        S / W + ceil(log2 n) * latency
    all_to_all of S on a rank:   (n - 1) / n * S / link + latency, and between nodes of g ranks
                                 g (nodes - 1) / nodes * S / network + latency if that is longer
    send, to the next of a ring: S / W + latency

An all-reduce takes the faster of ring and tree. In a machine of several nodes a ring has one edge
through the network for every node and goes through links inside nodes otherwise, so

    L = (nodes - 1) * network latency + (n - nodes) * link latency
    W = the smaller of link and network, the network divided among the groups that use it at once

On a CPU, seconds are lines a + b S that are fitted to measured collectives (`MeasuredLines`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from fastmoco.planning.scale.messages import Message, Ranks


class Network(Protocol):
    """Seconds of the collectives of one machine."""

    def seconds(self, message: Message, ranks: Ranks) -> float:
        """Of one of the equal collectives of a message."""
        ...


class Link(NamedTuple):
    """A connection: bytes per second in one direction, and seconds until the first one arrives."""

    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fabric:
    """Nodes of several GPUs."""

    nodes: int
    gpus_per_node: int
    link: Link
    """Of a GPU to the others of its node."""
    network: Link
    """Of a node to the others; its bandwidth is that of all its cards together."""
    call_s: float = 10e-6
    """What a collective costs besides, such as its launch."""

    def seconds(self, message: Message, ranks: Ranks) -> float:
        """Of one of the equal collectives of a message."""
        size, spanned, sharing = self._group(message.group, ranks)
        if size == 1:
            return 0.0
        return self.call_s + self.ring_s(message.kind, message.bytes, size, spanned, sharing)

    def ring_s(self, kind: str, size: float, ranks: int, nodes: int = 1, sharing: int = 1) -> float:
        """Seconds of a collective by the equations of the module.

        Args:
            kind: as `Message.kind`.
            size: bytes of the whole.
            ranks: n, at least 2.
            nodes: that these ranks are on.
            sharing: groups that use the network of a node at the same time.
        """
        around = (nodes - 1) * self.network.latency_s + (ranks - nodes) * self.link.latency_s
        bandwidth = self.link.bytes_per_s
        if nodes > 1:
            bandwidth = min(bandwidth, self.network.bytes_per_s / sharing)
        share = (ranks - 1) / ranks
        if kind in ("all_gather", "reduce_scatter"):
            return share * size / bandwidth + around
        latency = self.network.latency_s if nodes > 1 else self.link.latency_s
        if kind == "broadcast":
            return size / bandwidth + math.ceil(math.log2(ranks)) * latency
        if kind == "all_to_all":
            inside = share * size / self.link.bytes_per_s
            leaving = (ranks / nodes) * (nodes - 1) / nodes * size / self.network.bytes_per_s
            return max(inside, leaving) + latency
        if kind == "all_reduce":
            tree = 2 * size / bandwidth + 2 * math.ceil(math.log2(ranks)) * latency
            return min(2 * share * size / bandwidth + 2 * around, tree)
        return size / bandwidth + latency

    def _group(self, group: str, ranks: Ranks) -> tuple[int, int, int]:
        """Ranks of a group, nodes that they are on, and groups that share a node's network."""
        within = min(ranks.shards, self.gpus_per_node)
        if group == "shard":
            return ranks.shards, -(-ranks.shards // self.gpus_per_node), 1
        if group == "copies":
            apart = -(-ranks.shards // self.gpus_per_node)
            nodes = self.nodes // apart if ranks.shards >= self.gpus_per_node else self.nodes
            return ranks.copies, max(1, min(nodes, ranks.copies)), within
        return ranks.total, self.nodes, 1


class Line(NamedTuple):
    """Seconds of S bytes: `fixed_s + s_per_byte * S`."""

    fixed_s: float
    s_per_byte: float

    def at(self, size: float) -> float:
        """Seconds."""
        return self.fixed_s + self.s_per_byte * size


def fit_line(sizes: Mapping[float, float]) -> Line:
    """The line through measured seconds by bytes, with least squares of relative errors.

    Neither number is negative.

    Args:
        sizes: bytes -> seconds; at least two.
    """
    if len(sizes) < 2:
        raise ValueError(f"sizes={list(sizes)}: a line needs at least two")
    weighted = [(size, seconds, seconds**-2) for size, seconds in sizes.items()]
    w = sum(weight for _, _, weight in weighted)
    x = sum(weight * size for size, _, weight in weighted)
    y = sum(weight * seconds for _, seconds, weight in weighted)
    xx = sum(weight * size**2 for size, _, weight in weighted)
    xy = sum(weight * size * seconds for size, seconds, weight in weighted)
    slope = (w * xy - x * y) / (w * xx - x * x)
    fixed = (y - slope * x) / w
    if slope < 0:
        return Line(y / w, 0.0)
    if fixed < 0:
        return Line(0.0, xy / xx)
    return Line(fixed, slope)


@dataclass(frozen=True, slots=True)
class MeasuredLines:
    """Collectives of one machine as fitted lines.

    Attributes:
        lines: by kind of collective; "weights" and "gradients" instead of the kind for what FSDP2
            sends, whose copies and hooks then count. A kind without a line takes that of
            all-gathers.
    """

    lines: Mapping[str, Line]

    def seconds(self, message: Message, ranks: Ranks) -> float:
        """Of one of the equal collectives of a message."""
        sharded = message.part in ("weights", "gradients") and message.group == "shard"
        key = message.part if sharded and message.part in self.lines else message.kind
        return self.lines.get(key, self.lines["all_gather"]).at(message.bytes)
