import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastmoco.run.curves import BLUE, ORANGE, draw_curves, read_metrics

KNN = {"knn": "kNN"}


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


def test_rows_are_merged_by_step_the_last_line_wins_and_torn_lines_are_left_out(
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
    assert read_metrics(path) == [
        {"step": 0, "loss": 3.0},
        {"step": 5, "loss": 2.5},
        {"step": 10, "loss": 2.0, "knn": 0.5},
    ]


def test_curves_are_drawn(tmp_path: Path) -> None:
    out = draw_curves(
        write(tmp_path / "m", RUN),
        tmp_path / "new" / "c.png",
        "digits",
        figures=KNN,
        baselines={"knn": {"raw pixels": 0.98}},
    )
    assert out == tmp_path / "new" / "c.png"
    assert coloured(out, BLUE) > 200
    assert coloured(out, ORANGE) > 200


def test_only_what_was_recorded_is_drawn(tmp_path: Path) -> None:
    heights = []
    for number, keys in enumerate(
        (["loss"], ["loss", "knn"], ["loss", "knn", "gradient_norm/total"])
    ):
        rows = [{k: v for k, v in row.items() if k == "step" or k in keys} for row in RUN]
        out = draw_curves(
            write(tmp_path / "m", rows), tmp_path / f"{number}.png", "title", figures=KNN
        )
        heights.append(Image.open(out).height)
        assert (coloured(out, ORANGE) > 200) == ("knn" in keys)
    assert heights == sorted(set(heights))


def test_baselines_change_the_picture(tmp_path: Path) -> None:
    path = write(tmp_path / "m", RUN)
    without = draw_curves(path, tmp_path / "a.png", "t", figures=KNN).read_bytes()
    assert (
        draw_curves(
            path, tmp_path / "b.png", "t", figures=KNN, baselines={"knn": {"raw pixels": 0.7}}
        ).read_bytes()
        != without
    )


def test_one_point_missing_values_and_not_finite_ones_are_fine(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"step": 0, "loss": None, "knn": 0.5}, {"step": 1, "loss": 2.0}]
    path = write(tmp_path / "m", rows)
    with path.open("a") as file:
        file.write('{"step": 2, "loss": NaN}\n')
    assert draw_curves(path, tmp_path / "c.png", "$ odd_title", figures=KNN).exists()


def test_nothing_to_draw_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has the run logged a step"):
        draw_curves(
            write(tmp_path / "m", [{"step": 1, "lr": 0.1}]), tmp_path / "c.png", "t", figures=KNN
        )


def test_no_global_state_of_matplotlib_is_touched(tmp_path: Path) -> None:
    pyplot = sys.modules.pop("matplotlib.pyplot", None)
    try:
        draw_curves(write(tmp_path / "m", RUN), tmp_path / "c.png", "t", figures=KNN)
        assert "matplotlib.pyplot" not in sys.modules
    finally:
        if pyplot is not None:
            sys.modules["matplotlib.pyplot"] = pyplot
