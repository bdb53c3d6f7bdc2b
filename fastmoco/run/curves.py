"""The curves of a run as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BLUE, ORANGE, GREY = "#1f6fb4", "#d95f02", "#777777"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a `metrics.jsonl`, one for each step, in the order of steps.

    Lines of the same step are merged. If a killed run repeated steps, the last line counts.
    Incomplete lines are skipped.

    Args:
        path: JSON lines with a `step` each.

    Returns:
        Rows with `step` and the metrics known at it.
    """
    rows: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (ValueError, KeyError, TypeError):
            continue
        rows.setdefault(step, {}).update(row)
    return [rows[step] for step in sorted(rows)]


def draw_curves(
    metrics_jsonl: Path,
    out_png: Path,
    title: str,
    *,
    figures: Mapping[str, str],
    baselines: Mapping[str, Mapping[str, float]] | None = None,
) -> Path:
    """Plot loss, accuracies and recorded gradient norms against the step.

    Args:
        metrics_jsonl: file of a run. The metrics `loss`, those of `figures` and
            `gradient_norm/<part>` are plotted; a panel without data is omitted.
        out_png: picture to write; its folder is created.
        title: of the picture.
        figures: metric name -> label of accuracies (shares), e.g. `{"knn": "kNN"}`.
        baselines: accuracies plotted as dashed lines in the panel of a metric, by name, e.g.
            `{"knn": {"raw pixels": 0.98}}`.

    Returns:
        `out_png`.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if the file contains none of these metrics.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    rows = read_metrics(metrics_jsonl)
    panels: list[str] = [name for name in ("loss", *figures) if _series(rows, name)[0]]
    norms = sorted(
        {
            key
            for row in rows
            for key in row
            if key.startswith("gradient_norm/") and _series(rows, key)[0]
        }
    )
    if norms:
        panels.append("gradient norm")
    if not panels:
        raise ValueError(
            f"{metrics_jsonl}: contains neither loss nor accuracies nor gradient norms; has the run logged a step?"
        )

    figure = Figure(figsize=(8, 1 + 2.4 * len(panels)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, panel in zip(
        figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0], panels, strict=True
    ):
        axes.set_ylabel(f"{figures[panel]} accuracy" if panel in figures else panel)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)

        if panel == "loss":
            axes.plot(*_series(rows, "loss"), color=BLUE, linewidth=1.2)
        elif panel in figures:
            steps, accuracies = _series(rows, panel)
            axes.plot(steps, accuracies, color=ORANGE, marker="o", markersize=4)
            axes.annotate(
                f"{accuracies[-1]:.1%}",
                (steps[-1], accuracies[-1]),
                (0, -6),
                textcoords="offset points",
                ha="right",
                va="top",
            )
            for name, accuracy in (baselines or {}).get(panel, {}).items():
                axes.axhline(accuracy, color=GREY, linestyle="--", linewidth=1)
                axes.annotate(
                    f"{name} {accuracy:.1%}",
                    (0, accuracy),
                    (2, 2),
                    xycoords=axes.get_yaxis_transform(),
                    textcoords="offset points",
                    color=GREY,
                    fontsize=8,
                )
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        else:
            for name in norms:
                axes.plot(
                    *_series(rows, name),
                    linewidth=1,
                    label=name.partition("/")[2].replace("_", " "),
                )
            axes.set_yscale("log")
            axes.legend(fontsize=8, ncols=len(norms), frameon=False)

    axes.set_xlabel("step")
    out_png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_png)
    return out_png


def _series(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and finite values of one metric."""
    pairs = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    pairs = [(step, value) for step, value in pairs if math.isfinite(value)]
    return [step for step, _ in pairs], [value for _, value in pairs]
