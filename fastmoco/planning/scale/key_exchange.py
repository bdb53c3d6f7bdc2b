"""What the keys of the other ranks cost: gathered, or in a ring.

With n ranks of B images, D channels, e bytes per element, and 8 D FLOPs per query and key (two
directions, a product forward and one for the gradient):

    gathered:  all-gather of 2 n B D e bytes + 8 n B^2 D / rate
    ring:      8 B^2 D / rate + (n - 1) max(send of 2 B D e bytes, 8 B^2 D / rate)

A block of the ring also costs its launches. Bytes of both are those of the planner.
"""

from __future__ import annotations

from typing import NamedTuple

from fastmoco.planning.scale.messages import Message, Ranks
from fastmoco.planning.scale.network import Network

LAUNCHES = 6
"""Kernels that a block takes: two directions of three."""


class KeyCosts(NamedTuple):
    """Of one step and rank."""

    gathered_s: float
    ring_s: float
    gathered_bytes: float
    ring_bytes: float

    @property
    def ring_is_faster(self) -> bool:
        """Or equally fast."""
        return self.ring_s <= self.gathered_s


def key_costs(
    images: int,
    dim: int,
    ranks: Ranks,
    network: Network,
    *,
    element: int,
    s_per_flop: float,
    launch_s: float,
    key_bytes: float,
) -> KeyCosts:
    """Seconds of exchange and loss, and bytes of the keys of the other ranks.

    Args:
        images: B, of a rank.
        dim: D.
        ranks: n.
        network: of all ranks.
        element: bytes per element of the keys.
        s_per_flop: of products.
        launch_s: of a kernel.
        key_bytes: `StepCosts.key_bytes`: of an image, as received and as normalised.
    """
    block = 2 * images * dim * element
    block_s = max(8 * images**2 * dim * s_per_flop, LAUNCHES * launch_s)
    whole_s = max(8 * ranks.total * images**2 * dim * s_per_flop, LAUNCHES * launch_s)
    gather = Message("keys", "all_gather", ranks.total * block, 1, "all", "heads")
    send = Message("keys", "send", block, ranks.total - 1, "all", "heads")
    others = ranks.total - 1
    return KeyCosts(
        gathered_s=network.seconds(gather, ranks) + whole_s,
        ring_s=block_s + others * max(network.seconds(send, ranks), block_s),
        gathered_bytes=2 * others * images * key_bytes,
        ring_bytes=3 * images * key_bytes,
    )
