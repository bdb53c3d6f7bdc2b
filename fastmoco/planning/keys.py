"""How the keys of other processes come to the loss, and the bytes that they take.

With b bytes of keys an image (`StepCosts.key_bytes`: as received and as normalised), B images a
process and W processes:

    gathered: 2 (W - 1) B b
    ring:     3 B b, for any W: what is in use, what arrives, and the running sums

Upper bounds: copies that are alive for a moment, and what an allocator rounds up, are within them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

GATHERED_SHARE = 0.05
"""Share of the memory of a step above which keys come in a ring. Gathering takes one collective
instead of W - 1 messages one after the other, so it stays the choice while its memory is small."""
RING_BLOCKS = 3
"""Blocks of keys of a ring, of B images each."""


class KeysChoice(NamedTuple):
    """How the keys of other processes come."""

    ring: bool
    """In blocks from the neighbour; else gathered."""
    reason: str
    """The reason, as a clause."""


def ring_above(wanted: str, memory: float) -> float:
    """Bytes of gathered keys above which they come in a ring.

    Args:
        wanted: as `MoCoV3Config.keys`.
        memory: bytes that the plan may use.
    """
    return {"gathered": math.inf, "ring": -math.inf}.get(wanted, GATHERED_SHARE * memory)


def gathered_bytes(key_bytes: float, images: int, world_size: int) -> float:
    """Bytes of gathered keys of the other processes."""
    return 2 * (world_size - 1) * images * key_bytes


def in_a_ring(key_bytes: float, images: int, world_size: int, above: float) -> bool:
    """Whether keys come in a ring, with `above` from `ring_above`."""
    if world_size == 1:
        return False
    gathered = gathered_bytes(key_bytes, images, world_size)
    saves = gathered > RING_BLOCKS * images * key_bytes
    return gathered > above and (saves or above == -math.inf)


def other_keys_bytes(key_bytes: float, images: int, world_size: int, above: float) -> float:
    """Bytes of the keys of the other processes, gathered or in a ring.

    Args:
        key_bytes: of an image.
        images: of one process.
        world_size: processes.
        above: from `ring_above`.
    """
    if in_a_ring(key_bytes, images, world_size, above):
        return RING_BLOCKS * images * key_bytes
    return gathered_bytes(key_bytes, images, world_size)


def choose_keys(
    wanted: str,
    key_bytes: float,
    images: int,
    world_size: int,
    memory: float,
) -> KeysChoice:
    """How the keys of several processes come, with the reason.

    Args:
        wanted: as `MoCoV3Config.keys`.
        key_bytes: of an image.
        images: of one process.
        world_size: processes.
        memory: bytes that the plan may use.
    """
    gathered = gathered_bytes(key_bytes, images, world_size)
    takes = f"{gib(gathered)} gathered"
    if wanted != "auto":
        return KeysChoice(wanted == "ring", f"requested; {takes}")
    ring = in_a_ring(key_bytes, images, world_size, ring_above(wanted, memory))
    if ring:
        takes += f", {gib(RING_BLOCKS * images * key_bytes)} in a ring"
    side = "above" if gathered > GATHERED_SHARE * memory else "within"
    reason = f"{takes}; {side} {GATHERED_SHARE:.0%} of {gib(memory)} free"
    if side == "above" and not ring:
        reason += f", but a ring would not save memory on {world_size} processes"
    return KeysChoice(ring, reason)


def gib(size: float) -> str:
    """Bytes as text."""
    return f"{size / 2**30:.2f} GiB" if size < 10 * 2**30 else f"{size / 2**30:.0f} GiB"
