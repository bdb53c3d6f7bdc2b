"""The picture of the instability: what a fall is, when it fails, and what it draws."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.cases import instability, telemetry
from benchmarks.cases.instability import judged
from fastmoco.recipes import get_recipe

KNN = [[20, 25, 30, 35, 40], [0.5, 0.8, 0.73, 0.71, 0.79]]
SPIKES = [[29, "patch_embed", 7.0], [32, "last_block", 6.0]]


def _runs(*, fall_first: bool = False, frozen_falls_as_well: bool = False):
    """Both runs of a seed."""
    later = [[20, 25, 30, 35, 40], [0.5, 0.8, 0.78, 0.81, 0.7]]
    late = [[36, "patch_embed", 7.0]]
    norms = {"first_block": [[5, 10], [1.0, 2.0]]}
    sides = {
        "trained": (KNN, late if fall_first else SPIKES),
        "frozen": (KNN if frozen_falls_as_well else later, SPIKES),
    }
    return [
        {
            "side": side,
            "seed": 0,
            "knn": knn,
            "norms": norms,
            "spikes": spikes,
            "figures": judged(knn, spikes),
        }
        for side, (knn, spikes) in sides.items()
    ]


def test_a_run_is_judged_by_its_distance_to_its_best_so_far():
    assert judged(KNN, SPIKES) == {
        "best": 0.8,
        "last": 0.79,
        "fall": pytest.approx(0.09),
        "falls": [(35, 32)],
        "spikes": 2,
        "early_spikes": 0,
        "largest_spike": 7.0,
    }
    calm = judged([[20, 25], [0.5, 0.45]], [])
    assert (calm["falls"], calm["largest_spike"]) == ([], 0.0)


def test_falls_count_from_step_20_on_and_end_at_half_their_distance():
    steps = list(range(0, 100, 10))
    shares = [0.9, 0.4, 0.5, 0.8, 0.7, 0.75, 0.71, 0.78, 0.7, 0.8]
    spikes = [[15, "heads", 9.0], [19, "heads", 6.0], [80, "total", 5.5], [90, "total", 30.0]]
    figures = judged([steps, shares], spikes)
    assert figures["falls"] == [(40, None), (80, 80)]
    assert (figures["best"], figures["fall"], figures["early_spikes"]) == (0.8, 0.1, 2)
    assert judged([steps, shares], [[20, "heads", 6.0]])["falls"][0] == (40, 20)


def test_a_picture_without_spikes_before_falls_or_of_a_frozen_run_that_falls_first_is_a_failure():
    assert instability._failed(_runs()) == {}
    silent = instability._failed(_runs(fall_first=True))
    assert silent == {"spikes": "1 of 2"}
    same = instability._failed(_runs(frozen_falls_as_well=True))
    assert same == {"order": "0 of 1", "kNN": "0 of 1"}


def test_the_sides_differ_in_the_patch_projection_alone():
    sides = [
        instability.config_of("unstable_digits", Path("set"), seed=1, frozen=frozen)
        for frozen in instability.SIDES.values()
    ]
    trained, frozen = sides
    assert not trained.model.freeze_patch_embed
    model = replace(trained.model, freeze_patch_embed=True)
    assert replace(trained, model=model) == frozen


def test_the_recipe_has_the_views_and_heads_of_the_quickstart():
    unstable, calm = get_recipe("unstable_digits"), get_recipe("quickstart_digits")
    view = replace(unstable.data.view1, size=8)
    assert replace(unstable.data, view1=view, view2=view) == calm.data
    assert unstable.objective == calm.objective
    frozen = replace(unstable.model, freeze_patch_embed=True, image_size=8, patch_size=2)
    assert frozen == calm.model


def test_the_table_and_the_picture_show_every_run(tmp_path):
    pytest.importorskip("matplotlib", reason="draws a picture")
    result = {"failed": {}, "runs": _runs()}
    rows = instability.table(result).splitlines()
    assert len(rows) == 4
    assert "| trained | 0 | 80.0% | 79.0% | 9.0 points | 35 (32) | 2 | 0 | 7 |" in rows[2]
    assert rows[3].endswith("| 11.0 points | 40 (32) | 2 | 0 | 7 |")
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    for path in (first, second):
        instability.draw(result, path)
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes().count(b'id="axes_') == 3


def test_the_case_of_telemetry_counts_what_its_calls_take(monkeypatch):
    monkeypatch.setattr(telemetry, "config_of", _tiny)
    result = telemetry.run({**telemetry.DEFAULTS, "shapes": "vit_nano", "rounds": 1})
    assert result["failed"] == {}
    figures = result["shapes"]["vit_nano"]
    assert figures["parts"].keys() == set(telemetry._Clock.names)
    assert 0 < figures["share"]["median"] < 1
    assert sum(figures["parts"].values()) == pytest.approx(figures["share"]["median"], abs=1e-4)
    assert "vit_nano" in telemetry.table(result)


def _tiny(shape: str, threads: int):
    config = get_recipe("quickstart_digits")
    return replace(
        config,
        device="cpu",
        threads=threads,
        global_batch_size=16,
        log_every_steps=2,
        data=replace(config.data, synthetic=True),
        knn=replace(config.knn, every_epochs=0),
    )
