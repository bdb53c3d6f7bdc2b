"""Costs grow no faster than their input. The CPU time of a process is noisy, so a figure fails only
if its exponent is too large in each of several measurements; growth with the square is seen in all.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.cases import growth

OPTIONS = growth.DEFAULTS | {
    "sizes": "20000,160000",
    "lines": "500,4000",
    "banks": "4000,32000",
    "per_shard": 500,
}
TRIES = 4


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return growth.figures(OPTIONS, tmp_path_factory.mktemp("growth"))


@pytest.mark.parametrize(
    "figure", ["open", "bad samples", "first batch", "100 steps", "curves", "trim", "knn", "sample"]
)
def test_no_cost_grows_faster_than_its_input(cases, figure):
    exponents: list[float] = []
    for _ in range(TRIES):
        costs = {
            size: growth.measure(figure, given)["cpu_s"]
            for size, given in cases[figure]
            if size < 10**9
        }
        exponents.append(growth.exponent(costs))
        if exponents[-1] <= growth.LIMIT:
            return
    raise AssertionError(f"{figure}: cost ~ size^{exponents}")


def test_the_order_of_a_billion_images_takes_no_memory(cases):
    found = dict(cases["first batch"])[10**9]
    figures = growth.measure("first batch", found)
    assert figures["peak_mb"] < 10


def test_opening_takes_memory_for_shards_not_for_samples(cases):
    small, large = (growth.measure("open", given)["peak_mb"] for _, given in cases["open"])
    assert large - small < 8  # 320 shards, 160,000 records of 24 bytes


def test_an_exponent_is_the_slope_between_the_largest_sizes():
    assert growth.exponent({10: 9.0, 100: 1.0, 1000: 100.0}) == pytest.approx(2.0)
    assert growth.exponent({100: 1e-5, 1000: 1e-4}) == 0.0


def test_a_quadratic_cost_is_found():
    """The same child with an operation that looks at all rows for each row."""
    code = (
        "import benchmarks.growth_child as child;"
        "child.FIGURES['square'] = lambda given: lambda: [sum(range(given['n'])) "
        "for _ in range(given['n'])]; child.main()"
    )
    costs = {}
    for n in (300, 3000):
        done = subprocess.run(
            [sys.executable, "-c", code, "square", json.dumps({"n": n})],
            capture_output=True,
            text=True,
            check=True,
            env=growth._environment(growth.ROOT),
        )
        costs[n] = json.loads(done.stdout)["cpu_s"]
    assert growth.exponent(costs) > growth.LIMIT


def test_the_case_runs(tmp_path):
    options = OPTIONS | {
        "sizes": "1000,2000",
        "lines": "100,200",
        "banks": "500,1000",
        "rounds": 1,
        "ranks": 2,
        "folder": str(tmp_path),
    }
    result = growth.run(options)
    assert {row["figure"] for row in result["rows"]} == set(growth.figures(options, tmp_path))
    assert set(result["rows"][0]["costs"]["1000"]) == {"cpu_s", "wall_s", "mb", "peak_mb"}
    assert result["ranks"]["ranks"] == 2
    assert result["ranks"]["pss_mb"] > 10
