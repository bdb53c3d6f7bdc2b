"""Costs grow no faster than their input. The CPU time of a process is noisy, so a figure fails only
if its exponent is too large in each of several measurements; growth with the square, and with the
input where there must be none, is seen in all.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.cases import growth
from benchmarks.command import main
from benchmarks.growth_inputs import make_set
from benchmarks.registry import CASES
from fastmoco_pipelines.sets.host_table import FEWEST_SHARDS

OPTIONS = growth.DEFAULTS | {
    "sizes": "20000,160000",
    "lines": "500,4000,30000",
    "banks": "4000,32000",
    "per_shard": 500,
}
TRIES = 4


@pytest.fixture(scope="module")
def cases():
    """The inputs are removed at once: pytest keeps its own folders for three runs."""
    with tempfile.TemporaryDirectory(prefix="fastmoco-growth-") as folder:
        yield growth.figures(OPTIONS, Path(folder))


@pytest.fixture(autouse=True)
def user_cache(tmp_path, monkeypatch):
    """A cache folder of a user, which no measurement may touch."""
    cache = tmp_path / "cache-of-the-user"
    cache.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    yield cache
    assert list(cache.iterdir()) == []


def sizes_of(figure, given):
    """Those that its exponent is fitted over; the smallest ones tell most for the least time."""
    if figure in growth.STEADY:
        return [given[0], given[-1]]
    return given[:2]


def lowest_exponent(figure, given):
    """Of several tries, which end at the first one that is small enough."""
    exponents = []
    while len(exponents) < TRIES:
        costs = {
            size: growth.measure(figure, arguments)["cpu_s"]
            for size, arguments in sizes_of(figure, given)
        }
        exponents.append(growth.exponent(figure, costs))
        if exponents[-1] <= growth.limit(figure):
            break
    return min(exponents)


@pytest.mark.parametrize(
    "figure",
    [
        "open",
        "open again",
        "bad samples",
        "sample",
        "first batch",
        "step 10^7",
        "100 steps",
        "curves",
        "trim",
        "knn",
    ],
)
def test_no_cost_grows_faster_than_it_may(cases, figure):
    assert lowest_exponent(figure, cases[figure]) <= growth.limit(figure)


def test_the_order_of_a_billion_images_takes_no_memory(cases):
    found = dict(cases["first batch"])[10**9]
    figures = growth.measure("first batch", found)
    assert figures["peak_mb"] < 10


def test_an_order_that_takes_memory_for_a_billion_images_is_an_error():
    """It would otherwise end other processes of the machine first."""
    code = "import benchmarks.growth_child as child; child._limit_memory(); bytearray(4 * 10**9)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=growth.environment(growth.ROOT),
    )
    assert done.stderr.splitlines()[-1] == "MemoryError"


def test_opening_takes_memory_for_shards_not_for_samples(cases):
    small, large = (growth.measure("open", given)["peak_mb"] for _, given in cases["open"])
    assert large - small < 8  # 320 shards, 160,000 records of 24 bytes


def test_figures_that_must_not_grow_are_measured_over_all_sizes(cases):
    assert set(growth.STEADY) <= set(cases)
    for figure in ("first batch", "step 10^7", "100 steps"):
        assert [size for size, _ in cases[figure]] == [20_000, 160_000, 10**9]


def test_an_exponent_is_the_slope_between_the_largest_sizes():
    costs = {10: 9.0, 100: 1.0, 1000: 100.0}
    assert growth.exponent("open", costs) == pytest.approx(2.0)
    assert growth.exponent("open", {100: 1e-5, 1000: 1e-4}) == 0.0
    assert growth.exponent("open", {100: 1e-5}) is None


def test_the_exponent_of_a_figure_that_must_not_grow_is_that_of_all_sizes():
    costs = {10: 0.1, 100: 5.0, 1000: 10.0}
    assert growth.exponent("trim", costs) == pytest.approx(1.0)
    assert growth.exponent("trim", {10**4: 1e-4, 10**9: 0.02}) == 0.0  # a constant, with noise


def cost_of(operation, n):
    """CPU seconds of the same child with another operation of `n`."""
    code = (
        "import benchmarks.growth_child as child;"
        f"child.FIGURES['other'] = lambda given: lambda n=given['n']: {operation}; child.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "other", json.dumps({"n": n})],
        capture_output=True,
        text=True,
        check=True,
        env=growth.environment(growth.ROOT),
    )
    return json.loads(done.stdout)["cpu_s"]


def test_a_quadratic_cost_is_found():
    costs = {n: cost_of("[sum(range(n)) for _ in range(n)]", n) for n in (300, 3000)}
    assert growth.exponent("open", costs) > growth.LIMIT


def test_a_linear_cost_is_found_where_there_must_be_none():
    costs = {n: cost_of("sum(range(n))", n) for n in (20_000, 20_000_000)}
    assert growth.exponent("first batch", costs) > growth.STEADY_LIMIT
    assert growth.exponent("open", costs) <= growth.LIMIT


def test_reading_a_whole_log_to_trim_it_is_found(cases, tmp_path):
    """A tree of its own, whose only module reads every line, as earlier versions did."""
    module = tmp_path / "tree" / "fastmoco" / "run" / "folder.py"
    module.parent.mkdir(parents=True)
    module.write_text(
        "import json\n"
        "class RunFolder:\n"
        "    def __init__(self, path):\n"
        "        self.log = path / 'metrics.jsonl'\n"
        "    def trim_metrics(self, step):\n"
        "        rows = map(json.loads, self.log.read_text().splitlines())\n"
        "        kept = [row for row in rows if row['step'] <= step]\n"
        "        self.log.write_text(''.join(json.dumps(row) + '\\n' for row in kept))\n"
    )
    costs = {
        size: growth.measure("trim", given, tmp_path / "tree")["cpu_s"]
        for size, given in sizes_of("trim", cases["trim"])
    }
    assert growth.exponent("trim", costs) > growth.STEADY_LIMIT


def test_trimming_leaves_the_log_for_the_next_measurement(cases):
    _, given = cases["trim"][0]
    before = Path(given["metrics"]).read_bytes()
    growth.measure("trim", given)
    assert Path(given["metrics"]).read_bytes() == before
    assert len(list(Path(given["metrics"]).parent.iterdir())) == 1


def test_only_open_again_finds_a_set_in_the_cache(tmp_path, monkeypatch):
    pattern = make_set(tmp_path / "set", FEWEST_SHARDS, per_shard=1)
    found = []

    def child(figure, given, variables):
        kept = len(list(Path(variables["XDG_CACHE_HOME"]).glob("fastmoco/sets/*.set")))
        costs = measured(figure, given, variables)
        found.append((figure, kept))
        return costs

    measured = growth._child
    monkeypatch.setattr(growth, "_child", child)
    for figure in ("open", "open", "open again"):
        growth.measure(figure, {"pattern": pattern})
    assert found == [("open", 0), ("open", 0), ("open again", 0), ("open again", 1)]


def test_a_folder_keeps_the_inputs_for_the_next_call(tmp_path):
    options = OPTIONS | {"sizes": "1000", "lines": "100"}

    def state():
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        return {path: path.stat().st_mtime_ns for path in files}

    first = growth.figures(options, tmp_path)
    made = state()
    assert growth.figures(options, tmp_path) == first
    assert state() == made


@pytest.mark.parametrize("form", ["binary", "json"])
def test_a_set_whose_making_was_ended_is_completed(tmp_path, form):
    def content(name):
        folder = tmp_path / name
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    ended = tmp_path / "ended"
    for folder in (ended, tmp_path / "whole"):
        make_set(folder, 7, per_shard=2, form=form)
    (ended / "whole").unlink()
    for lost in (*ended.glob("train-000001.tar*"), *ended.glob("train-000003.tar.index*")):
        lost.unlink()
    kept = (ended / "train-000000.tar").stat().st_mtime_ns
    make_set(ended, 7, per_shard=2, form=form)
    assert content("ended") == content("whole")
    assert (ended / "train-000000.tar").stat().st_mtime_ns == kept


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A small run, without the seconds of the commands."""
    start = {growth.ROOT: {"fastmoco --help": 0.5}}
    monkeypatch.setattr(growth, "startup_cpu_s", lambda *_, **__: start)
    return {
        "sizes": "1000,2000",
        "lines": "100,200",
        "banks": "500,1000",
        "rounds": 1,
        "ranks": 2,
        "folder": str(tmp_path / "inputs"),
    }


def test_the_case_runs(small):
    options = OPTIONS | small
    result = growth.run(options)
    figures = growth.figures(options, Path(options["folder"]))
    assert {row["figure"] for row in result["rows"]} == set(figures)
    assert set(result["rows"][0]["costs"]["1000"]) == {"cpu_s", "wall_s", "mb", "peak_mb"}
    assert result["ranks"]["ranks"] == 2
    assert result["ranks"]["pss_mb"] > 10
    lines = growth.table(result).splitlines()
    assert sum(line.startswith("| trim |") for line in lines) == 2
    assert any(line.startswith("| first batch | 1,000,000,000 |  | 0.0") for line in lines)
    assert "| fastmoco --help |  | 0.50 |" in lines


def test_the_other_tree_draws_fewer_lines(small, monkeypatch):
    monkeypatch.setattr(growth, "measure", lambda *_: dict.fromkeys(("cpu_s", "peak_mb"), 1.0))
    options = OPTIONS | small | {"before": str(growth.ROOT), "most_lines_before": 150}
    result = growth.run(options)
    sizes = {row["figure"]: list(row["costs"]) for row in result["rows"] if row["tree"] == "before"}
    assert sizes["curves"] == ["100"]
    assert sizes["trim"] == ["100", "200"]
    assert sizes["first batch"] == ["1000", "2000"]
    assert "open again" not in sizes
    assert "| curves | 100 | 1.0000 | 1.0000 |" in growth.table(result)


def test_the_command_prints_a_table(monkeypatch, capsys):
    case = replace(
        CASES["growth"],
        run=lambda options: {"rows": options["sizes"]},
        table=lambda result: f"table of {result['rows']}",
    )
    monkeypatch.setitem(CASES, "growth", case)
    assert main(["run", "growth", "sizes=5", "--table"]) == 0
    assert capsys.readouterr().out == "table of 5\n"
