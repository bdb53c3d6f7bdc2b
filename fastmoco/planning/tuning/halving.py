"""How many candidates, rounds and steps fit into a time. Pure arithmetic.

A measurement costs the start of a process and its steps. The first one, of the defaults, shows what
both cost here. Of what is left of the budget, about half goes to rounds of successive halving, which
begin with all candidates and few steps and go on with the better half and twice the steps; the rest
is reserved for the finalists and for the last comparison with the defaults.
"""

from __future__ import annotations

from dataclasses import dataclass

WARM_UP = 4
"""Steps before the clock starts: more than the batches that a loader makes ahead by default."""
LEAST_STEPS = 4
MOST_STEPS = 64
"""Measured steps of one process, at least and at most."""
BESIDE = 4
"""Candidates between two measurements of the defaults, with which they are compared."""
FINALISTS = 3
LEAST_PAIRS, MOST_PAIRS = 2, 9
"""Measurements of the winner, each beside one of the defaults."""
FINALISTS_SHARE, PAIRS_SHARE = 0.17, 0.28
"""Of the budget after the first measurement."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a measurement takes, in seconds."""

    start: float
    """Until the clock starts, without the steps of the warm-up."""
    step: float

    def of(self, steps: int) -> float:
        """The whole measurement of some steps."""
        return self.start + (WARM_UP + steps) * self.step


@dataclass(frozen=True, slots=True)
class Round:
    """One round of successive halving."""

    candidates: int
    steps: int

    @property
    def measurements(self) -> int:
        """Those of the candidates, and of the defaults beside them."""
        return self.candidates + defaults_beside(self.candidates)


@dataclass(frozen=True, slots=True)
class Schedule:
    """What is measured within a time."""

    rounds: tuple[Round, ...]
    halving_s: float
    """Seconds of all rounds together."""
    finalists_s: float
    pairs_s: float


class BudgetError(ValueError):
    """A budget that does not suffice; the message has one that does."""


def defaults_beside(candidates: int) -> int:
    """Measurements of the defaults in a round: before each `BESIDE` candidates, and at the end."""
    return -(-candidates // BESIDE) + 1


def schedule(candidates: int, left_s: float, cost: Cost) -> Schedule:
    """Distribute what is left of a budget after the first measurement of the defaults.

    Args:
        candidates: to measure, if there is time for all of them.
        left_s: seconds.
        cost: of a measurement of the defaults.

    Raises:
        BudgetError: if there is no time for the defaults beside a single candidate.
    """
    least = cost.of(LEAST_STEPS)
    needed = (Round(1, LEAST_STEPS).measurements + 2 * LEAST_PAIRS) * least
    if left_s < needed:
        raise BudgetError(
            f"measuring the defaults once took {least:.0f} s, and {max(0.0, left_s):.0f} s are "
            f"left, too few to compare anything with them: take {_minutes(2 * (needed + least))} "
            "or more"
        )
    pairs = max(PAIRS_SHARE * left_s, 2 * LEAST_PAIRS * least)
    finalists = FINALISTS_SHARE * left_s
    if finalists < (2 + 1) * least:  # no time to compare two of them
        finalists = 0.0
    halving = left_s - pairs - finalists
    count = candidates
    while count and _seconds(_rounds(count, LEAST_STEPS), cost) > halving:
        count -= 1
    steps = LEAST_STEPS
    while count and steps < MOST_STEPS and _seconds(_rounds(count, 2 * steps), cost) <= halving:
        steps *= 2
    rounds = _rounds(count, steps)
    return Schedule(rounds, max(0.0, halving), finalists, pairs)


def pairs_and_steps(left_s: float, cost: Cost) -> tuple[int, int]:
    """How many pairs of measurements fit, and their steps: three pairs first, then longer ones,
    then more of them."""
    steps = LEAST_STEPS
    while steps < MOST_STEPS and 6 * cost.of(2 * steps) <= left_s:
        steps *= 2
    pairs = int(left_s / (2 * cost.of(steps)))
    return min(pairs, MOST_PAIRS), steps


def _rounds(candidates: int, steps: int) -> tuple[Round, ...]:
    """Rounds until few enough are left; a single one for few candidates."""
    rounds = []
    while candidates:
        rounds.append(Round(candidates, min(steps, MOST_STEPS)))
        if candidates <= FINALISTS:
            break
        candidates, steps = -(-candidates // 2), 2 * steps
        if candidates <= FINALISTS:  # they are the finalists
            break
    return tuple(rounds)


def _seconds(rounds: tuple[Round, ...], cost: Cost) -> float:
    return sum(one.measurements * cost.of(one.steps) for one in rounds)


def _minutes(seconds: float) -> str:
    """A budget of at least these seconds, as it is typed."""
    return f"--budget {-(-int(seconds + 1) // 60)}m"
