"""The page of performance is that of the committed lines, and its tables show what a line has."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks import plot, shown
from benchmarks.command import main
from benchmarks.registry import CASES
from benchmarks.shown import Bars, Lines, markdown, number

CONTEST = {
    "subject": "ours",
    "errors": {"ours": {"value": 0.0}, "slow": {"value": 0.0}},
    "failed": {"wrong": "value 1 > 0.001"},
    "skipped": {"absent": "needs a GPU"},
    "peak_bytes": {"ours": 2_000_000, "slow": 0},
    "speedup": {"slow": {"median": 2.0, "q20": 1.5, "q80": 2.5}},
    "roofline": {"chip": "this CPU", "share": 0.5, "flops_per_s": 9e10, "bytes_per_s": 2e10},
}


def test_the_page_is_that_of_the_committed_lines():
    assert plot.PAGE.read_text() == plot.page(), plot.CURE


def test_every_image_of_the_page_exists():
    images = re.findall(r"\((images/performance/\w+\.svg)\)", plot.PAGE.read_text())
    assert images
    assert [path for path in images if not (plot.PAGE.parent / path).exists()] == []


def test_every_committed_line_is_on_the_page():
    page = plot.PAGE.read_text()
    for name, lines in plot.lines_of().items():
        assert f"## {name}" in page
        for line in lines:
            assert plot._about(line) in page


def test_an_outdated_page_is_refused_with_the_cure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plot, "PAGE", tmp_path / "performance.md")
    plot.PAGE.write_text(plot.page() + "typed by hand\n")
    assert main(["plot", "--check"]) == 1
    assert "run `python -m benchmarks plot`" in capsys.readouterr().out
    plot.PAGE.write_text(plot.page())
    assert main(["plot", "--check"]) == 0


def test_a_contest_is_shown_with_what_failed_and_what_was_skipped():
    text = shown.table(CONTEST)
    assert "| slow | 2.00 | 1.50 to 2.50 | 0.0 |  |" in text
    assert "| ours |  |  | 2.0 | the subject |" in text
    assert "| wrong |  |  |  | failed: value 1 > 0.001 |" in text
    assert "| absent |  |  |  | skipped: needs a GPU |" in text
    assert "ours reaches 50% of the roofline of this CPU" in text
    assert shown.charts(CONTEST)[0].bars == {"slow": (2.0, 1.5, 2.5)}
    older = {"speedup": {"slow": {"median": 2.0, "smallest": 1.0, "largest": 9.0}}}
    assert "smallest to largest" in shown.table(older)
    assert "1.00 to 9.00" in shown.table(older)


def test_another_result_is_shown_by_its_figures():
    text = shown.table({"rates": {"a": [1.0, 3.0, 2.0]}, "errors": {"a": 1.0}, "name": "x"})
    assert text.splitlines()[2:] == ["| rates.a | 2.00 |"]
    assert shown.table({"skipped_because": "no GPU"}) == "Skipped: no GPU."


def test_a_failed_result_of_every_case_can_be_shown():
    for name, case in CASES.items():
        if name not in ("growth", "large_batch"):  # their results are whole
            result = {"failed": {"ours": "wrong"}}
            assert case.shown(result).startswith("The check failed: ours: wrong.")
            assert case.charts(result) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.000"), (1234.5, "1,234"), (12.34, "12.3"), (1e-5, "1.00e-05"), (-2.5, "-2.50")],
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


def test_cells_cannot_break_a_table():
    assert markdown(("a", "b"), [("x|y", "1\n2")]).splitlines()[2] == "| x\\|y | 1 2 |"


def test_charts_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    charts = [
        Bars(title="bars", unit="MB", bars={"a": (1.0, 0.5, 2.0), "b": (2.0, 2.0, 2.0)}, equal=1.0),
        Lines(title="lines", x="n", y="s", lines={"a": [(1, 2), (10, 3)]}, log=True),
    ]
    paths = [tmp_path / f"{i}" / "drawn.svg" for i in range(2)]
    for path in paths:
        path.parent.mkdir()
        plot.draw(charts, path)
    assert "<svg" in paths[0].read_text()
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_lines_of_a_case_that_is_gone_are_still_shown(tmp_path):
    line = {
        "case": "gone",
        "options": {},
        "result": CONTEST,
        "machine": {"cores": 2, "cpu": "X", "torch": "2", "commit": "abc+"},
        "time": "2026-01-02T00:00:00Z",
    }
    (tmp_path / "gone.jsonl").write_text(json.dumps(line) + "\n")
    page = plot.page(tmp_path)
    assert "## gone" in page
    assert "2026-01-02, commit abc and uncommitted changes, 2 cores of X, torch 2." in page
    assert "| slow | 2.00 |" in page
