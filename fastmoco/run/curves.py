"""The curves of a run as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fastmoco.run.metrics_file import Series, read_series
from fastmoco_pipelines.files import whole_file

BLUE, ORANGE, GREY = "#1f6fb4", "#d95f02", "#777777"


BUCKETS = 2000
"""Parts of the steps that a long series is thinned to. The picture is 960 pixels wide."""


def draw_curves(
    metrics_jsonl: Path,
    out_png: Path,
    title: str,
    *,
    figures: Mapping[str, str],
    baselines: Mapping[str, Mapping[str, float]] | None = None,
) -> Path:
    """Plot loss, accuracies and recorded gradient norms against the step.

    The time is linear in the number of lines; 500,000 lines take some seconds. The picture is
    written whole or not at all.

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

    curves = {
        name: thinned(series)
        for name, series in read_series(
            metrics_jsonl,
            lambda name: name == "loss" or name in figures or name.startswith("gradient_norm/"),
        ).items()
    }
    panels: list[str] = [name for name in ("loss", *figures) if name in curves]
    norms = sorted(name for name in curves if name.startswith("gradient_norm/"))
    if norms:
        panels.append("gradient norm")
    if not panels:
        raise ValueError(
            f"{metrics_jsonl}: contains neither loss nor accuracies nor gradient norms; "
            "has the run logged a step?"
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
            axes.plot(*curves["loss"], color=BLUE, linewidth=1.2)
        elif panel in figures:
            steps, accuracies = curves[panel]
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
                    *curves[name],
                    linewidth=1,
                    label=name.partition("/")[2].replace("_", " "),
                )
            axes.set_yscale("log")
            axes.legend(fontsize=8, ncols=len(norms), frameon=False)

    axes.set_xlabel("step")
    out_png.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out_png) as fresh:
        figure.savefig(fresh, format="png")
    return out_png


def thinned(series: Series, buckets: int = BUCKETS) -> Series:
    """A series of at most four points for each of equal parts of the steps.

    The first, the last, the least and the largest value of each part are kept, so the curve covers
    the same pixels, and a spike of a single step stays in it. Series of up to four points for each
    part are returned as they are.
    """
    steps, values = series
    if len(steps) <= 4 * buckets:
        return series

    # In Python's numbers the product cannot overflow.
    begin, width = int(steps[0]), int(steps[-1]) - int(steps[0]) + 1
    edges = [begin - (-width * part // buckets) for part in range(buckets)]
    starts = np.unique(np.searchsorted(steps, edges))
    ends = np.append(starts[1:], len(steps))

    # Sorted by value inside each part, its first is the least and its last the largest.
    part = np.repeat(np.arange(len(starts)), ends - starts)
    by_value = np.lexsort((values, part))
    kept = np.unique(np.concatenate([starts, ends - 1, by_value[starts], by_value[ends - 1]]))
    return Series(steps[kept], values[kept])
