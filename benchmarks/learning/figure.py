"""The learning benchmark as a figure and as rows of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.shown import low_high

COLORS = {"fastmoco": "#0072B2", "baseline": "#D55E00"}
"""Two colors of Okabe and Ito, which most color-blind people can tell apart."""
LINES = {"fastmoco": ("-", "o"), "baseline": ("--", "s")}
"""Line and marker, for those who see no color."""
NAMES = {
    "fashion": "Fashion-MNIST",
    "patches": "patches of photographs",
    "digits": "handwritten digits",
}
HEADER = (
    "task",
    "side",
    "kNN, random weights",
    "kNN by images",
    "kNN by CPU-seconds",
    "images per CPU-second",
    "speed-up: images",
    "speed-up: to the same kNN",
)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """kNN against images seen and against CPU-seconds, a row of two panels for each task: the mean
    of the seeds, and their range as a band.

    Args:
        result: of the case.
        path: the picture; its suffix gives the format.

    Raises:
        ValueError: if the result has no task.
        ImportError: if matplotlib is not installed.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    tasks = result["tasks"]
    if not tasks:
        raise ValueError("result: no task was run, so there is nothing to draw")
    figure = Figure(figsize=(9, 3.2 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), 2, squeeze=False, sharey="row")
    for row, (task, found) in zip(panels, tasks.items(), strict=True):
        for panel, axis in zip(row, ("images", "cpu_s"), strict=True):
            for side, own in found["sides"].items():
                _draw_side(panel, side, own["curves"], axis)
            panel.grid(alpha=0.3)
        row[0].set_title(NAMES.get(task, task), loc="left")
        row[0].set_ylabel("kNN, %")
        row[0].set_xlabel("images seen")
        row[0].xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k")
        row[1].set_xlabel("CPU-seconds of training")
        if found["budget_s"]:
            row[1].axvline(found["budget_s"], color="0.4", linewidth=0.8, linestyle=":")
    panels[0][0].legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    # The same result gives the same file.
    metadata = {"Date": None} if path.suffix == ".svg" else None
    with rc_context({"svg.hashsalt": "fastmoco"}):
        figure.savefig(path, dpi=120, metadata=metadata)


def _draw_side(panel: Any, side: str, curves: Sequence[Mapping[str, Any]], axis: str) -> None:
    """Mean and range of the points that all seeds have; their CPU-seconds as a mean."""
    points = min(len(curve["images"]) for curve in curves)
    x = [mean(curve[axis][i] for curve in curves) for i in range(points)]
    each = [[100 * curve["knn"][i] for curve in curves] for i in range(points)]
    color, (line, marker) = COLORS.get(side, "#009E73"), LINES.get(side, ("-.", "^"))
    panel.fill_between(x, [min(k) for k in each], [max(k) for k in each], color=color, alpha=0.2)
    panel.plot(x, [mean(k) for k in each], line, marker=marker, color=color, label=side, ms=4)


def rows(result: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of the table: one row for each task and side."""
    found: list[tuple[str, ...]] = []
    for task, own in result.get("tasks", {}).items():
        for side, figures in own["sides"].items():
            by_images, speedup = figures["by_images"], own.get("speedup", {}).get(side, {})
            found.append(
                (
                    NAMES.get(task, task),
                    side,
                    f"{figures['start']['mean']:.1%}",
                    f"{_range(by_images)} after {by_images['images']:,}",
                    f"{_range(figures['by_seconds'])} after {own['budget_s']:g}"
                    if "by_seconds" in figures
                    else "",
                    f"{figures['images_per_cpu_s']['mean']:,.0f}",
                    _ratio(speedup.get("images")),
                    _ratio(speedup.get("same_knn")),
                )
            )
    return HEADER, found


def _range(figures: Mapping[str, float]) -> str:
    return f"{figures['mean']:.1%} ({100 * figures['min']:.1f} to {100 * figures['max']:.1f})"


def _ratio(ratio: Mapping[str, float] | None) -> str:
    if ratio is None:
        return ""
    low, high = low_high(ratio)
    return f"{ratio['median']:.2f}x ({low:.2f} to {high:.2f})"
