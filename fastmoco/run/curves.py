"""The curves of a run as a picture.

The colors are those of Okabe and Ito, which the color-blind can tell apart, and every line of a
panel has another style. The ticks are numbers at their true places: steps are whole, nothing is an
offset, and a log axis of less than a decade has as many labels as a longer one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmoco.run.metrics_file import Series, read_curves
from fastmoco_pipelines.files.settings import without_settings_here
from fastmoco_pipelines.files.whole import whole_file
from fastmoco_pipelines.text import escaped

BLUE, ORANGE, RED, GREY = "#0072B2", "#E69F00", "#D55E00", "#5A5A5A"
COLORS = (BLUE, ORANGE, "#009E73", RED, "#CC79A7", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
MARKED = 40
"""Points of a curve up to which each of them has a marker."""
MOST_MARKS = 300
"""Marks of steps without a number, beyond which they are thinned."""
LONGEST_NAME = 60
"""Characters of a name in the picture."""
MOST_NORMS = 64
"""Gradient norms that are drawn; a run has some for each block of its encoder."""
LARGEST = 1e300
"""Values beyond it are drawn at it: the axis around them would overflow."""
FLAT = 0.02
"""Least height of a panel, as a share of its values."""
ROLLED_BACK = "rolled_back_to"
BUCKETS = 2000
"""Parts of the steps that a long series is thinned to. The picture is 960 pixels wide."""


@dataclass(frozen=True, kw_only=True)
class Panels:
    """What the curves of a run mean; `config.json` contains it.

    Attributes:
        figures: metric name -> label of accuracies (shares), e.g. `{"knn": "kNN"}`.
        lines: values drawn as dashed lines in the panel of a metric, by name, e.g.
            `{"loss": {"knows nothing": 4.4}, "knn": {"most frequent class": 0.1}}`.
        steps_per_epoch: for the axis of epochs; 0: none.
    """

    figures: Mapping[str, str] = field(default_factory=dict)
    lines: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    steps_per_epoch: int = 0

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Panels:
        """That of the `config.json` of a run; what is missing or odd there is left out."""
        curves = saved.get("curves")
        curves = curves if isinstance(curves, Mapping) else {}
        resolved = saved.get("resolved")
        per_epoch = resolved.get("steps_per_epoch", 0) if isinstance(resolved, Mapping) else 0
        figures = curves.get("figures", {"knn": "kNN"})
        lines = curves.get("lines", {})
        return cls(
            figures={
                name: label
                for name, label in (figures.items() if isinstance(figures, Mapping) else ())
                if isinstance(label, str)
            },
            lines={
                name: {str(what): float(value) for what, value in each.items() if _is_number(value)}
                for name, each in (lines.items() if isinstance(lines, Mapping) else ())
                if isinstance(each, Mapping)
            },
            steps_per_epoch=per_epoch if type(per_epoch) is int and 0 < per_epoch < 2**63 else 0,
        )

    def to_json(self) -> dict[str, Any]:
        """As `config.json` stores it; the steps of an epoch are among the resolved values."""
        return {
            "figures": dict(self.figures),
            "lines": {name: dict(lines) for name, lines in self.lines.items()},
        }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < LARGEST


def draw_curves(
    metrics_jsonl: Path,
    out_png: Path,
    title: str,
    panels: Panels,
    *,
    tell: Callable[[str], None] = lambda text: None,
) -> Path:
    """Plot loss, accuracies and recorded gradient norms against the step.

    The time is linear in the number of lines; 500,000 lines take some seconds. The picture is
    written whole or not at all. Steps whose value was not finite are marked at the bottom of the
    panel, and rollbacks by a vertical line.

    Args:
        metrics_jsonl: file of a run. The metrics `loss`, those of `panels.figures` and
            `gradient_norm/<part>` are plotted; a panel without data is omitted.
        out_png: picture to write; its folder is created.
        title: of the picture.
        panels: figures by name, and lines to compare with.
        tell: called with a sentence if the file has damaged lines, which are left out.

    Returns:
        `out_png`.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if the file contains none of these metrics, or is a link or no regular file.
    """
    with without_settings_here():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figures = panels.figures
    wanted = {"loss", ROLLED_BACK, *figures}
    curves, lost = read_curves(
        metrics_jsonl, lambda name: name in wanted or name.startswith("gradient_norm/"), tell=tell
    )
    curves = {
        name: Series(series.steps, series.values.clip(-LARGEST, LARGEST))
        for name, series in curves.items()
    }
    back = curves.pop(ROLLED_BACK, None)
    known = curves.keys() | lost.keys()
    names: list[str] = [name for name in ("loss", *figures) if name in known]
    norms = [name for name in curves if name.startswith("gradient_norm/")]
    norms += [name for name in lost if name.startswith("gradient_norm/") and name not in curves]
    del norms[MOST_NORMS:]  # a legend of thousands would take minutes
    if not names and not norms:
        raise ValueError(
            f"{metrics_jsonl}: contains neither loss nor accuracies nor gradient norms; "
            "has the run logged a step?"
        )
    end = max(
        [1, *(int(s.steps[-1]) for s in curves.values()), *(int(s[-1]) for s in lost.values())]
    )

    count = len(names) + bool(norms)
    rows = -(-len(norms) // 4)
    figure = Figure(figsize=(8, 1.2 + 2.4 * count + 0.15 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(escaped(title)[:LONGEST_NAME], parse_math=False)
    all_axes = figure.subplots(count, sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(all_axes, [*names, *(["gradient norm"] if norms else [])], strict=True):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if back is not None:
            _mark_rollbacks(axes, back.steps, first=axes is all_axes[0])
        if name == "gradient norm":
            axes.set_ylabel(name)
            _draw_norms(axes, {norm: curves[norm] for norm in norms if norm in curves})
            _mark_lost(axes, _joined([lost[norm] for norm in norms if norm in lost]))
            continue
        share = name in figures
        axes.set_ylabel(f"{escaped(figures[name])} accuracy" if share else name, parse_math=False)
        if name in curves:
            _draw_one(axes, curves[name], share=share)
        _draw_lines(axes, panels.lines.get(name, {}), share=share)
        _plain_ticks(axes, share=share)
        _mark_lost(axes, lost.get(name, np.empty(0, np.int64)))

    _draw_steps(list(all_axes), end, panels.steps_per_epoch)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out_png) as fresh:
        figure.savefig(fresh, format="png")
    return out_png


def _draw_one(axes: Any, series: Series, *, share: bool) -> None:
    """The curve of a loss or an accuracy; of an accuracy also its last and its best value."""
    steps, values = thinned(series)
    marker = "o" if len(steps) <= MARKED else None
    color = RED if share else BLUE
    axes.plot(steps, values, color=color, linewidth=1.3, marker=marker, markersize=4)
    if not share:
        return
    best = int(np.argmax(values))
    if best != len(values) - 1 and values[best] > values[-1]:
        axes.plot(steps[best], values[best], color=color, marker="*", markersize=11)
        _note(axes, f"best {values[best]:.1%}", steps[best], values[best], up=True)
    _note(axes, f"{values[-1]:.1%}", steps[-1], values[-1], up=False)


def _note(axes: Any, text: str, step: float, value: float, *, up: bool) -> None:
    """A word at a point, left of it in the right half of the picture."""
    axes.annotate(
        text,
        (step, value),
        (0, 7 if up else -7),
        textcoords="offset points",
        ha="right" if up or step else "left",
        va="bottom" if up else "top",
        fontsize=9,
    )
    axes.margins(y=0.15)


def _draw_lines(axes: Any, lines: Mapping[str, float], *, share: bool) -> None:
    """Values to compare with, as dashed lines with their names."""
    for name, value in lines.items():
        if not math.isfinite(value):
            continue
        axes.axhline(value, color=GREY, linestyle="--", linewidth=1)
        axes.annotate(
            escaped(f"{name} {value:.1%}" if share else f"{name} {value:.3f}")[:LONGEST_NAME],
            (1, value),
            (-2, 2),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            color=GREY,
            fontsize=8,
            ha="right",
            parse_math=False,
        )


def _draw_norms(axes: Any, norms: Mapping[str, Series]) -> None:
    """Gradient norms of all places: on a log axis if they differ by more than a factor of four."""
    for number, (name, series) in enumerate(norms.items()):
        steps, values = thinned(series)
        axes.plot(
            steps,
            values,
            color=_color(number, len(norms)),
            linestyle=STYLES[number % len(STYLES)],
            linewidth=1.2,
            marker="o" if len(steps) == 1 else None,
            markersize=4,
            label=escaped(name.partition("/")[2].replace("_", " "))[:LONGEST_NAME],
        )
    if not norms:
        return
    legend = axes.legend(
        fontsize=8, ncols=4, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    every = np.concatenate([series.values for series in norms.values()])
    positive = every[every > 0]
    if len(positive) and positive.max() > 4 * positive.min():
        _log_ticks(axes, math.log10(positive.max() / positive.min()))
    else:
        _plain_ticks(axes, share=False)


def _color(number: int, count: int) -> Any:
    """One of a few colors, or of many in the order of the network by a scale of lightness."""
    if count <= len(COLORS):
        return COLORS[number]
    from matplotlib import colormaps

    return colormaps["viridis"](0.92 * number / (count - 1))


def _log_ticks(axes: Any, decades: float) -> None:
    """Labels 1, 2, 5 where a log axis has few decades, and whole decades where it has many."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    few = (1.0, 2.0, 5.0) if decades < 2.5 else (1.0, 3.0) if decades < 4 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=few, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(LogLocator(base=10, subs=tuple(range(1, 10)), numticks=100))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _plain_ticks(axes: Any, *, share: bool) -> None:
    """Numbers as they are: no offset, no power of ten, as many digits as the ticks need."""
    from matplotlib.ticker import PercentFormatter, ScalarFormatter

    if share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        return
    plain = ScalarFormatter(useOffset=False)
    plain.set_scientific(False)
    axes.yaxis.set_major_formatter(plain)

    # Noise in the last digits of a constant would otherwise fill the panel.
    low, high = axes.get_ylim()
    least = FLAT * max(abs(low), abs(high))
    if high - low < least:
        middle = (low + high) / 2
        axes.set_ylim(middle - least / 2, middle + least / 2)


def _draw_steps(all_axes: Sequence[Any], end: int, steps_per_epoch: int) -> None:
    """The shared axis of steps, from 0 to the last one, and the same in epochs above."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    all_axes[-1].set_xlabel("step")
    all_axes[-1].set_xlim(-0.01 * end, 1.02 * end)
    all_axes[-1].xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    all_axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    if steps_per_epoch > 0:
        epochs = all_axes[0].secondary_xaxis(
            "top", functions=(lambda s: s / steps_per_epoch, lambda e: e * steps_per_epoch)
        )
        epochs.set_xlabel("epoch")
        epochs.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
        epochs.xaxis.set_major_formatter(FuncFormatter(lambda epoch, _: f"{epoch:g}"))


def _mark_lost(axes: Any, steps: NDArray[np.int64]) -> None:
    """Crosses at the bottom where a value was NaN or infinite: a gap in a curve is not visible."""
    if not len(steps):
        return
    shown = steps[:: -(-len(steps) // MOST_MARKS)]
    axes.plot(
        shown,
        np.full(len(shown), 0.03),
        transform=axes.get_xaxis_transform(),
        color=RED,
        marker="x",
        markersize=5,
        linestyle="none",
    )
    what = "1 logged step was" if len(steps) == 1 else f"{len(steps):,} logged steps were"
    axes.annotate(
        f"x: {what} not finite",
        (0.01, 0.08),
        xycoords="axes fraction",
        color=RED,
        fontsize=8,
    )


def _mark_rollbacks(axes: Any, steps: NDArray[np.int64], *, first: bool) -> None:
    """Vertical lines where the state of an earlier step was restored."""
    for step in steps[-MOST_MARKS:]:
        axes.axvline(step, color=GREY, linestyle=":", linewidth=1)
    if first:
        axes.annotate(
            "rolled back",
            (steps[0], 0.9),
            (2, -2),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            color=GREY,
            fontsize=8,
            va="top",
        )


def _joined(parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.unique(np.concatenate(parts)) if parts else np.empty(0, np.int64)


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
