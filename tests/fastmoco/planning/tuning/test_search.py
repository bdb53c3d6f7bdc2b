"""The search on made-up measurements: halving, budgets, refusals, interruptions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from fastmoco.planning.tuning import table
from fastmoco.planning.tuning.agreement import difference
from fastmoco.planning.tuning.halving import (
    LEAST_STEPS,
    WARM_UP,
    BudgetError,
    Cost,
    pairs_and_steps,
    schedule,
)
from fastmoco.planning.tuning.measure import Failure, Measurement
from fastmoco.planning.tuning.search import DEFAULTS, Result, Search
from fastmoco.planning.tuning.settings import Settings
from fastmoco.planning.tuning.space import Candidate

START, STEP = 2.0, 0.1


@dataclass
class Machine:
    """A machine with a clock of its own. Each option has a factor; speeds multiply, and all drift
    together as on a machine that others use."""

    factors: dict[str, float]
    drift: float = 0.0
    others: float = 0.0
    broken: dict[str, str] = field(default_factory=dict)
    other_losses: dict[str, tuple[float, ...]] = field(default_factory=dict)
    now: float = 0.0
    calls: list[tuple[str, int]] = field(default_factory=list)
    interrupt_at: int = -1

    def clock(self) -> float:
        return self.now

    def __call__(
        self,
        settings: Settings,
        *,
        warm_up: int,
        steps: int,
        limit_s: float,
        at_rest: bool = False,
    ) -> Measurement | Failure:
        names = [name for name, _ in settings.options]
        if len(self.calls) == self.interrupt_at:
            raise KeyboardInterrupt
        self.calls.append(("+".join(names) or "defaults", steps))
        for name in names:
            if self.broken.get(name) == "hangs":
                self.now += limit_s
                return Failure(f"not ended after {limit_s:.0f} s")
            if name in self.broken:
                self.now += START
                return Failure(self.broken[name])
        speed = 1.0
        for name in names:
            speed *= self.factors[name]
        self.now += START + (warm_up + steps) * STEP / speed
        speed *= 1 - self.drift * self.now
        losses = next((self.other_losses[n] for n in names if n in self.other_losses), (4.0,) * 3)
        return Measurement(
            images_per_s=100 * speed,
            images_per_cpu_s=50 * speed,
            step_s=STEP / speed,
            peak_bytes=2**30,
            losses=losses,
            gradient_norms=(1.0,) * 3,
            others_share=self.others,
            seconds=START + (warm_up + steps) * STEP,
            details={"precision": "fp32", "device_type": "cpu", "device": "cpu", "versions": {}},
        )


def group_of(name: str) -> Any:
    return {"a": "cores", "b": "chunks", "c": "loader"}[name[0]]


def searched(machine: Machine, budget_s: float = 1000.0, **more: Any) -> tuple[Search, list[str]]:
    notes: list[str] = []
    names = [*machine.factors, *machine.broken]
    candidates = [Candidate(group_of(name), Settings(options=((name, 1),))) for name in names]
    search = Search(
        machine,
        lambda default, criterion: (candidates, []),
        budget_s=budget_s,
        note=notes.append,
        clock=machine.clock,
        **more,
    )
    return search, notes


FACTORS = {
    "a1": 0.9, "b1": 1.02, "c1": 0.5, "a2": 1.2, "b2": 1.1, "c2": 0.99,
    "a3": 1.05, "b3": 0.7, "c3": 0.98, "a4": 1.01, "b4": 1.0, "c4": 0.97,
}  # fmt: skip


@pytest.mark.parametrize("drift", [0.0, 4e-4])
def test_the_best_of_each_group_are_found_combined_and_compared_in_pairs(drift: float) -> None:
    machine = Machine(FACTORS, drift)
    search, _ = searched(machine)
    result = search.run()
    assert dict(result.chosen.options) == {"a2": 1, "b2": 1}
    assert machine.now <= 1000
    assert len(result.pairs) >= 3
    assert all(ratio == pytest.approx(1.32, rel=0.02) for ratio in result.ratios())

    # Steps grow from round to round, and the defaults are in each of them.
    rounds = [steps for name, steps in machine.calls if name == "defaults"]
    assert rounds[-1] > rounds[0] == LEAST_STEPS
    measured = [name for name, _ in machine.calls if name != "defaults"]
    assert measured.count("a2") > measured.count("c1") == 1
    for number, (name, _) in enumerate(machine.calls):
        near = [other for other, _ in machine.calls[max(0, number - 4) : number + 5]]
        assert "defaults" in near, name


def test_the_same_measurements_give_the_same_search() -> None:
    calls = []
    for _ in range(2):
        machine = Machine(FACTORS)
        searched(machine)[0].run()
        calls.append(machine.calls)
    assert calls[0] == calls[1]


def test_without_anything_faster_the_defaults_are_the_result() -> None:
    search, notes = searched(Machine({"a1": 0.99, "b1": 0.8}))
    result = search.run()
    assert result.chosen == DEFAULTS
    assert result.pairs == []
    assert "the defaults are kept" in notes[-1]
    assert "the defaults are the fastest" in table.summary(result)[0]


def test_a_winner_by_noise_does_not_survive_the_last_comparison() -> None:
    """It is fast until it is compared in pairs."""

    class Lucky(Machine):
        def __call__(self, settings: Settings, **more: Any) -> Measurement | Failure:
            self.factors = {"a1": 1.5 if len(self.calls) < 4 else 0.9}
            return super().__call__(settings, **more)

    search, notes = searched(Lucky({"a1": 1.5}))
    result = search.run()
    assert result.chosen == DEFAULTS
    assert "no faster in the last comparison (0.9" in notes[-1]


def test_what_trains_another_model_is_refused_with_both_losses() -> None:
    machine = Machine(FACTORS, other_losses={"a2": (4.0, 4.001, 4.0)})
    search, _ = searched(machine)
    result = search.run()
    row = next(row for row in result.rows if row.settings.options == (("a2", 1),))
    assert row.state == "refused"
    assert "loss of step 1 is 4.001, with the defaults 4:" in row.reason
    assert "a2" not in dict(result.chosen.options)
    assert "refused: loss of step 1 is 4.001" in table.table(result.rows)


@pytest.mark.parametrize("reason", ["out of memory: 3 GiB", "killed by SIGKILL", "hangs"])
def test_a_candidate_that_fails_is_a_row_with_its_reason(reason: str) -> None:
    machine = Machine(FACTORS, broken={"b9": reason})
    search, _ = searched(machine)
    result = search.run()
    row = next(row for row in result.rows if row.settings.options == (("b9", 1),))
    assert row.state == "failed"
    assert (reason if reason != "hangs" else "not ended after 90 s") in row.reason
    assert dict(result.chosen.options) == {"a2": 1, "b2": 1}
    assert machine.now <= 1000


def test_if_the_combinations_fail_the_best_single_candidate_is_compared() -> None:
    class Fragile(Machine):
        def __call__(self, settings: Settings, **more: Any) -> Measurement | Failure:
            if len(settings.options) > 1:
                self.now += 100.0
                return Failure("out of memory")
            return super().__call__(settings, **more)

    machine = Fragile({"a1": 1.2, "b1": 1.1})
    result = searched(machine, 400.0)[0].run()
    assert dict(result.chosen.options) == {"a1": 1}
    assert all(ratio == pytest.approx(1.2) for ratio in result.ratios())
    assert "| failed: out of memory |" in table.table(result.rows)


@pytest.mark.parametrize("budget_s", [23, 30, 60, 150, 400])
def test_a_search_ends_within_its_budget(budget_s: float) -> None:
    machine = Machine(FACTORS)
    search, notes = searched(machine, budget_s)
    result = search.run()
    assert machine.now <= budget_s
    assert all(ratio > 1 for ratio in result.ratios())
    if budget_s < 150:
        assert any("candidates fit into the budget" in note for note in notes)


def test_a_budget_that_compares_nothing_is_refused_with_one_that_suffices() -> None:
    for budget_s in (4.0, 22.0):
        search, _ = searched(Machine(FACTORS), budget_s)
        with pytest.raises(
            BudgetError, match=r"took 3 s, and 1?\d s are left.*--budget 1m or more"
        ):
            search.run()
    machine = Machine(FACTORS, broken={"defaults": "never"})
    hangs: Callable[..., Failure] = lambda *_, **more: Failure("not ended after 4 s")  # noqa: E731
    search = Search(hangs, lambda *_: ([], []), budget_s=4.0, clock=machine.clock)
    with pytest.raises(BudgetError, match="does not suffice to measure the defaults once"):
        search.run()


def test_defaults_that_are_refused_are_an_error_with_their_reason() -> None:
    refuses: Callable[..., Failure] = lambda *_, **more: Failure("knn.k=0: must be")  # noqa: E731
    with pytest.raises(ValueError, match=r"knn\.k=0: must be"):
        Search(refuses, lambda *_: ([], []), budget_s=4.0).run()


@pytest.mark.parametrize(("others", "criterion"), [(0.05, "wall"), (0.5, "cpu")])
def test_a_busy_cpu_is_compared_by_processor_time(others: float, criterion: str) -> None:
    search, notes = searched(Machine(FACTORS, others=others))
    result = search.run()
    assert result.criterion == criterion
    assert any("other processes take 50%" in note for note in notes) == (criterion == "cpu")
    assert result.others_share == others


def test_an_interrupted_search_knows_the_best_so_far() -> None:
    search, _ = searched(Machine(FACTORS, interrupt_at=14))
    with pytest.raises(KeyboardInterrupt):
        search.run()
    best = search.best()
    assert best is not None
    assert dict(best.settings.options) == {"a2": 1}

    # The defaults alone are no result.
    search, _ = searched(Machine(FACTORS, interrupt_at=2))
    with pytest.raises(KeyboardInterrupt):
        search.run()
    assert search.best() is None


def test_rounds_fit_their_time_and_the_last_comparison_keeps_its_own() -> None:
    cost = Cost(START, STEP)
    for left in (30.0, 50.0, 200.0, 1000.0):
        found = schedule(24, left, cost)
        used = sum(one.measurements * cost.of(one.steps) for one in found.rounds)
        assert used <= found.halving_s
        assert used + found.finalists_s + found.pairs_s <= left or not found.rounds
        pairs, steps = pairs_and_steps(found.pairs_s, cost)
        assert 2 * pairs * cost.of(steps) <= found.pairs_s
    counts = [one.candidates for one in schedule(24, 1e6, cost).rounds]
    assert counts == [24, 12, 6]
    assert cost.of(4) == START + (WARM_UP + 4) * STEP


@pytest.mark.parametrize(
    ("precision", "loss", "norm", "differs"),
    [
        ("fp32", 1 + 5e-6, 1.0001, ""),
        ("fp32", 1 + 5e-5, 1.0, "loss of step 2"),
        ("fp32", 1.0, 1.002, "gradient norm of step 0"),
        ("fp32", float("nan"), 1.0, "loss of step 2"),
        ("bf16", 1.005, 1.3, ""),
        ("bf16", 1.02, 1.0, "loss of step 2"),
        ("bf16", 1.0, 2.0, "gradient norm of step 0"),
        ("fp64", 1 + 1e-8, 1.0, "loss of step 2"),
    ],
)
def test_rounding_is_told_from_another_model(
    precision: str, loss: float, norm: float, differs: str
) -> None:
    found = difference(precision, (1.0,) * 4, (1.0, 1.0, loss, 9.0), (1.0,) * 4, (norm, 9.0))
    assert found.startswith(differs)
    assert bool(found) == bool(differs)


def test_losses_that_are_no_numbers_agree_with_nothing() -> None:
    assert difference("fp32", (float("nan"),), (1.0,), (1.0,), (1.0,))
    assert difference("fp32", (float("inf"),), (1.0,), (1.0,), (1.0,))


def test_json_has_every_row_and_pair() -> None:
    result: Result = searched(Machine(FACTORS))[0].run()
    found = table.to_json(result)
    assert len(found["rows"]) == len(result.rows)
    assert len(found["pairs"]) == len(found["ratios"]) == len(result.pairs)
    assert found["chosen"]["options"] == {"a2": 1, "b2": 1}
