"""Which images a sample draws, and what it proves."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from math import comb

import numpy as np
import pytest

from fastmoco_pipelines.inspecting.draw import draw_sample, share_bound


def test_every_choice_is_as_likely_as_any_other():
    """Chi-square over all 20 choices of 3 out of 6; 43.8 is exceeded once in a thousand times."""
    tries = 4000
    counts = Counter(tuple(draw_sample(6, 3, seed).tolist()) for seed in range(tries))
    assert set(counts) == set(combinations(range(6), 3))
    expected = tries / 20
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 43.8


def test_a_large_set_is_drawn_from_evenly():
    """16 stretches of a billion images; 30.6 is exceeded once in a hundred times, 37.7 in a
    thousand."""
    population = 10**9
    drawn = draw_sample(population, 16_000, 7)
    assert len(set(drawn.tolist())) == 16_000
    assert (np.diff(drawn) > 0).all()
    counts = np.bincount(drawn * 16 // population, minlength=16)
    assert ((counts - 1000) ** 2 / 1000).sum() < 37.7


GOLDEN = [195504, 451331, 686582, 702101, 1054199, 1123424]


def test_the_choice_is_the_same_everywhere_and_another_one_for_another_seed():
    assert draw_sample(1_281_167, 6, 0).tolist() == GOLDEN
    assert draw_sample(1_281_167, 6, 1).tolist() != GOLDEN


def test_all_and_none():
    assert draw_sample(9, 9, 3).tolist() == list(range(9))
    assert draw_sample(9, 0, 3).tolist() == []


@pytest.mark.parametrize(("count", "seed"), [(10, 0), (-1, 0), (1, -1), (1, 2**64)])
def test_impossible_draws_are_refused(count, seed):
    with pytest.raises(ValueError, match=r"must be from 0"):
        draw_sample(9, count, seed)


@pytest.mark.parametrize(("bad", "count"), [(0, 1), (0, 300), (1, 20), (3, 50), (19, 20), (7, 400)])
def test_the_bound_is_the_share_at_which_so_few_faults_have_five_percent(bad, count):
    share = share_bound(bad, count)
    few = sum(comb(count, i) * share**i * (1 - share) ** (count - i) for i in range(bad + 1))
    assert few == pytest.approx(0.05, rel=1e-9)
    assert share > bad / count


def test_the_bound_at_its_ends():
    assert share_bound(5, 5) == 1.0
    assert share_bound(0, 1000) == pytest.approx(3 / 1000, rel=5e-3)  # the rule of three


def test_the_bound_is_that_of_a_library():
    beta = pytest.importorskip("scipy.stats").beta
    for bad, count in ((0, 10), (1, 10), (12, 1000), (500, 1000), (40_000, 100_000), (99, 100)):
        assert share_bound(bad, count) == pytest.approx(
            beta.ppf(0.95, bad + 1, count - bad), rel=1e-9
        )
