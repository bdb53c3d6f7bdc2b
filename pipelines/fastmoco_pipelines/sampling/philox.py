"""Philox 4x64-10 over whole arrays: the counter-based generator of every augmentation draw.

Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3". numpy ships the same
generator as an object with one stream each; thousands of samples a step need one call over all of
them. Bit-equal to numpy's (`np.random.Philox(counter=c, key=k).random_raw(4)`), which a test holds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = np.array([[0xD2E7470EE14C6C93], [0xCA5A826395121157]], dtype=np.uint64)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_ROUNDS = 10
_LOW32 = np.uint64(0xFFFFFFFF)
_SHIFT32 = np.uint64(32)
_MULTIPLIERS_LOW = _MULTIPLIERS & _LOW32
_MULTIPLIERS_HIGH = _MULTIPLIERS >> _SHIFT32


def philox_words(
    key: tuple[int, int],
    counters: tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]],
) -> NDArray[np.uint64]:
    """Return the four 64-bit words that numpy's Philox gives first when started at each counter.

    Args:
        key: two numbers below 2**64.
        counters: four uint64 arrays of one shape S, least significant word first. numpy steps the
            counter before it draws, so word 0 is evaluated at `counters[0] + 1`; it must stay below
            2**64 - 1 (no carry is made).

    Returns:
        [4, *S] uint64.
    """
    # Lanes 0 and 2 are multiplied, lanes 1 and 3 are mixed in: stacked in pairs, one numpy call
    # serves both.
    even = np.stack([counters[0] + np.uint64(1), counters[2]])
    odd = np.stack([counters[1], counters[3]])
    shape = even.shape
    even, odd = even.reshape(2, -1), odd.reshape(2, -1)
    for round_number in range(_ROUNDS):
        round_key = np.array(
            [[(key[i] + round_number * _WEYL[i]) & 0xFFFFFFFFFFFFFFFF] for i in range(2)],
            dtype=np.uint64,
        )
        low = even & _LOW32
        high = even >> _SHIFT32
        middle = high * _MULTIPLIERS_LOW
        cross = low * _MULTIPLIERS_HIGH
        middle += (low * _MULTIPLIERS_LOW) >> _SHIFT32
        middle += cross & _LOW32  # cannot overflow: (2**32-1)**2 + 2 * (2**32-1) = 2**64 - 1
        product_high = high * _MULTIPLIERS_HIGH
        product_high += cross >> _SHIFT32
        product_high += middle >> _SHIFT32
        product_low = even * _MULTIPLIERS
        odd ^= round_key
        # Philox crosses the lanes: the product of lane 2 goes to lanes 0 and 1, that of lane 0 to
        # lanes 2 and 3.
        even = product_high[::-1] ^ odd
        odd = product_low[::-1].copy()
    words = np.stack([even[0], odd[0], even[1], odd[1]])
    return words.reshape(4, *shape[1:])


def shuffle_words(seed: int, tag: int, epoch: int, count: int, part: int = 0) -> NDArray[np.uint64]:
    """[count] raw 64-bit words of Philox 4x64-10 for a part of an epoch: the same under every
    version of numpy."""
    key = np.array([seed, tag], dtype=np.uint64)
    counter = np.array([0, part, epoch, 0], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)
