"""The synthetic metrics of a long run, and the exponent of its cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.curves_cost import CurvesCost, exponent
from benchmarks.growth_inputs import write_metrics


def test_lines_are_those_of_a_run(tmp_path: Path) -> None:
    path = write_metrics(tmp_path / "run" / "metrics.jsonl", 1200)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(0, 12_000, 10))
    assert [row["step"] for row in rows if "knn" in row] == [0, 5000, 10_000]
    assert {"loss", "gradient_norm/total", "loader/read_ms"} <= set(rows[1])
    assert path.stat().st_size / 1200 == pytest.approx(870, rel=0.02)
    assert write_metrics(tmp_path / "again", 1200).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_the_exponent_leaves_out_the_constant(power: float) -> None:
    costs = [
        CurvesCost(lines=lines, draw_s=0.3 + 1e-6 * lines**power, cut_s=0, peak_mb=0)
        for lines in (1000, 10_000, 100_000)
    ]
    assert exponent(costs) == pytest.approx(power)
