"""Lines of a GPU on the page of performance, and every goal, measured or not."""

from __future__ import annotations

import json

import pytest

from benchmarks import plot
from benchmarks.gpu import goals, page
from benchmarks.shown import Bars

MACHINE = {"gpu": "NVIDIA H200", "gpu_gib": 139.8, "driver": "570", "torch": "2", "commit": "abc"}
LOSS = {
    "subject": "triton",
    "errors": {
        "triton": {"loss": 1e-5, "gradient": 1e-4, "gradient2": 2e-4},
        "naive": {"loss": 1e-4, "gradient": 8e-4, "gradient2": 4e-4},
    },
    "failed": {"compiled": "OutOfMemoryError: 1 GB"},
    "skipped": {"xformers": "not here"},
    "milliseconds": {"triton": 0.9, "naive": 9.0},
    "peak_bytes": {"triton": 50e6, "naive": 5e9},
    "speedup": {"naive": {"median": 10.0, "q20": 9.0, "q80": 11.0}},
}


def line(name, stage="loss", status="ok", **fields):
    return {
        **{"stage": stage, "name": name, "status": status, "reason": "", "dry": False},
        **{"time": "2026-01-02T03:04:05Z", "machine": MACHINE, **fields},
    }


def step(name, rates, status="ok", **fields):
    result = {"images_per_s": rates, "speedup": {}, "failed": {}, "mfu": {"fastmoco": 0.5}}
    options = {"recipe": "", "batch": 0, "tflops": 790.0}
    return line(name, "steps", status, case="train_step", options=options, result=result, **fields)


LINES = [
    line("ceilings", "ceilings", matmul_tflops=780.0, copy_gb_per_s=4200.0, launch_us=3.0),
    line("ema", "smoke", errors={"average": 2e-7, "sum": 1e-8}),
    line("lars", "smoke", "failed", reason="average 1 > 0.1", errors={"average": 1.0}),
    line("apex", "smoke", "skipped", reason="apex is absent"),
    line("tests of ema", "tests", gate="passed", results={"a.py": "= 3 passed, 2 skipped in 1s ="}),
    line("loss 16384", case="info_nce", result=LOSS, share={"matmul": 0.7}),
    line("loss 65536", status="skipped", reason="out of time"),
    line("attention d=32", "attention", "failed", reason="exit 1: no <kernel>", case="attention"),
    step("ViT-S 4096", {"fastmoco": [4900.0, 5100.0, 5000.0]}, "marked", reason="loss is far"),
    step("ViT-S peer, eager", {"eager": [2000.0]}),
    line("JPEG shards to kNN", "knn", knn_start=0.25, knn=0.75, images_per_s=4000.0, loader_gb=3.5),
    line("JPEG over synthetic, ViT-S", "knn", ratio=0.95, images_per_s={"jpeg": 95.0}),
]


def test_every_goal_is_listed_measured_or_not():
    found = goals.all_outcomes({each["name"]: each for each in LINES}, "NVIDIA H200", {})
    assert [outcome.goal for outcome in found] == sorted(
        goals.GOALS, key=lambda goal: int(goal.name[1:])
    )
    assert {f"G{number}" for number in range(1, 13)} == {goal.name for goal in goals.GOALS}
    texts = [str(outcome) for outcome in found]
    for text in (
        "G1 met: milliseconds.triton 0.9 <= 1",
        "G1 met: peak_bytes.naive / peak_bytes.triton 100 >= 60",
        "G1 not measured: speedup.compiled.median",
        "G4 met: errors.triton.gradient* 0.0002 <= 0.0005",
        "G4 met: errors.triton.gradient* / errors.naive.gradient* 0.25 <= 1",
        "G7 MISSED: images_per_s.fastmoco / images_per_s.eager of ViT-S peer, eager 2.5 >= 3",
        "G8 not measured: images_per_s.fastmoco",
        "G11 met: ratio 0.95 >= 0.9",
        "G11 MISSED: loader_gb 3.5 <= 2",
        "G12 met: hours of 3.84e+08 images at images_per_s.fastmoco 21.35 <= 22",
    ):
        assert text in texts


def test_a_dry_run_measures_no_goal():
    dry = {each["name"]: {**each, "dry": True} for each in LINES}
    assert {o.measured for o in goals.all_outcomes(dry, "NVIDIA H200", {})} == {None}


def test_a_card_is_a_section_with_all_that_failed_and_was_skipped(tmp_path):
    path = tmp_path / "gpu-h200.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in LINES))
    assert plot.lines_of(tmp_path) == {}
    text = plot.page(tmp_path)
    assert text.index("## Chips") < text.index("## NVIDIA H200")
    for part in (
        "NVIDIA H200 with 139.8 GiB, driver 570",
        "2026-01-02, commits abc.",
        "| large product in bf16, TFLOP/s | 780 |",
        "| G1 | loss 16384 | GPU ms of triton | at most 1.00 | 0.900 | met | matmul 70% | naive 10.00x |",
        "| G1 | loss 16384 | extra MB of triton | at most 80.0 | 50.0 | met |",
        "| G2 | loss 65536 | GPU ms of triton | at most 16.0 |  | not measured; the row is skipped |",
        "| at least 5,000 | 5,000 | met; the row is marked |",
        "| ViT-S 4096 | 4096 | 5,000 | 2.50 |  | 50.0% of 790 |",
        "| marked: loss is far |",
        "| loss 16384 | naive | 9.00 |  | 10.0 (9.00 to 11.0) | 5,000.0 | 8.0e-04 |  |",
        "| failed: OutOfMemoryError: 1 GB |",
        "| skipped: not here |",
        "| loss 65536 |  |  |  |  |  |  | skipped: out of time |",
        "| attention d=32 |  |  |  |  |  |  | failed: exit 1: no \\<kernel> |",
        "| JPEG shards to kNN | kNN at the end | 0.750 |",
        "Checks of kernels and steps: 1 passed, 1 failed, 1 skipped.",
        "| ema | ok | average 2.0e-07 |  |",
        "| lars | failed | average 1.0e+00 | failed: average 1 > 0.1 |",
        "| tests of ema | ok | 3 passed, 2 skipped |  |",
        "| apex | smoke | skipped | 2026-01-02 03:04, abc | apex is absent |",
        "Rows that were not begun: ViT-S 1024 compiled; ",
    ):
        assert part in text


def test_later_lines_replace_earlier_ones_unless_they_are_skipped():
    later = {**MACHINE, "commit": "def+"}
    again = line("loss 65536", case="info_nce", result=LOSS, machine=later)
    skipped = line("loss 16384", status="skipped", reason="no time", machine=later)
    failed = line("ema", "smoke", "failed", reason="too far", machine=later)
    text = page.section("gpu-h200", [*LINES, again, skipped, failed])
    assert "commits abc, def and uncommitted changes." in text
    assert "| loss 65536 | triton | 0.900 |" in text
    assert "| loss 65536 | loss | skipped, measured in another run |" in text
    assert "| loss 16384 | triton | 0.900 |" in text
    assert "the subject; matmul 70%; of commit abc |" in text
    assert "| loss 16384 | loss | skipped, measured in another run |" in text
    assert "Checks of kernels and steps: 0 passed, 2 failed, 1 skipped." in text


def test_images_per_s_of_all_steps_are_a_chart():
    (chart,) = page.charts(LINES)
    assert isinstance(chart, Bars)
    assert chart.bars == {
        "ViT-S 4096": (5000.0, 4900.0, 5100.0),
        "ViT-S peer, eager": (2000.0, 2000.0, 2000.0),
    }


def test_the_loader_has_its_rates_and_memory():
    result = {
        **{"checked": {"exact": {}, "dali": {}}, "failed": {"dali": "no pair"}, "subject": "exact"},
        **{"images_per_s": {"exact": [4000.0]}, "median": {"exact": 300.0}},
        "memory": {"device_mb": 900.0, "growth_mb": 1.5},
    }
    text = page.section("gpu-x", [line("loader", "loader", case="loader", result=result)])
    assert "| loader, exact | 4,000 | 300 | 900.0 | 1.5 |  |" in text
    assert "| loader, dali |  |  |  |  | failed: no pair |" in text
    text = page.section("gpu-x", [line("loader", "loader", "failed", reason="no DALI")])
    assert "| loader |  |  |  |  | failed: no DALI |" in text


def test_equality_has_the_differences_of_losses():
    result = {"bf16": {"largest_difference": 5e-4, "limit": 1e-3, "differences": [1e-4, 5e-4]}}
    lines = [line("equality", "equality", case="equality", result=result)]
    text = page.section("gpu-x", lines)
    assert "bf16: losses differ by at most 5.0e-04 in 2 steps, limit 1e-03 |" in text
    assert "| G10 | equality | largest difference of a loss in bf16 | at most 0.001 |" in text
    assert "| 5.00e-04 | met |" in text


def test_a_profile_has_its_largest_kernels_and_the_shares_of_parts():
    result = {
        **{"launches": 1200, "busy_ms": 50.0, "parts_ms": {"loss": 5.0, "backward": 30.0}},
        "largest_kernels": ["20.00 ms 40.0% x96 gemm<a, b>"],
    }
    text = page.section("gpu-x", [line("ViT-S 1024 compiled", "profile", result=result)])
    assert "1,200 launches, 50.0 ms of kernels in a step. By part: backward 60%, loss 10%." in text
    assert "| `gemm<a, b>` | 20.00 | 40.0% | 96 |" in text


@pytest.mark.parametrize("fields", [{"machine": {}}, {"dry": True}])
def test_a_file_without_a_card_is_a_section_too(fields):
    text = page.section("gpu-x", [line("ema", "smoke", **fields)])
    assert ("## gpu-x" in text) == ("machine" in fields)
    assert ("no figures of a card" in text) == ("dry" in fields)
