"""The search: successive halving of candidates beside the defaults, and a last comparison.

Every candidate is measured between two measurements of the defaults, and its ratio is to their mean,
because the speed of a machine drifts. The best of each group are combined; the fastest finalist is
then measured again in pairs with the defaults, and only these pairs are reported: they were not used
to choose it. If their median is not above 1, the defaults are the result.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from fastmoco.planning.tuning.agreement import STEPS, difference
from fastmoco.planning.tuning.halving import (
    BESIDE,
    FINALISTS,
    LEAST_STEPS,
    WARM_UP,
    BudgetError,
    Cost,
    Schedule,
    pairs_and_steps,
    schedule,
)
from fastmoco.planning.tuning.measure import Failure, Measurement
from fastmoco.planning.tuning.settings import Settings
from fastmoco.planning.tuning.space import GROUPS, Candidate, Skipped

Criterion = Literal["wall", "cpu"]
DEFAULTS = Settings()
PATIENCE = 4.0
"""A measurement is ended after this multiple of what one of the defaults takes, if that is longer
than `PATIENCE_S`."""
PATIENCE_S = 90.0
"""Seconds that a measurement may take in any case, as far as its round has them: some compile."""
QUIET = 0.15
"""Share of all cores that other processes take, above which the wall clock of a CPU measures them."""
GAIN = 1.01
"""Smallest ratio of candidates that are combined."""


class Measure(Protocol):
    """Measures settings once."""

    def __call__(
        self,
        settings: Settings,
        *,
        warm_up: int,
        steps: int,
        limit_s: float,
        at_rest: bool = False,
    ) -> Measurement | Failure:
        """The result, or why there is none."""


@dataclass
class Row:
    """A line of the table: settings, and what is known of them."""

    candidate: Candidate | None
    """None: the defaults."""
    state: Literal["waiting", "measured", "out", "refused", "failed", "late", "winner"] = "waiting"
    reason: str = ""
    round: int = 0
    """Number of its last round, from 1; 0: none."""
    measured: Measurement | None = None
    """The last measurement."""
    ratio: float | None = None
    """To the defaults beside it; of several measurements the median."""

    @property
    def settings(self) -> Settings:
        """Those that are measured."""
        return DEFAULTS if self.candidate is None else self.candidate.settings

    @property
    def alive(self) -> bool:
        """Whether it may still win."""
        return self.state in ("waiting", "measured")


@dataclass
class Result:
    """What a search has found."""

    criterion: Criterion
    chosen: Settings
    """The winner; `DEFAULTS` if nothing is faster."""
    pairs: list[tuple[Measurement, Measurement]]
    """The last comparison: defaults and winner, each time measured one after the other."""
    steps: int
    """Measured steps of each of them."""
    rows: list[Row]
    skipped: list[Skipped]
    default: Measurement
    """The first measurement of the defaults."""
    seconds: float
    """Of the whole search."""
    others_share: float | None
    """Median share of all cores that other processes took."""
    notes: list[str] = field(default_factory=list)

    def ratios(self, criterion: str | None = None) -> list[float]:
        """Rate with the settings over rate with the defaults, of each pair."""
        by = criterion or self.criterion
        return [mine.rate(by) / other.rate(by) for other, mine in self.pairs]


class Search:
    """Searches the fastest settings within a budget. Use `run` once.

    Args:
        measure: of one process.
        candidates: called with the first measurement of the defaults and the criterion.
        budget_s: seconds for everything.
        criterion: what is compared; "auto": processor time on a CPU that others use too, else the
            wall clock.
        changed: called after each measurement with its row, and with None where several rows have
            changed.
        note: called with each line for the user.
        clock: seconds.

    Attributes:
        rows: the defaults, then every candidate, in the order of the space.
        skipped: what is not measured.
        criterion: as chosen.
        notes: lines for the user so far.
    """

    def __init__(
        self,
        measure: Measure,
        candidates: Callable[[Measurement, Criterion], tuple[list[Candidate], list[Skipped]]],
        *,
        budget_s: float,
        criterion: Literal["auto", "wall", "cpu"] = "auto",
        changed: Callable[[Row | None], None] = lambda row: None,
        note: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rows: list[Row] = [Row(None)]
        self.skipped: list[Skipped] = []
        self.notes: list[str] = []
        self.criterion: Criterion = "wall"
        self._measure = measure
        self._candidates = candidates
        self._wanted = criterion
        self._changed = changed
        self._tell = note
        self._clock = clock
        self._began = clock()
        self._end = self._began + budget_s
        self._cost = Cost(0.0, 0.0)
        self._others: list[float] = []

    def run(self) -> Result:
        """Measure, within the budget.

        Raises:
            BudgetError: if it does not suffice for a single candidate beside the defaults.
            ValueError: if the defaults cannot be measured.
        """
        default = self._first()
        if self._wanted == "auto":
            self.criterion = self._criterion(default)
        else:
            self.criterion = self._wanted
        found, self.skipped = self._candidates(default, self.criterion)
        self.rows += [Row(one) for one in found]
        planned = schedule(len(found), self._left(), self._cost)
        self._keep(found, planned)

        # Halve, then combine, then compare the winner with the defaults alone.
        self._halve(planned)
        winner = self._finals(planned)
        if winner is not None:
            winner.round = len(planned.rounds) + 2
        pairs, steps = self._pairs(winner)
        result = Result(
            criterion=self.criterion,
            chosen=DEFAULTS if winner is None else winner.settings,
            pairs=pairs,
            steps=steps,
            rows=self.rows,
            skipped=self.skipped,
            default=default,
            seconds=self._clock() - self._began,
            others_share=statistics.median(self._others) if self._others else None,
            notes=self.notes,
        )
        if winner is None or not pairs or statistics.median(result.ratios()) <= 1:
            self._fall_back(result, winner)
        else:
            winner.state = "winner"
        self._changed(None)
        return result

    def best(self) -> Row | None:
        """The fastest settings beside the defaults so far, for a search that is interrupted."""
        known = [row for row in self.rows[1:] if row.alive and row.ratio is not None]
        return max(known, key=lambda row: row.ratio or 0.0, default=None)

    def _first(self) -> Measurement:
        """The defaults, which show what a measurement costs and what losses must be."""
        seconds = self._left()
        first = self._measure(DEFAULTS, warm_up=WARM_UP, steps=LEAST_STEPS, limit_s=seconds)
        if isinstance(first, Failure) and first.reason.startswith("not ended"):
            raise BudgetError(
                f"the budget of {seconds:.0f} s does not suffice to measure the defaults once: "
                "give a longer --budget"
            )
        if isinstance(first, Failure):
            raise ValueError(first.reason)
        steps = WARM_UP + LEAST_STEPS
        self._cost = Cost(max(0.0, first.seconds - steps * first.step_s), first.step_s)
        row = self.rows[0]
        row.measured, row.ratio, row.state = first, 1.0, "measured"
        self._seen(first)
        self._changed(row)
        return first

    def _criterion(self, default: Measurement) -> Criterion:
        """What is compared, and why."""
        busy = default.others_share or 0.0
        if default.details.get("device_type") != "cpu" or busy <= QUIET:
            return "wall"
        self._say(
            f"other processes take {busy:.0%} of the cores: images per CPU-second are compared, "
            "which cannot judge numbers of threads (--criterion wall compares images per second)"
        )
        return "cpu"

    def _keep(self, found: Sequence[Candidate], planned: Schedule) -> None:
        """Leave out the candidates for which there is no time."""
        count = planned.rounds[0].candidates if planned.rounds else 0
        for row in self.rows[1 + count :]:
            row.state, row.reason = "late", "no time within the budget"
        if count < len(found):
            self._say(f"{count} of {len(found)} candidates fit into the budget")
        self._changed(None)

    def _halve(self, planned: Schedule) -> None:
        """Rounds of successive halving."""
        alive = [row for row in self.rows[1:] if row.alive]
        total = sum(one.measurements * self._cost.of(one.steps) for one in planned.rounds)
        ends = self._clock()
        for number, one in enumerate(planned.rounds, 1):
            share = one.measurements * self._cost.of(one.steps) / total
            ends += share * planned.halving_s
            alive = [row for row in alive if row.alive][: one.candidates]
            # What compiles comes last: it may take the time of others.
            alive.sort(key=lambda row: bool(row.candidate and row.candidate.slow_start))
            self._round(alive, number, one.steps, ends)
            alive = sorted(
                (row for row in alive if row.alive and row.round == number),
                key=lambda row: -(row.ratio or 0.0),
            )
            after = planned.rounds[number].candidates if number < len(planned.rounds) else FINALISTS
            for row in alive[after:]:
                row.state, row.reason = "out", f"slower half of round {number}"
            self._changed(None)

    def _round(self, rows: Sequence[Row], number: int, steps: int, ends: float) -> None:
        """Measure rows with the defaults before each few of them and at the end."""
        open_rows: list[tuple[Row, Measurement]] = []
        before = self._default(steps, ends)
        for place, row in enumerate(rows):
            if place and place % BESIDE == 0:
                before = self._compare(open_rows, before, self._default(steps, ends), number)
                open_rows = []
            measured = self._settings(row, steps, ends)
            if measured is not None:
                open_rows.append((row, measured))
        if open_rows:
            self._compare(open_rows, before, self._default(steps, ends), number)

    def _compare(
        self,
        rows: Sequence[tuple[Row, Measurement]],
        before: Measurement | None,
        after: Measurement | None,
        number: int,
    ) -> Measurement | None:
        """Set the ratios of rows to the mean of the defaults around them; returns the later."""
        beside = [one.rate(self.criterion) for one in (before, after) if one is not None]
        beside = beside or [self._known().rate(self.criterion)]
        for row, measured in rows:
            row.measured, row.round, row.state = measured, number, "measured"
            row.ratio = measured.rate(self.criterion) / statistics.fmean(beside)
            self._changed(row)
        return after or before

    def _finals(self, planned: Schedule) -> Row | None:
        """The fastest of the finalists; None if nothing is faster than the defaults."""
        known = [row for row in self.rows[1:] if row.state in ("measured", "out") and row.ratio]
        faster = sorted(
            (row for row in known if (row.ratio or 0.0) > 1), key=lambda row: -(row.ratio or 0.0)
        )
        finalists = [*self._combined(faster), *faster[:1]]
        most = int(planned.finalists_s / self._cost.of(LEAST_STEPS)) - 1
        if most < 2:  # no time for a final: the last comparison judges the first
            finalists = finalists[:1]
        finalists = finalists[: max(1, min(most, FINALISTS))]
        for row in self.rows[1:]:
            if row.alive and not any(row is one for one in finalists):
                row.state, row.reason = "out", "not among the finalists"
        self.rows += [row for row in finalists if not any(row is one for one in self.rows)]
        for row in finalists:
            row.state, row.reason = "measured", ""
        self._changed(None)
        if len(finalists) < 2:
            return finalists[0] if finalists else None

        # In turn, each time in another order.
        ends = self._clock() + planned.finalists_s
        ratios: dict[int, list[float]] = {id(row): [] for row in finalists}
        steps, number = self._final_steps(len(finalists), planned), len(planned.rounds) + 1
        turns = 0
        while not turns or self._fits((len(finalists) + 1) * self._cost.of(steps), ends):
            order = finalists[turns % len(finalists) :] + finalists[: turns % len(finalists)]
            before = self._default(steps, ends)
            for row in order:
                measured = self._settings(row, steps, ends) if row.alive else None
                if measured is not None:
                    self._compare([(row, measured)], before, None, number)
                    ratios[id(row)].append(row.ratio or 0.0)
            turns += 1
        left = [row for row in finalists if row.alive and ratios[id(row)]]
        for row in left:
            row.ratio = statistics.median(ratios[id(row)])
        if not left:  # no time, or failed combinations: the best of the rounds before
            left = [row for row in finalists if row.alive and row.ratio]
        winner = max(left, key=lambda row: row.ratio or 0.0, default=None)
        for row in finalists:
            if row.alive and row is not winner:
                row.state, row.reason = "out", "slower finalist"
        return winner

    def _final_steps(self, finalists: int, planned: Schedule) -> int:
        """Steps with which all finalists are measured twice, if they can."""
        steps = LEAST_STEPS
        while 2 * (finalists + 1) * self._cost.of(2 * steps) <= planned.finalists_s and steps < 64:
            steps *= 2
        return steps

    def _combined(self, faster: Sequence[Row]) -> list[Row]:
        """The best of all groups together, and of the two best groups."""
        best: dict[str, Row] = {}
        for row in faster:
            if row.candidate is not None and (row.ratio or 0.0) > GAIN:
                best.setdefault(row.candidate.group, row)
        rows = sorted(best.values(), key=lambda row: -(row.ratio or 0.0))
        combined = []
        for part in dict.fromkeys((len(rows), 2)):
            if part >= 2 and len(rows) >= part:
                # In the order of the groups, so that a script reads the same each time.
                of_group = {row.candidate.group: row for row in rows[:part] if row.candidate}
                together = DEFAULTS
                for group in GROUPS:
                    together |= of_group[group].settings if group in of_group else DEFAULTS
                combined.append(Row(Candidate("all", together)))
        return combined

    def _pairs(self, winner: Row | None) -> tuple[list[tuple[Measurement, Measurement]], int]:
        """The winner beside the defaults, in turn, until the budget is used up."""
        count, steps = pairs_and_steps(self._left(), self._cost)
        pairs: list[tuple[Measurement, Measurement]] = []
        for number in range(count if winner is not None else 0):
            assert winner is not None  # noqa: S101 - a type: see the range
            if number and not self._fits(2 * self._cost.of(steps), self._end):
                break
            first_default = number % 2 == 0
            other = self._default(steps, self._end) if first_default else None
            mine = self._settings(winner, steps, self._end)
            if mine is None:
                break
            other = other or self._default(steps, self._end)
            if other is None:
                break
            pairs.append((other, mine))
            winner.measured = mine
            ratios = [a.rate(self.criterion) / b.rate(self.criterion) for b, a in pairs]
            winner.ratio = statistics.median(ratios)
            self._changed(winner)
        return pairs, steps

    def _fall_back(self, result: Result, winner: Row | None) -> None:
        """Take the defaults, with the reason."""
        if winner is None:
            reason = "no setting was faster than the defaults"
        elif not winner.alive:
            reason = f"{winner.settings} has failed in the last comparison: {winner.reason}"
        elif not result.pairs:
            reason = "no time was left to compare the winner with the defaults"
        else:
            ratio = statistics.median(result.ratios())
            reason = f"{winner.settings} was no faster in the last comparison ({ratio:.3f})"
        if winner is not None and winner.alive:
            winner.state, winner.reason = "out", "no faster in the last comparison"
            self._changed(winner)
        self._say(f"{reason}: the defaults are kept")
        result.chosen = DEFAULTS
        result.pairs = []

    def _default(self, steps: int, ends: float) -> Measurement | None:
        """The defaults again; None if there is no time, or it has failed."""
        if not self._fits(self._cost.of(steps), ends):
            return None
        found = self._measured(DEFAULTS, steps, self._limit(steps))
        if isinstance(found, Failure):
            self._say(f"the defaults: {found.reason}")
            return None
        self._seen(found)
        row = self.rows[0]
        row.measured = found
        self._changed(row)
        return found

    def _settings(self, row: Row, steps: int, ends: float) -> Measurement | None:
        """Measure a candidate; None if there is no time, or it has failed or trains another
        model."""
        left = ends - self._clock()
        if not self._fits(self._cost.of(steps), ends):
            if row.ratio is None:
                row.state, row.reason = "late", "the time of its round was used up"
                self._changed(row)
            return None
        # Twice what the defaults take, even if that is after the end of the round.
        most = max(2 * self._cost.of(steps), min(self._limit(steps), left))
        limit = min(most, self._left())
        found = self._measured(row.settings, steps, limit)
        if isinstance(found, Failure):
            row.state, row.reason = "failed", found.reason
            self._changed(row)
            return None
        self._seen(found)
        if reason := self._differs(found):
            row.state, row.reason, row.measured = "refused", reason, found
            self._changed(row)
            return None
        return found

    def _measured(self, settings: Settings, steps: int, limit_s: float) -> Measurement | Failure:
        """Measure once, as the criterion needs it."""
        at_rest = self.criterion == "cpu"
        return self._measure(
            settings, warm_up=WARM_UP, steps=steps, limit_s=limit_s, at_rest=at_rest
        )

    def _differs(self, found: Measurement) -> str:
        """How the first steps differ from those of the defaults; empty if they agree."""
        mine, precision = self._known(), str(self._known().details.get("precision", "fp32"))
        if len(found.losses) < min(STEPS, len(mine.losses)):
            return "it has reported no losses"
        return difference(
            precision, mine.losses, found.losses, mine.gradient_norms, found.gradient_norms
        )

    def _known(self) -> Measurement:
        """A measurement of the defaults."""
        measured = self.rows[0].measured
        assert measured is not None  # noqa: S101 - a type: the defaults are measured first
        return measured

    def _limit(self, steps: int) -> float:
        """Seconds after which a measurement is ended."""
        wanted = max(PATIENCE * self._cost.of(steps), PATIENCE_S)
        return max(self._cost.of(LEAST_STEPS), min(wanted, self._left()))

    def _fits(self, seconds: float, ends: float) -> bool:
        return self._clock() + seconds <= min(ends, self._end) + 1e-9

    def _left(self) -> float:
        return self._end - self._clock()

    def _seen(self, found: Measurement) -> None:
        if found.others_share is not None:
            self._others.append(found.others_share)

    def _say(self, text: str) -> None:
        self.notes.append(text)
        self._tell(text)
