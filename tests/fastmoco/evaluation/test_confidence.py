"""The Wilson interval against its definition and against published values."""

from __future__ import annotations

import math

import pytest

from fastmoco.evaluation.confidence import Z_95, wilson


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (3, 10), (10, 10), (729, 1000)])
def test_the_bounds_are_where_the_score_test_turns(correct: int, total: int) -> None:
    """A bound p solves (share - p)^2 = z^2 p (1 - p) / n."""
    share = correct / total
    for bound in wilson(correct, total):
        gap = (share - bound) ** 2 - Z_95**2 * bound * (1 - bound) / total
        assert math.isclose(gap, 0.0, abs_tol=1e-12)


def test_published_values() -> None:
    """Newcombe 1998, table I: 81 of 263 and 0 of 20."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_numbers_out_of_range_are_refused() -> None:
    for correct, total in ((-1, 3), (4, 3), (0, 0)):
        with pytest.raises(ValueError, match="needs 0 <= correct"):
            wilson(correct, total)
