import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastmoco.run.curves import BLUE, RED, Panels, draw_curves, thinned
from fastmoco.run.metrics_file import Series, read_series

KNN = Panels(figures={"knn": "kNN"})


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


RUN: list[dict[str, Any]] = [
    *(
        {"step": s, "loss": 3.0 / (1 + s / 20), "gradient_norm/total": 1.0 + s % 3, "lr": 0.1}
        for s in range(0, 100, 5)
    ),
    *({"step": s, "knn": 0.4 + s / 200} for s in range(0, 101, 20)),
]


def coloured(path: Path, colour: str) -> int:
    """Pixels of nearly this colour."""
    pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.int32)
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(pixels - wanted).max(axis=2) < 12).sum())


def test_lines_are_merged_by_step_the_last_line_wins_and_torn_lines_are_left_out(
    tmp_path: Path,
) -> None:
    path = write(
        tmp_path / "m",
        [
            {"step": 0, "loss": 3.0},
            {"step": 10, "loss": 2.0},
            {"step": 10, "knn": 0.5},
            {"step": 5, "loss": 9.0},
        ],
    )
    with path.open("a") as file:
        file.write('{"step": 20, "lo\n[1]\n{"loss": 1}\n{"step": 5, "loss": 2.5}\n{"step": 30')
    found = read_series(path, lambda name: name in ("loss", "knn"))
    assert found["loss"].steps.tolist() == [0, 5, 10]
    assert found["loss"].values.tolist() == [3.0, 2.5, 2.0]
    assert found["knn"].steps.tolist() == [10]


def test_a_long_series_keeps_its_envelope_and_every_spike() -> None:
    """By the data, whatever the picture's size: 10^5 noisy steps and two spikes of one step."""
    draw = np.random.default_rng(0)
    steps = np.cumsum(draw.integers(1, 20, 100_000))
    values = draw.normal(size=len(steps))
    values[[4321, 77_777]] = 1e3, -1e3
    thin = thinned(Series(steps, values), buckets=500)
    assert 1000 < len(thin.steps) <= 2000
    assert np.all(np.diff(thin.steps) > 0)
    assert {(steps[0], values[0]), (steps[-1], values[-1])} <= set(zip(*thin, strict=True))
    assert {(steps[4321], 1e3), (steps[77_777], -1e3)} <= set(zip(*thin, strict=True))
    assert set(zip(*thin, strict=True)) <= set(zip(steps, values, strict=True))

    # First, last, least and largest value of every part.
    width = steps[-1] - steps[0] + 1
    part, thin_part = ((x - steps[0]) * 500 // width for x in (steps, thin.steps))
    for number in range(500):
        ours, all_values = thin.values[thin_part == number], values[part == number]
        assert ours[0] == all_values[0]
        assert ours[-1] == all_values[-1]
        assert ours.min() == all_values.min()
        assert ours.max() == all_values.max()


def test_a_short_series_is_drawn_as_it_is() -> None:
    series = Series(np.arange(8000), np.arange(8000.0))
    assert thinned(series) is series
    assert len(thinned(Series(np.arange(80_000), np.arange(80_000.0))).steps) == 4000


def test_steps_far_apart_and_parts_without_steps_are_fine() -> None:
    steps = np.array([0, 1, 2, 3, 2**62, 2**62 + 1])
    thin = thinned(Series(steps, np.array([5.0, 9, 1, 6, 2, 2])), buckets=1)
    assert thin.steps.tolist() == [0, 1, 2, 2**62 + 1]
    thin = thinned(Series(np.arange(9) ** 9, np.arange(9.0)), buckets=2)
    assert thin.steps.tolist() == [0, 7**9, 8**9]


def test_a_picture_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    def half(self: Figure, path: Path, **more: Any) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    path = write(tmp_path / "m", RUN)
    before = draw_curves(path, tmp_path / "c.png", "t", KNN).read_bytes()
    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(KeyboardInterrupt):
        draw_curves(path, tmp_path / "c.png", "t", KNN)
    assert (tmp_path / "c.png").read_bytes() == before
    assert sorted(found.name for found in tmp_path.iterdir()) == ["c.png", "m"]


def test_curves_are_drawn(tmp_path: Path) -> None:
    out = draw_curves(
        write(tmp_path / "m", RUN),
        tmp_path / "new" / "c.png",
        "digits",
        replace(KNN, lines={"knn": {"raw pixels": 0.98}}),
    )
    assert out == tmp_path / "new" / "c.png"
    assert coloured(out, BLUE) > 200
    assert coloured(out, RED) > 200


def test_only_what_was_recorded_is_drawn(tmp_path: Path) -> None:
    heights = []
    for number, keys in enumerate(
        (["loss"], ["loss", "knn"], ["loss", "knn", "gradient_norm/total"])
    ):
        rows = [{k: v for k, v in row.items() if k == "step" or k in keys} for row in RUN]
        out = draw_curves(write(tmp_path / "m", rows), tmp_path / f"{number}.png", "title", KNN)
        heights.append(Image.open(out).height)
        assert (coloured(out, RED) > 200) == ("knn" in keys)
    assert heights == sorted(set(heights))


def test_baselines_change_the_picture(tmp_path: Path) -> None:
    path = write(tmp_path / "m", RUN)
    without = draw_curves(path, tmp_path / "a.png", "t", KNN).read_bytes()
    assert (
        draw_curves(
            path, tmp_path / "b.png", "t", replace(KNN, lines={"knn": {"raw pixels": 0.7}})
        ).read_bytes()
        != without
    )


def test_one_point_missing_values_and_not_finite_ones_are_fine(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"step": 0, "loss": None, "knn": 0.5}, {"step": 1, "loss": 2.0}]
    path = write(tmp_path / "m", rows)
    with path.open("a") as file:
        file.write('{"step": 2, "loss": NaN}\n')
    assert draw_curves(path, tmp_path / "c.png", "$ odd_title", KNN).exists()


def test_nothing_to_draw_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has the run logged a step"):
        draw_curves(write(tmp_path / "m", [{"step": 1, "lr": 0.1}]), tmp_path / "c.png", "t", KNN)


def test_no_global_state_of_matplotlib_is_touched(tmp_path: Path) -> None:
    pyplot = sys.modules.pop("matplotlib.pyplot", None)
    try:
        draw_curves(write(tmp_path / "m", RUN), tmp_path / "c.png", "t", KNN)
        assert "matplotlib.pyplot" not in sys.modules
    finally:
        if pyplot is not None:
            sys.modules["matplotlib.pyplot"] = pyplot
