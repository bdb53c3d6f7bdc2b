"""Gains at equal CPU-seconds, and the time to an accuracy, from curves that are known."""

from __future__ import annotations

import pytest

from benchmarks.cases import methods, photographs, time_to_accuracy
from benchmarks.learning.tasks import Data, config_of, phase_words
from fastmoco.objectives.build import OBJECTIVES
from fastmoco.recipes import RECIPES


def _curve(seed: int, *knn: float, every_s: float = 10.0):
    return {
        "seed": seed,
        "images": [1000 * i for i in range(len(knn))],
        "cpu_s": [every_s * i for i in range(len(knn))],
        "knn": list(knn),
        "events": [],
    }


def test_every_kind_that_learns_without_labels_is_a_method_of_both_tasks():
    kinds = {k.kind for k, build in OBJECTIVES.items() if not build.__self__.needs_labels}
    kinds.remove("fcmae")  # its encoder is a ConvNeXt V2, for larger images than those of the tasks
    for task in methods.SUFFIXES:
        found = {RECIPES[recipe]().objective.kind for recipe in methods.methods_of(task).values()}
        assert found == kinds
    assert "supervised" not in methods.methods_of("fashion")
    # Equal seconds compare methods on one trunk and one batch.
    configs = [RECIPES[recipe]() for recipe in methods.methods_of("fashion").values()]
    shapes = {(c.model.architecture, c.model.patch_size, c.global_batch_size) for c in configs}
    assert shapes == {("vit_nano", 7, 256)}


def test_a_gain_is_that_of_the_worse_seed_at_the_budget(monkeypatch, tmp_path):
    known = {0: _curve(0, 0.5, 0.6, 0.7), 1: _curve(1, 0.5, 0.54, 0.58, 0.9)}
    monkeypatch.setattr(methods, "trained", lambda *_, seed, **__: known[seed])
    data = Data(train="", test="", source="x")
    monkeypatch.setattr(methods, "prepare", lambda *_: data)
    options = methods.DEFAULTS | {"methods": "byol", "budget_s": 15.0, "folder": str(tmp_path)}
    result = methods.run(options)
    assert result["methods"]["byol"]["gain"] == {"mean": 0.105, "min": 0.06, "max": 0.15}
    assert result["methods"]["byol"]["seconds_to_gain"] == pytest.approx([8.0, 20.0])
    assert "gained 6.0 points" in result["failed"]["byol"]
    assert "| byol | 50.0% | 60.5% | 10.5 | 6.0 | 8, 20 |" in methods.table(result)
    (chart,) = methods.charts(result)
    assert [y for _, y in chart.lines["byol"]] == pytest.approx([0, 7, 14])

    assert methods.run(options | {"gain": 0.05})["failed"] == {}
    with pytest.raises(ValueError, match="'bicycle' is none of"):
        methods.run(options | {"methods": "bicycle"})


def test_a_masked_method_is_judged_by_a_classifier_and_another_one_by_knn(monkeypatch, tmp_path):
    def measured(folder, data, options, recipe, seed):
        masked = RECIPES[recipe]().objective.masked
        start, end = {"knn": 0.2, "linear": 0.3}, {"knn": 0.25 + 0.1 * seed, "linear": 0.5}
        if masked:
            start["finetune"], end["finetune"] = 0.4, 0.45
            end["linear"] = 0.35 if recipe.startswith("supmae") else 0.4
        made = {"start": start, "end": end, "images": 2560, "cpu_s": 60 + 4 * (recipe in late)}
        return made | {"events": ["a spike"] * seed}

    late: list[str] = []
    monkeypatch.setattr(photographs, "measured", measured)
    monkeypatch.setattr(photographs, "prepare", lambda *_: Data(train="", test="", source="x"))
    given = {"methods": "mae,supmae,moby", "folder": str(tmp_path), "masked_gain": 0.06}
    result = photographs.run(photographs.DEFAULTS | given)
    assert set(result["failed"]) == {"supmae", "moby"}
    assert "kNN gained 5.0 points over random weights, 8.0 are needed" in result["failed"]["moby"]
    assert "gained 5.0 points" in result["failed"]["supmae"]
    assert result["methods"]["moby"]["scores"]["knn"]["gain"]["max"] == pytest.approx(0.15)
    assert set(result["unstable"]) == {f"{name}, seed 1" for name in ("mae", "supmae", "moby")}
    rows = photographs.table(result).splitlines()
    (row,) = (row for row in rows if row.startswith("| supmae |"))
    assert "| 20.0% -> 30.0% | 30.0% -> 35.0% | 40.0% -> 45.0% |" in row
    assert "masked, sees labels in training" in row
    knn, _, tuned = photographs.charts(result)
    assert (set(knn.bars), set(tuned.bars)) == ({"mae", "supmae", "moby"}, {"mae", "supmae"})
    assert photographs.methods_of()["moco_v3"] == "vit_nano7_e12_b256"

    late.append("mae_nano7_e12_b256")
    failed = photographs.run(photographs.DEFAULTS | given)["failed"]
    assert failed["mae"] == "a run took 64.0 CPU-seconds"


def test_the_accuracy_is_a_share_of_what_the_plain_side_gains():
    plain = [_curve(0, 0.5, 0.6, 0.7), _curve(1, 0.5, 0.7, 0.8)]
    assert time_to_accuracy.accuracy_of(plain, 20.0, 0.8) == pytest.approx(0.7)
    assert time_to_accuracy.accuracy_of(plain, 10.0, 1.0) == pytest.approx(0.65)


def test_times_to_the_accuracy_are_compared_and_a_missed_one_is_no_ratio():
    plain = [_curve(0, 0.5, 0.6, 0.7), _curve(1, 0.5, 0.7, 0.8)]
    fast = [_curve(seed, 0.5, 0.7, every_s=6.0) for seed in range(2)]
    never = [_curve(0, 0.5, 0.7), _curve(1, 0.5, 0.6)]
    curves = {"plain": plain, "dropping": fast, "schedule": never}
    found = time_to_accuracy.compared(curves, 0.7)
    assert found["sides"]["plain"]["seconds"] == [20.0, 10.0]
    assert found["ratio"]["dropping"] == {"of_means": 0.4, "min": 0.3, "max": 0.6}
    assert found["sides"]["schedule"]["seconds"] == [10.0, None]
    assert "schedule" not in found["ratio"]
    assert found["reached"] == {"dropping": True, "schedule": False}
    assert time_to_accuracy.compared(curves, 0.5)["failed"]["plain"]


def test_phases_begin_at_their_steps_wherever_the_run_ends():
    data = Data(train="a-*.tar", test="b-*.tar", source="")
    how = {"seed": 0, "samples": 2560, "image_size": 32, "patch_size": 4}
    config = config_of("fashion", data, **how, schedule="8/1@0,4/0.25@300,4/1@301")
    total = round(config.epochs * 10)
    phases = [config.model.phases.at(step, total) for step in (0, 299, 300, 301, total - 1)]
    assert [(p.patch_size, p.keep) for p in phases] == [(8, 1), (8, 1), (0, 0.25), (0, 1), (0, 1)]
    assert config_of("fashion", data, **how).model.phases.plain
    with pytest.raises(ValueError, match="'8@0' is not PATCH/KEEP@STEP"):
        phase_words("4/1@0,8@0")


def test_flops_of_a_phase_fall_with_its_tokens():
    data = Data(train="a-*.tar", test="b-*.tar", source="")
    plain = config_of("digits", data, seed=0, samples=256)
    whole, half, large = (
        time_to_accuracy.flops_of(plain, *phase) for phase in ((2, 1.0), (2, 0.5), (4, 1.0))
    )
    assert large < half < whole
