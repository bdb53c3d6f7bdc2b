"""The learning benchmark: a fall of kNN beyond the seeds' spread fails, missing packages are named,
and only training counts as CPU-seconds."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import datasets
from benchmarks.cases import learning
from benchmarks.learning import __main__ as again
from benchmarks.learning import curves, figure, side, tasks
from benchmarks.outcome import SKIPPED, outcome
from fastmoco_pipelines import ShardSet

BASE = (0.70, 0.71, 0.73)


def _curve(seed: int, *, last: float, rate: float = 100.0, start: float = 0.5, points: int = 4):
    """A curve that rises on a straight line, a point every 1000 images."""
    images = [1000 * i for i in range(points + 1)]
    return {
        "seed": seed,
        "images": images,
        "cpu_s": [n / rate for n in images],
        "knn": [start + (last - start) * i / points for i in range(points + 1)],
        "loss": [None] + [4.0] * points,
        "gradient": [None] + [1.0] * points,
        "events": [],
    }


def _result(lasts=BASE, *, source: str = "photos", task: str = "fashion", **more):
    found = curves.task_result(
        {"fastmoco": [_curve(i, last=last) for i, last in enumerate(lasts)], **more},
        images=4000,
        budget_s=20.0,
    )
    return {"tasks": {task: {"source": source, **found}}, "skipped": {}}


@pytest.mark.parametrize(
    ("now", "passed"),
    [
        (BASE, True),
        ((0.71, 0.70, 0.73), True),
        ((0.69, 0.69, 0.68), True),
        ((0.68, 0.68, 0.68), False),
        ((0.95, 0.95, 0.05), False),
        ((0.9, 0.9, math.nan), False),
    ],
)
def test_a_mean_may_fall_by_the_spread_of_the_stored_seeds_alone(now, passed):
    verdict = curves.judge(now, BASE)
    assert verdict.passed is passed
    assert verdict.floor == pytest.approx(sum(BASE) / 3 - 0.03)
    assert ("passed" if passed else "FAILED") in str(verdict)
    # Without a spread nothing may be lost, and equal figures pass.
    assert curves.judge((0.7, 0.7, 0.7), (0.7, 0.7, 0.7)).passed
    assert not curves.judge((0.7, 0.7, 0.699), (0.7, 0.7, 0.7)).passed


def test_a_fall_of_one_task_fails_the_comparison():
    stored = {"tasks": _result()["tasks"] | _result(task="patches")["tasks"]}
    good = {"tasks": stored["tasks"], "skipped": {}}
    code, lines = again.compare(good, stored)
    assert code == 0
    assert sum("passed: mean kNN 71.33%, stored 71.33%" in line for line in lines) == 2

    fallen = {"tasks": _result((0.6, 0.6, 0.7))["tasks"] | _result(task="patches")["tasks"]}
    code, lines = again.compare(fallen | {"skipped": {}}, stored)
    assert code == 1
    assert "fashion, 3 seeds, 4,000 images: FAILED: mean kNN 63.33%" in "\n".join(lines)


def test_other_images_and_missing_ones_are_not_compared():
    stored = _result()
    code, lines = again.compare(_result((0.1, 0.1, 0.1), source="others"), stored)
    assert code == 2
    assert "another version of the package" in lines[0]
    missing = {"tasks": {}, "skipped": {"fashion": "fashion: install it"}}
    assert again.compare(missing, stored)[0] == 2

    # A task that is there is compared all the same.
    both = {"tasks": stored["tasks"] | _result(task="patches")["tasks"]}
    for lasts, expected in ((BASE, 0), ((0.5, 0.6, 0.6), 1)):
        half = _result(lasts, task="patches") | {"skipped": missing["skipped"]}
        code, lines = again.compare(half, both)
        assert code == expected
        assert "install it" in lines[0]


def test_a_missing_package_is_named(tmp_path, capsys):
    nowhere = {"fashion": str(tmp_path / "none"), "photos": str(tmp_path)}
    result = learning.run(learning.DEFAULTS | nowhere)
    assert result["tasks"] == {}
    assert (
        "Debian's package dataset-fashion-mnist, or give fashion=" in result["skipped"]["fashion"]
    )
    assert "plasma-workspace-wallpapers, or give photos=" in result["skipped_because"]
    assert "skipped: patches:" in learning.table(result)
    assert outcome(result)[0] == SKIPPED

    stored = tmp_path / "learning.jsonl"
    line = {"options": learning.DEFAULTS, "result": _result()}
    stored.write_text(json.dumps(line) + "\n")
    given = [f"--{name}={value}" for name, value in nowhere.items()]
    assert again.main([*given, f"--stored={stored}"]) == 2
    assert "dataset-fashion-mnist" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        again.newest(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="multiple of every_other=25"):
        learning.run(learning.DEFAULTS | nowhere | {"every_other": 25})
    with pytest.raises(ValueError, match="'mnist' is none of"):
        learning.run(learning.DEFAULTS | {"tasks": "mnist"})


def test_figures_are_read_from_the_curves():
    curve = _curve(0, last=0.9)
    assert curves.at_images(curve, 2000) == pytest.approx(0.7)
    assert curves.at_seconds(curve, 25.0) == pytest.approx(0.75)
    assert curves.at_seconds(curve, 1e9) == pytest.approx(0.9)
    assert curves.seconds_to(curve, 0.75) == pytest.approx(25.0)
    assert curves.seconds_to(curve, 0.4) == 0.0
    assert curves.seconds_to(curve, 0.95) is None
    with pytest.raises(ValueError, match="images=2500"):
        curves.at_images(curve, 2500)


def test_a_side_of_half_the_speed_is_compared_by_images_and_by_seconds():
    slow = [_curve(i, last=0.6, rate=50.0, points=2) for i in range(3)]
    found = _result((0.7, 0.7, 0.7), baseline=slow)["tasks"]["fashion"]
    assert (found["failed"], found["common_images"]) == ({}, 2000)
    assert found["sides"]["baseline"]["by_images"]["images"] == 2000
    assert found["sides"]["fastmoco"]["by_images"]["images"] == 4000
    assert found["sides"]["fastmoco"]["by_seconds"]["mean"] == pytest.approx(0.6)
    assert found["sides"]["baseline"]["by_seconds"]["mean"] == pytest.approx(0.55)
    assert found["speedup"]["baseline"]["images"]["median"] == 2.0
    assert found["speedup"]["baseline"]["same_knn"]["median"] == pytest.approx(2.0)


def test_sides_that_do_not_learn_the_same_have_no_speed_up():
    other = [_curve(i, last=0.75) for i in range(3)]
    found = _result((0.7, 0.7, 0.7), baseline=other)["tasks"]["fashion"]
    assert "do not do the same" in found["failed"]["baseline"]
    assert "speedup" not in found
    found = _result((0.7, 0.7, 0.4))["tasks"]["fashion"]
    assert "seed 2: kNN 40.0% is not above" in found["failed"]["fastmoco"]


def test_the_figure_and_the_table_have_every_task_and_side(tmp_path):
    result = _result(baseline=[_curve(i, last=0.7, rate=50.0) for i in range(3)])
    header, rows = figure.rows(result)
    assert [row[:2] for row in rows] == [("Fashion-MNIST", s) for s in ("fastmoco", "baseline")]
    assert {len(row) for row in rows} == {len(header)}
    assert rows[0][3] == "71.3% (70.0 to 73.0) after 4,000"
    assert rows[1][6] == "2.00x (2.00 to 2.00)"
    pytest.importorskip("matplotlib")
    for name in ("once.svg", "twice.svg", "one.png"):
        figure.draw(result, tmp_path / name)
    assert (tmp_path / "once.svg").read_bytes() == (tmp_path / "twice.svg").read_bytes()
    assert (tmp_path / "one.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="nothing to draw"):
        figure.draw({"tasks": {}}, tmp_path / "none.svg")


def _burn(seconds: float) -> None:
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


class _BurningSide(side.Side):
    encoder = torch.nn.Identity()

    def __init__(self) -> None:
        self.losses, self.norms, self.events = [], [], []
        self.uncounted_s = 0.0

    def advance(self, steps: int) -> None:
        _burn(0.1)
        _burn(0.15)
        self.uncounted_s += 0.15

    def resting(self) -> bool:
        return True


class _BurningMonitor:
    def __init__(self) -> None:
        self.accuracies = iter((0.5, 0.6, 0.55, 0.7))

    def evaluate(self, encoder: torch.nn.Module) -> dict[str, float]:
        _burn(0.15)
        return {"knn": next(self.accuracies)}


def test_seconds_are_those_of_training_and_a_run_ends_with_points_and_budget():
    given = {"side": "fastmoco", "seed": 3, "every": 10, "points": 2, "budget_s": 0.25}
    curve = side.train(_BurningSide(), _BurningMonitor(), given, batch=4)
    assert curve["images"] == [0, 40, 80, 120]
    steps = np.diff(curve["cpu_s"])
    assert np.all((steps > 0.08) & (steps < 0.15))
    assert "fell to 55.0%" in curve["events"][0]  # a dip is reported
    given |= {"points": 1, "budget_s": 0.0}
    assert len(side.train(_BurningSide(), _BurningMonitor(), given, batch=4)["images"]) == 2


def test_both_sides_start_equal_and_their_records_are_in_the_curves(tmp_path):
    pytest.importorskip("sklearn")
    data = tasks.prepare("digits", {}, tmp_path)
    assert tasks.prepare("digits", {}, tmp_path) == data
    given = {
        "task": "digits",
        "side": "fastmoco",
        "seed": 0,
        "data": asdict(data),
        "every": 3,
        "points": 4,
        "budget_s": 0.0,
        "attention": "sdpa",
        "workers": 0,
    }
    ours = side.run_side(given)
    assert ours["images"] == [0, 768, 1536, 2304, 3072]
    assert ours["knn"][4] > ours["knn"][0] + 0.02
    other = side.run_side(given | {"side": "baseline", "points": 1})
    assert other["images"] == [0, 768]
    # The same weights and views: the loss of the first step.
    assert other["loss"][1] == pytest.approx(ours["loss"][1], abs=0.005)
    assert other["knn"][0] == pytest.approx(ours["knn"][0], abs=0.03)
    for curve in (ours, other):
        assert curve["cpu_s"][1] > 0
        assert (curve["loss"][0], curve["events"]) == (None, [])
        assert 4 < curve["loss"][1] < 5
        assert 0.5 < curve["gradient"][1] < 3


def test_a_run_has_a_constant_rate_after_its_warm_up(tmp_path):
    data = tasks.Data(train="train", test="test", source="")
    config = tasks.config_of("fashion", data, seed=5, samples=2560)
    assert (config.seed, config.threads, config.data.threads) == (5, 1, 1)
    assert config.optim.warmup_epochs * 10 == tasks.WARM_STEPS
    assert config.objective.ema_schedule == "constant"
    assert config.epochs >= 1000


def test_a_set_is_packed_again_only_from_other_photographs(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "TRAIN_PATCHES", 3)
    monkeypatch.setattr(datasets, "TEST_PATCHES", 2)
    photos, rng = tmp_path / "photos", np.random.default_rng(0)
    photos.mkdir()

    def photograph(number: int) -> None:
        coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
        coarse.resize((960, 720)).save(photos / f"{number}.jpg")

    for number in range(tasks.FEWEST_PHOTOS - 1):
        photograph(number)
    options = {"photos": str(photos)}
    with pytest.raises(tasks.MissingData, match="plasma-workspace-wallpapers"):
        tasks.prepare("patches", options, tmp_path)
    photograph(100)
    first = tasks.prepare("patches", options, tmp_path)
    manifest = Path(first.train).with_name("manifest.json")
    written = manifest.stat().st_mtime_ns
    assert tasks.prepare("patches", options, tmp_path) == first
    assert manifest.stat().st_mtime_ns == written
    photograph(101)
    second = tasks.prepare("patches", options, tmp_path)
    assert second.source != first.source
    with ShardSet.open(second.train) as shards:
        assert len(shards.classes) == tasks.FEWEST_PHOTOS + 1
