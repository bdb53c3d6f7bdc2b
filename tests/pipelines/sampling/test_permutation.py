"""The keyed permutation: equal to plain integers, a permutation for every count, and a good one."""

from __future__ import annotations

import functools
import operator
import tracemalloc
from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest

from fastmoco_pipelines.sampling.permutation import BLOCK, KeyedPermutation, keyed_permutation

WORD = 2**64
PINNED = {
    10: [9, 2, 1, 4, 6, 5, 7, 8, 3, 0],
    1437: [781, 237, 541, 562, 938],
    1_281_167: [465185, 546678, 169496, 927337, 1233835],
    10**9: [998425030, 310970760, 206836229, 305925014, 395490465],
    2**62: [
        4351528385495747168,
        3107322812002480301,
        4550958480374141504,
        2557922981555619318,
        4362236279957693443,
    ],
}


def plain(
    position: int, words: np.ndarray, count: int, move: Callable[[int, int], int] = operator.add
) -> int:
    """The reference, one position at a time in Python's integers.

    Args:
        words: [passes, 4].
        move: how a draw moves a row or column: a sum, or the XOR of most Feistel networks.
    """

    def mixed(number: int, factor: int, offset: int) -> int:
        product = (number * factor + offset) % WORD
        return (product ^ product >> 32) * 0xD6E8FEB86659FD93 % WORD

    columns = 2
    while 4 * columns * columns <= count:
        columns *= 2
    rows = -(-count // columns)
    while True:
        row, column = divmod(position, columns)
        for a, b, c, d in words.tolist():
            column = move(column, mixed(row, a, b) * columns // WORD) % columns
            row = move(row, (mixed(column, c, d) >> 32) * rows // 2**32) % rows
        position = row * columns + column
        if position < count:
            return position


@pytest.mark.parametrize("count", [2, 3, 5, 16, 17, 100, 1437, 1_281_167, 10**9, 10**12 + 7, 2**62])
def test_it_equals_plain_integers(count):
    permutation = keyed_permutation(3, 1, 4, count)
    positions = np.unique(np.linspace(0, count - 1, 20).astype(np.int64).clip(0, count - 1))
    values = permutation.at(np.tile(positions, 9))[: len(positions)]
    assert values.dtype == np.int64
    assert values.tolist() == [plain(p, permutation.words, count) for p in positions.tolist()]
    assert values.tolist() == [permutation.one(p) for p in positions.tolist()]
    words = np.random.Philox(key=[3, 0x7065726D757465], counter=[0, 4, 1, 0])
    assert np.array_equal(permutation.words.reshape(-1), words.random_raw(permutation.words.size))


def test_it_is_pinned():
    """A run resumed with a later version must see the same order: these numbers never change."""
    assert keyed_permutation(0, 0, 0, 10).at(np.arange(10)).tolist() == PINNED[10]
    for count in (1437, 1_281_167, 10**9, 2**62):
        positions = np.array([0, 1, 2, count // 2, count - 1])
        assert keyed_permutation(7, 3, 1, count).at(positions).tolist() == PINNED[count]


def test_every_small_count_is_permuted():
    for count in range(600):
        for seed in (0, 2**63 - 1):
            permutation = keyed_permutation(seed, count, 0, count)
            values = permutation.at(np.tile(np.arange(count), 9))[:count]
            assert np.array_equal(np.sort(values), np.arange(count)), count
            assert np.array_equal(values[:8], permutation.at(np.arange(min(count, 8))))


@pytest.mark.parametrize(
    "count", [1023, 1024, 1025, 4095, 4096, 4097, 65_535, 65_537, 99_991, 2**20 - 1, 2**20 + 1]
)
def test_larger_counts_are_permuted(count):
    """Counts about powers of 2 and 4, where the grid changes its form, and across blocks."""
    values = keyed_permutation(1, 2, 3, count).at(np.arange(count))
    assert np.array_equal(np.bincount(values, minlength=count), np.ones(count))


@pytest.mark.parametrize("count", [10**9, 10**12, 2**62])
def test_huge_counts_give_every_value_once(count):
    """As far as a sample shows: of 200,000 different positions no two have one value."""
    positions = np.unique(np.random.default_rng(0).integers(0, count, 200_000))
    values = keyed_permutation(5, 0, 0, count).at(positions)
    assert len(np.unique(values)) == len(positions)
    assert 0 <= values.min() < values.max() < count


def test_positions_may_have_any_shape_and_order():
    permutation = keyed_permutation(1, 0, 0, 50_000)
    whole = permutation.at(np.arange(50_000))
    positions = np.random.default_rng(0).integers(0, 50_000, (3, BLOCK))
    before = positions.copy()
    assert np.array_equal(permutation.at(positions), whole[positions])
    assert np.array_equal(positions, before)
    assert permutation.at(positions[:, ::7].T).shape == (len(positions[0, ::7]), 3)
    assert permutation.at(np.empty(0, dtype=np.int64)).tolist() == []


def test_memory_is_that_of_the_positions():
    tracemalloc.start()
    keyed_permutation(1, 0, 0, 10**9).at(np.arange(4096))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6


# Quality. Each statistic gives the deviation from what uniform permutations give, in standard
# deviations. The real permutation must be near, and one of too few passes far away, so that a
# statistic that sees nothing is noticed.


@functools.lru_cache(maxsize=1)
def drawn_words(count: int, seeds: int, epoch: int) -> np.ndarray:
    """[passes, 4, seeds]: those of many permutations."""
    each = [keyed_permutation(seed, epoch, 0, count) for seed in range(seeds)]
    return np.stack([one.words for one in each], axis=-1)


def drawn(
    count: int, seeds: int, passes: int | None = None, epoch: int = 0, positions: int = 0
) -> np.ndarray:
    """[seeds, positions or count]: the first values of many permutations, computed together."""
    words = drawn_words(count, seeds, epoch)[:passes, ..., None]
    together = KeyedPermutation(count, words)
    cells = np.arange(positions or count, dtype=np.uint64)
    values = together._on_the_grid(np.tile(cells, (seeds, 1)))
    while (outside := values >= np.uint64(count)).any():
        values = np.where(outside, together._on_the_grid(values.copy()), values)
    return values.astype(np.int64)


def deviation(total: float, freedom: int) -> float:
    """Of a sum distributed as chi-square, by its cube root (Wilson and Hilferty 1931)."""
    spread = 2 / (9 * freedom)
    return float(((total / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5)


def of_counts(observed: np.ndarray, expected: np.ndarray | float) -> float:
    return deviation(float(((observed - expected) ** 2 / expected).sum()), observed.size - 1)


def places_and_values(values: np.ndarray) -> float:
    """Every value is at every place equally often."""
    seeds, count = values.shape
    table = np.stack([np.bincount(column, minlength=count) for column in values.T])
    squares = float(((table - seeds / count) ** 2).sum())
    return deviation(squares * (count - 1) / seeds, (count - 1) ** 2)


def whole_orders(values: np.ndarray) -> float:
    """Each of the count! permutations is drawn equally often."""
    seeds, count = values.shape
    weights = count ** np.arange(count)
    every = np.sort(np.array(list(permutations(range(count)))) @ weights)
    observed = np.bincount(np.searchsorted(every, values @ weights), minlength=len(every))
    return of_counts(observed, seeds / len(every))


def pairs(values: np.ndarray) -> float:
    """Each pair of values is at each of three pairs of places equally often; the largest."""
    seeds, count = values.shape
    found = []
    for other in (1, 2, 4):
        table = np.bincount(values[:, 0] * count + values[:, other], minlength=count**2)
        observed = table.reshape(count, count)[~np.eye(count, dtype=bool)]
        found.append(of_counts(observed, seeds / observed.size))
    return max(found, key=abs)


def fixed_points(values: np.ndarray) -> float:
    """How many values are at their own place: by Poisson's law of mean 1."""
    fixed = (values == np.arange(values.shape[1])).sum(axis=1)
    law = np.exp(-1) / np.array([1, 1, 2, 6])
    expected = len(values) * np.append(law, 1 - law.sum())
    return of_counts(np.bincount(np.minimum(fixed, 4), minlength=5), expected)


def cycles(values: np.ndarray) -> np.ndarray:
    """[seeds]: cycles of each permutation, by the smallest place that each place leads to."""
    least = np.tile(np.arange(values.shape[1]), (len(values), 1))
    jump, length = values, 1
    while length < values.shape[1]:
        least = np.minimum(least, np.take_along_axis(least, jump, axis=1))
        jump, length = np.take_along_axis(jump, jump, axis=1), 2 * length
    return (least == np.arange(values.shape[1])).sum(axis=1)


def cycle_counts(values: np.ndarray) -> float:
    """Mean number of cycles: the harmonic number of the count."""
    one_by_one = 1 / np.arange(1, values.shape[1] + 1)
    mean, variance = one_by_one.sum(), (one_by_one - one_by_one**2).sum()
    return float((cycles(values).mean() - mean) / (variance / len(values)) ** 0.5)


def parity(values: np.ndarray) -> float:
    """Half of the permutations are odd."""
    odd = (values.shape[1] - cycles(values)) % 2
    return float((odd.mean() - 0.5) / (0.25 / len(values)) ** 0.5)


def inversions(values: np.ndarray) -> float:
    """Mean and variance of the number of pairs out of order; the larger deviation."""
    seeds, count = values.shape
    found = sum((values[:, i + 1 :] < values[:, i : i + 1]).sum(axis=1) for i in range(count))
    mean, variance = count * (count - 1) / 4, count * (count - 1) * (2 * count + 5) / 72
    standard = (found - mean) / variance**0.5
    off, wide = standard.mean() * seeds**0.5, ((standard**2).mean() - 1) * (seeds / 2) ** 0.5
    return float(max(off, wide, key=abs))


# Count, seeds, and statistics, each with the passes of a permutation that it must find bad.
QUALITY = [
    (4, 20_000, {whole_orders: 2, inversions: 1}),
    (5, 20_000, {places_and_values: 2, whole_orders: 3, pairs: 3, cycle_counts: 2}),
    (10, 20_000, {pairs: 4, fixed_points: 4, cycle_counts: 2, inversions: 3}),
    (16, 10_000, {pairs: 2, fixed_points: 2, cycle_counts: 1, inversions: 1}),
    (17, 10_000, {places_and_values: 1, pairs: 2, fixed_points: 1, inversions: 2}),
    (100, 3_000, {pairs: 1, fixed_points: 1, inversions: 2}),
]


@pytest.mark.parametrize(
    ("count", "seeds", "statistics"), QUALITY, ids=[str(q[0]) for q in QUALITY]
)
def test_small_counts_are_shuffled_well(count, seeds, statistics):
    values = drawn(count, seeds)
    for seed in range(3):
        assert np.array_equal(
            values[seed], keyed_permutation(seed, 0, 0, count).at(np.arange(count))
        )
    every = {places_and_values, cycle_counts, parity, *statistics}
    assert {one.__name__: one(values) for one in every if abs(one(values)) > 4} == {}
    weak = {passes: drawn(count, seeds, passes) for passes in set(statistics.values())}
    for statistic, passes in statistics.items():
        assert abs(statistic(weak[passes])) > 6, (statistic.__name__, passes)


def test_half_are_odd_where_a_usual_network_has_even_ones_only():
    """A Feistel network with XOR on 2**k values, k > 2, draws even permutations alone."""
    values = drawn(64, 1000)
    assert abs(parity(values)) < 4
    words = [keyed_permutation(seed, 0, 0, 64).words for seed in range(20)]
    usual = np.array([[plain(at, one, 64, operator.xor) for at in range(64)] for one in words])
    assert np.array_equal(np.sort(usual, axis=1), np.tile(np.arange(64), (20, 1)))
    assert not ((64 - cycles(usual)) % 2).any()


LARGE = [1437, 1_281_167, 10**9]


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Between two arrays [permutations, places], whose values are near uniform and independent; in
    standard deviations."""
    one, other = one - one.mean(), other - other.mean()
    return float((one * other).mean() / one.std() / other.std() * one.size**0.5)


@pytest.mark.parametrize("count", LARGE)
def test_neighbours_epochs_and_seeds_have_nothing_in_common(count):
    """Neighbours in a row and in a column of the grid, this epoch and the next, this seed and the
    next."""
    seeds, places = 40, 1400
    values = drawn(count, seeds, positions=places)
    after = drawn(count, seeds, epoch=1, positions=places)
    assert abs(correlation(values[:, 1:], values[:, :-1])) < 4
    assert abs(correlation(values[:, 32:], values[:, :-32])) < 4
    assert abs(correlation(values, after)) < 4
    assert abs(correlation(values[1:], values[:-1])) < 4
    # How many of 1400 places hold the same sample in both: Poisson's law.
    expected = seeds * places / count
    assert abs((values == after).sum() - expected) <= 4 * expected**0.5 + 1
    assert abs((values[1:] == values[:-1]).sum() - expected) <= 4 * expected**0.5 + 1

    # They see an order that a buffer has shuffled, and an epoch that is the last one rotated.
    buffered = np.sort(values.reshape(seeds, -1, 4), axis=1).reshape(seeds, -1)
    assert abs(correlation(buffered[:, 1:], buffered[:, :-1])) > 20
    assert abs(correlation(values, (values + count // 4) % count)) > 20


@pytest.mark.parametrize("count", LARGE[1:])
def test_a_block_of_a_huge_set_is_uniform(count):
    """Values, their low digits, the differences of neighbours, and how many neighbours in a row of
    the grid are neighbours still."""
    columns = 2 ** keyed_permutation(0, 0, 0, count).column_bits
    seeds, places = 40, 4096

    def found(passes: int | None = None) -> dict[str, float]:
        values = drawn(count, seeds, passes, positions=places)
        steps = np.diff(values, axis=1)
        numbers = {
            "value": values * 256 // count,
            "low digits": values % 251,
            "step": steps % count * 256 // count,
            "low digits of the step": steps % 251,
        }
        ranges = (256, 251, 256, 251)
        neighbours = (steps % columns == 1).sum() - steps.size / columns
        return {"neighbours": neighbours / (steps.size / columns) ** 0.5} | {
            name: of_counts(np.bincount(one.reshape(-1), minlength=most), one.size / most)
            for (name, one), most in zip(numbers.items(), ranges, strict=True)
        }

    assert {name: value for name, value in found().items() if abs(value) > 4} == {}
    assert found(passes=1)["neighbours"] > 20
    if count < 10**9:  # two passes leave one pair in `rows` alone: too few of a billion
        assert found(passes=2)["neighbours"] > 6


def test_a_batch_of_a_billion_images_is_spread_over_shards_and_classes():
    """100,000 shards of 10,000 images; 1,000 classes, one after another in the set."""
    values = drawn(10**9, 30, positions=4096)
    shards = np.array([len(np.unique(batch // 10_000)) for batch in values])
    share = (1 - 1e-5) ** 4096
    mean, variance = 1e5 * (1 - share), 1e5 * share * (1 - share * (1 + 4096e-5))
    assert abs(shards.mean() - mean) < 4 * (variance / 30) ** 0.5
    assert abs(shards - mean).max() < 5 * variance**0.5
    classes = np.bincount((values // 1_000_000).reshape(-1), minlength=1000)
    assert abs(of_counts(classes, values.size / 1000)) < 4
