"""Which images of a set are drawn for a sample, and what the faults among them mean for the rest."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fastmoco_pipelines.sampling.philox import philox_words

CONFIDENCE = 0.95
_STREAM = 0x73616D706C65  # key of these draws beside the seed, so that no augmentation shares them
_WORD = 64


def draw_sample(population: int, count: int, seed: int) -> NDArray[np.int64]:
    """`count` different numbers in [0, population), sorted; every such choice is as likely as any
    other one.

    The choice depends on the arguments alone, not on the machine or a version of numpy. By Floyd's
    method (Bentley and Floyd 1987, "A sample of brilliance"): one draw a number, in time and memory
    O(count).

    Raises:
        ValueError: if `seed` is not in [0, 2**64), or `count` not in [0, population].
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed}: must be from 0 to 2**64 - 1")
    if not 0 <= count <= population:
        raise ValueError(f"count={count}: must be from 0 to {population}")
    counters = np.arange(count, dtype=np.uint64)
    zeros = np.zeros(count, dtype=np.uint64)
    words = philox_words((seed, _STREAM), (counters, zeros, zeros, zeros))[0].tolist()
    chosen: set[int] = set()
    for word, last in zip(words, range(population - count, population), strict=True):
        number = (word * (last + 1)) >> _WORD  # uniform in [0, last]
        chosen.add(last if number in chosen else number)
    return np.array(sorted(chosen), dtype=np.int64)


def share_bound(bad: int, count: int, confidence: float = CONFIDENCE) -> float:
    """The largest share of bad images that a sample allows: one-sided, exact (Clopper and Pearson
    1934).

    It is the share p at which `bad` or fewer of `count` independent draws are bad with probability
    1 - confidence. With no bad one it is about 3 / count, the rule of three. Draws without
    replacement, as of `draw_sample`, know more than independent ones, so that the bound holds for
    them too.
    """
    if bad >= count:
        return 1.0
    if bad == 0:
        return -math.expm1(math.log1p(-confidence) / count)

    # Logarithms of the binomial coefficients; then the root of a falling function by halving.
    steps = np.arange(bad)
    coefficients = np.concatenate([[0.0], np.cumsum(np.log((count - steps) / (steps + 1)))])
    faults = np.arange(bad + 1)
    low = bad / count
    high = 1.0
    for _ in range(100):
        share = (low + high) / 2
        if share in (low, high):
            break
        terms = coefficients + faults * math.log(share) + (count - faults) * math.log1p(-share)
        if np.exp(terms).sum() > 1 - confidence:
            low = share
        else:
            high = share
    return high
