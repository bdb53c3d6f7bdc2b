"""Metrics of one or several runs as lines against the step.

Long series are thinned so that spikes stay: the first, last, least and largest value of each of equal
parts of the steps is kept. A noisy one also has the line of its medians.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmoco.run.curves import thinned
from fastmoco.run.metrics_file import Series
from fastmoco.run.report.figure import (
    COLORS,
    MOST_LINES,
    MOST_MARKS,
    Chart,
    base_layout,
    number,
    rounded,
    table_row,
    text,
)
from fastmoco.run.report.reading import ReportRun, dips_of
from fastmoco.run.report.words import GROUPS, Meaning

BUCKETS = 400
"""Parts of the steps that a series is thinned to; a chart is at most 1,200 pixels wide."""
SMOOTH_PARTS = 120
"""Parts of the steps whose medians make the bold line of a noisy series."""
NOISY = 400
"""Points from which on a series has one."""
LABEL = 0.09
"""Height of the name of a value to compare with, as a share of a chart."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")


def line_chart(
    runs: Sequence[ReportRun],
    metrics: Mapping[str, str],
    meaning: Meaning,
    key: str,
    *,
    share: bool = False,
    log: bool = False,
    zero: bool = False,
    wide: bool = False,
    guides: str = "",
    lines: Mapping[str, float] | None = None,
    dips: bool = False,
) -> Chart | None:
    """A chart of some metrics of all runs against the step; None if no run has them.

    Of one run each metric has a color, of several each run.
    """
    known_somewhere = {name for run in runs for name in (*run.series, *run.lost)}
    logged = [name for name in metrics if name in known_somewhere]
    present = logged[:MOST_LINES]
    wanted = [
        (order, run, name, metrics[name])
        for order, run in enumerate(runs)
        for name in present
        if name in run.series or name in run.lost
    ]
    if not wanted:
        return None
    buckets = max(80, BUCKETS // max(1, -(-len(wanted) // 6)))
    layout = base_layout("share" if share else "log" if log else "")
    if zero:
        layout["yaxis"]["rangemode"] = "tozero"
    traces: list[dict[str, Any]] = []
    rows: list[Sequence[str]] = []
    for order, run, name, label in wanted:
        alone = len(runs) == 1
        place = present.index(name)
        shown = label if alone else run.short if len(present) == 1 else f"{run.short}: {label}"
        style = {
            "color": f"@s{(place if alone else order) % COLORS}",
            "dash": DASHES[(place // COLORS if alone else place + order // COLORS) % len(DASHES)],
        }
        series = run.series.get(name)
        if series is not None:
            if log:
                series = Series(series.steps[series.values > 0], series.values[series.values > 0])
            if len(series.steps):
                traces += _curve(series, text(shown), style, buckets, share=share)
                rows.append(table_row(shown, run.series[name], share=share))
            if dips and len(series.steps):
                traces += _dips(series, style["color"], text(shown))
        lost = run.lost.get(name)
        if lost is not None and len(lost):
            traces.append(_lost(lost, series, style["color"]))
            rows.append((f"{shown}, not finite", f"step {lost[0]:,}", f"step {lost[-1]:,}", "", ""))
    if not traces:
        return None
    known = _known(runs, guides)
    drawn = [run.series[name] for _, run, name, _ in wanted if name in run.series]
    near, far = _near_and_far(known | dict(lines or {}), drawn, zero=zero)
    labels = _apart(near, drawn)
    layout["shapes"], layout["annotations"] = _guides(near, labels, share=share)
    if not (zero or log or near):
        _read_constant(layout["yaxis"], drawn)
    layout["shapes"] += [
        _upright(event.step) for run in runs for event in run.events if event.name == "rolled_back"
    ][:MOST_MARKS]
    named = sum(trace.get("showlegend", True) for trace in traces)
    layout["showlegend"] = named > 1 or meaning in GROUPS.values()
    unit = f" ({meaning.unit})" if meaning.unit else ""
    beyond = [
        f"{name if len(runs) > 1 else name[:1].upper() + name[1:]}: {number(value, share=share)}."
        for name, value in (far | {n: v for n, v in near.items() if n not in labels}).items()
    ]
    if len(logged) > len(present):
        beyond.append(f"The first {len(present)} of {len(logged)}.")
    return Chart(
        key=key,
        title=f"{meaning.title}{unit}",
        note=" ".join([meaning.note, *beyond]),
        figure={"data": traces, "layout": layout},
        rows=rows,
        wide=wide,
        height=340 if wide else 280,
    )


def _curve(
    series: Series, name: str, style: Mapping[str, str], buckets: int, *, share: bool
) -> list[dict[str, Any]]:
    """The line of a series; of a long noisy one a thin line with its extremes, and its median."""
    few = thinned(series, buckets)
    form = ".1%" if share else ".4~g"
    base = {
        "type": "scatter",
        "name": name,
        "legendgroup": name,
        "hovertemplate": f"%{{y:{form}}}",
    }
    noisy = len(series.steps) > NOISY and _roughness(series) > 0.02
    line = {
        **base,
        "mode": "lines+markers" if len(few.steps) <= 40 else "lines",
        "x": few.steps.tolist(),
        "y": rounded(few.values),
        "line": {**style, "width": 1 if noisy else 2},
        "marker": {"size": 5, "color": style["color"]},
    }
    if not noisy:
        return [line]
    middle = _medians(series)
    return [
        {**line, "opacity": 0.4, "showlegend": False, "hovertemplate": f"%{{y:{form}}} (logged)"},
        {
            **base,
            "mode": "lines",
            "x": middle.steps.tolist(),
            "y": rounded(middle.values),
            "line": {**style, "width": 2.5},
            "hovertemplate": f"%{{y:{form}}} (median)",
        },
    ]


def _roughness(series: Series) -> float:
    """Mean change between two values, relative to the range of most of them."""
    low, high = np.quantile(series.values, [0.02, 0.98])
    spread = float(high - low)
    return float(np.median(np.abs(np.diff(series.values)))) / spread if spread > 0 else 0.0


def _medians(series: Series) -> Series:
    """The median of each of equal parts of the logged steps."""
    parts = np.array_split(np.arange(len(series.steps)), SMOOTH_PARTS)
    return Series(
        np.array([series.steps[part[len(part) // 2]] for part in parts]),
        np.array([np.median(series.values[part]) for part in parts]),
    )


def _dips(series: Series, color: str, name: str) -> list[dict[str, Any]]:
    """Marks of the best value and of the dips."""
    best = int(np.argmax(series.values))
    marks = [
        _marks([series.steps[best]], [series.values[best]], "star", color, 13, f"{name}: best")
    ]
    dips = sorted(dips_of(series), key=lambda dip: dip.value - dip.best)[:MOST_MARKS]
    if dips:
        steps, values = [dip.step for dip in dips], [dip.value for dip in dips]
        marks.append(_marks(steps, values, "triangle-down", "@bad", 12, "dip"))
    return marks


def _marks(
    steps: Sequence[Any], values: Sequence[Any], symbol: str, color: str, size: int, name: str
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [int(step) for step in steps],
        "y": rounded(np.array(values, np.float64)),
        "marker": {
            "symbol": symbol,
            "size": size,
            "color": color,
            "line": {"color": "@card", "width": 1},
        },
        "showlegend": symbol == "triangle-down",
        "hovertemplate": "%{y:.1%}",
    }


def _lost(steps: NDArray[np.int64], series: Series | None, color: str) -> dict[str, Any]:
    """Crosses at the steps whose value was not finite: a gap in a curve is not visible."""
    shown = steps[:: -(-len(steps) // MOST_MARKS)]
    low = float(series.values.min()) if series is not None and len(series.values) else 0.0
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "not finite",
        "x": shown.tolist(),
        "y": [low] * len(shown),
        "marker": {"symbol": "x", "size": 8, "color": color},
        "hovertemplate": "not finite",
    }


def _known(runs: Sequence[ReportRun], metric: str) -> dict[str, float]:
    """The values that runs compare a metric with, by name; of one that differs between runs each with
    the name of its run."""
    found: dict[str, dict[str, float]] = {}
    for run in runs:
        for name, value in run.panels.lines.get(metric, {}).items():
            if math.isfinite(value):
                found.setdefault(name, {})[run.short] = value
    known: dict[str, float] = {}
    for name, values in found.items():
        if len(set(values.values())) == 1:
            known[name] = next(iter(values.values()))
            continue
        alike: dict[float, list[str]] = {}
        for short, value in values.items():
            alike.setdefault(value, []).append(short)
        for value, own in alike.items():
            more = f" and {len(own) - 1} more" if len(own) > 1 else ""
            known[f"{own[0]}{more}: {name}"] = value
    return known


def _near_and_far(
    values: Mapping[str, float], series: Sequence[Series], *, zero: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """Values to compare with: those that may be drawn, and those so far from the curves that a line
    would press them flat."""
    if not series:
        return dict(values), {}
    low = min(float(one.values.min()) for one in series)
    high = max(float(one.values.max()) for one in series)
    room = high - low
    if zero:
        low, room = min(low, 0.0), max(room, abs(high))
    near = {name: value for name, value in values.items() if low - room <= value <= high + room}
    return near, {name: value for name, value in values.items() if name not in near}


def _apart(values: Mapping[str, float], series: Sequence[Series]) -> set[str]:
    """The values to compare with whose names do not cover each other, from the lowest on."""
    ends = [end for one in series for end in (one.values.min(), one.values.max())]
    ends += values.values()
    least = LABEL * (float(max(ends)) - float(min(ends))) if ends else 0.0
    kept: dict[str, float] = {}
    for name, value in sorted(values.items(), key=lambda item: item[1]):
        if not kept or value - max(kept.values()) >= least:
            kept[name] = value
    return set(kept)


def _read_constant(axis: dict[str, Any], series: Sequence[Series]) -> None:
    """Around a constant plotly draws one unit up and down, so that a small one seems to be zero."""
    ends = {float(end) for one in series for end in (one.values.min(), one.values.max())}
    if len(ends) == 1 and (value := ends.pop()):
        axis["range"] = sorted([0.95 * value, 1.05 * value])


def _guides(
    values: Mapping[str, float], labels: Container[str], *, share: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Lines of values to compare with, and the names of those in `labels`."""
    shapes = [
        {
            "type": "line",
            "xref": "paper",
            "x0": 0,
            "x1": 1,
            "y0": value,
            "y1": value,
            "line": {"color": "@muted", "width": 1, "dash": "dash"},
        }
        for value in values.values()
    ]
    notes = [
        {
            "xref": "paper",
            "x": 1,
            "xanchor": "right",
            "y": value,
            "yanchor": "bottom",
            "text": text(f"{name} {number(value, share=share)}"),
            "showarrow": False,
            "font": {"size": 11, "color": "@muted"},
        }
        for name, value in values.items()
        if name in labels
    ]
    return shapes, notes


def _upright(step: int) -> dict[str, Any]:
    """A vertical line at a step."""
    return {
        "type": "line",
        "yref": "paper",
        "x0": step,
        "x1": step,
        "y0": 0,
        "y1": 1,
        "line": {"color": "@muted", "width": 1, "dash": "dot"},
    }
