"""The benchmark runner: options, turns, ratios, and one case end to end on a small scale."""

from __future__ import annotations

import json

import pytest

from benchmarks.measure import interleave, ratios
from benchmarks.registry import CASES, main, parse_options


def test_list_names_every_case_and_its_options(capsys):
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    for name, case in CASES.items():
        assert name in text
        assert all(f"{option}=" in text for option in case.DEFAULTS)


def test_options_take_the_type_of_their_default():
    assert parse_options(["rounds=3", "recipe=x"], {"rounds": 7, "recipe": "", "steps": 1}) == {
        "rounds": 3,
        "recipe": "x",
        "steps": 1,
    }


@pytest.mark.parametrize("word", ["speed=3", "rounds"])
def test_an_unknown_option_is_refused_by_name(word):
    with pytest.raises(SystemExit, match=word):
        parse_options([word], {"rounds": 7})


def test_measurements_take_turns():
    order: list[str] = []
    figures = interleave(
        {"a": lambda: float(order.append("a") or 1), "b": lambda: float(order.append("b") or 2)}, rounds=3
    )
    assert order == ["a", "b"] * 3
    assert figures == {"a": [1.0] * 3, "b": [2.0] * 3}
    with pytest.raises(ValueError, match="rounds=0"):
        interleave({}, rounds=0)


def test_ratios_are_of_neighbours():
    assert ratios([1.0, 4.0, 3.0], [2.0, 2.0, 3.0]) == {"median": 1.0, "smallest": 0.5, "largest": 2.0}


@pytest.mark.slow
def test_a_case_runs_and_appends_its_line(tmp_path, digits, capfd):
    out = tmp_path / "results.jsonl"
    options = [f"shards={digits[0]}", "rounds=1", "steps=2", "warm_steps=1"]
    assert main(["run", "train_vs_synthetic", *options, "--out", str(out)]) == 0
    line = json.loads(out.read_text())
    assert line["options"]["steps"] == 2
    assert line["machine"]["cores"] >= 1
    assert 0 < line["result"]["dali_over_synthetic"]["median"] < 5


def test_views_are_compared_after_they_are_checked(tmp_path):
    out = tmp_path / "results.jsonl"
    assert (
        main(["run", "cut_views", "images=3", "height=30", "width=40", "size=16", "rounds=1", "--out", str(out)]) == 0
    )
    result = json.loads(out.read_text())["result"]
    assert set(result) == {"view1", "view2"}
    for view in result.values():
        assert not view["failed"]
        assert set(view["speedup"]) == {"pillow, image by image", "torch"}


@pytest.mark.slow
def test_a_step_is_compared_with_the_eager_one_after_their_gradients(tmp_path, monkeypatch):
    from benchmarks.cases import train_step

    options = ["recipe=quickstart_digits", "batch=16", "steps=1", "rounds=1", "checked=8", "chunk=4"]
    out = tmp_path / "results.jsonl"
    assert main(["run", "train_step", *options, "--out", str(out)]) == 0
    result = json.loads(out.read_text())["result"]
    assert (result["failed"], result["eager_batch"]) == ({}, 16)
    assert result["speedup"]["eager"]["median"] > 0
    assert "4" in result["plan"]

    other = train_step.EagerStep.__init__

    def scaled(self, config, device):
        other(self, config, device)
        self.objective.temperature *= 1.5

    monkeypatch.setattr(train_step.EagerStep, "__init__", scaled)
    assert main(["run", "train_step", *options, "--out", str(out)]) == 0
    failed = json.loads(out.read_text().splitlines()[-1])["result"]
    assert "gradients" in failed["failed"]["eager"]
    assert failed["speedup"] == {}
