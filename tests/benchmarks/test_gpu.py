"""The one script for a borrowed GPU: its cases exist, its table shows failures, and without a GPU it says so."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import gpu
from benchmarks.registry import CASES, parse_options


@pytest.mark.parametrize("timed", gpu.CASES, ids=lambda timed: f"{timed.case} {' '.join(timed.options)}")
def test_every_case_exists_with_its_options(timed):
    parse_options(timed.options, CASES[timed.case].DEFAULTS)


def test_the_table_shows_times_ratios_failures_and_goals():
    part = {
        "milliseconds": {"ours": 0.5, "naive": 4.0},
        "speedup": {"naive": {"median": 8.0}},
        "failed": {"wrong": "gradient 1 > 0.1"},
    }
    lines = [
        {"case": "one", "options": {"rows": 4}, "result": part, "goal": "G1"},
        {"case": "two", "options": {}, "result": {"view1": part, "images": 3}},
    ]
    text = "\n".join(gpu.summary(lines))
    for shown in ("one rows=4", "ours 0.500", "naive 8.00x", "FAILED wrong: gradient 1 > 0.1", "goal: G1", "view1 ms:"):
        assert shown in text


def test_a_case_that_fails_or_hangs_costs_only_itself(tmp_path, capsys):
    assert gpu._run_case(gpu.Timed("no_such_case"), tmp_path / "gpu.jsonl", limit=60) is None
    assert gpu._run_case(gpu.Timed("ema"), tmp_path / "gpu.jsonl", limit=0.01) is None
    assert "ended after" in capsys.readouterr().out
    assert not (tmp_path / "gpu.jsonl").exists()


def test_a_line_of_results_is_kept_with_its_goal(tmp_path):
    small = ("width=8", "depth=1", "hidden=8", "rounds=1", "device=cpu")
    line = gpu._run_case(gpu.Timed("ema", small, "G5"), tmp_path / "gpu.jsonl", limit=120)
    assert line is not None
    assert json.loads((tmp_path / "gpu.jsonl").read_text())["goal"] == "G5"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main() == 1
    assert "no CUDA device" in capsys.readouterr().err
