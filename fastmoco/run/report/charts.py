"""The charts of a report as figures of plotly: plain dictionaries, which the page draws.

Colors are names such as `@s0`, which the page replaces by those of its light or dark theme. Texts
are escaped, because plotly reads tags in them. Long series are thinned so that spikes stay: the
first, last, least and largest value of each of equal parts of the steps is kept.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmoco.run.curves import thinned
from fastmoco.run.events import Event
from fastmoco.run.metrics_file import Series
from fastmoco.run.report.reading import ReportRun, dips_of
from fastmoco.run.report.words import GROUPS, Meaning, meaning_of, spaced
from fastmoco_pipelines.text import escaped

BUCKETS = 400
"""Parts of the steps that a series is thinned to; a chart is at most 1,200 pixels wide."""
SMOOTH_PARTS = 120
"""Parts of the steps whose medians make the bold line of a noisy series."""
NOISY = 400
"""Points from which on a series has one."""
HEAT_PARTS = 240
"""Columns of a heat map."""
MOST_ROWS = 64
"""Rows of a heat map."""
MOST_MARKS = 200
"""Events that are marked in a chart; of more, the largest."""
MOST_REST = 24
"""Metrics of unknown meaning that get a chart."""
MOST_LINES = 12
"""Lines of a chart."""
COLORS = 7
"""Colors of the palette, `@s0` to `@s6`."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "star", "hexagon", "pentagon")
LOADER_STAGES = {
    "read_ms": "read shards",
    "draw_ms": "draw augmentations",
    "decode_ms": "decode",
    "augment_ms": "cut and color views",
    "transfer_ms": "copy to the device",
    "heal_ms": "replace bad images",
}
"""Of the figures `loader/...` those that are times."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One chart.

    Attributes:
        key: its name in the page, of letters, digits and dashes.
        title: with the unit.
        note: how to read it.
        figure: `data` and `layout` of plotly.
        rows: its numbers, for a table: name, first, last, least, largest value with their steps.
        wide: whether it takes the whole width.
        height: pixels.
    """

    key: str
    title: str
    note: str
    figure: Mapping[str, Any]
    rows: Sequence[Sequence[str]] = field(default_factory=tuple)
    wide: bool = False
    height: int = 300

    @property
    def summary(self) -> str:
        """The text alternative."""
        said = [
            f"{row[0]}: from {row[1]} to {row[2]}, least {row[3]}, largest {row[4]}"
            for row in self.rows
        ]
        return ". ".join([self.title, *said[:8]]) + "."

    @property
    def points(self) -> int:
        """Values in the figure."""
        return sum(_length(trace) for trace in self.figure["data"])


def _length(trace: Mapping[str, Any]) -> int:
    if "z" in trace:
        return sum(len(row) for row in trace["z"])
    return len(trace.get("x", ()))


def text(value: object) -> str:
    """A text of a file for plotly, which would read tags in it."""
    return html.escape(escaped(str(value)), quote=False)[:120]


def number(value: float, *, share: bool = False) -> str:
    """A value for a table."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.1%}" if share else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


# The charts of each section.


def loss_chart(runs: Sequence[ReportRun]) -> Chart | None:
    """The loss, with that of knowing nothing."""
    return _lines(runs, {"loss": "loss"}, meaning_of("loss"), "loss", wide=True, guides="loss")


def accuracy_charts(runs: Sequence[ReportRun]) -> list[Chart]:
    """One chart for each accuracy, with its best value and its dips."""
    labels: dict[str, str] = {}
    for run in runs:
        labels |= {name: label for name, label in run.panels.figures.items() if name in run.series}
    found = []
    for order, (name, label) in enumerate(labels.items()):
        meaning = Meaning(
            f"{label} accuracy",
            "share of the held-out images",
            "A star marks the best value; a triangle a dip of more than two points below the best "
            "before it.",
        )
        chart = _lines(
            runs,
            {name: label},
            meaning,
            f"accuracy-{order}",
            share=True,
            guides=name,
            dips=True,
            wide=order == 0,
        )
        found += [chart] if chart else []
    return found


def schedule_charts(runs: Sequence[ReportRun]) -> list[Chart]:
    """Learning rate, EMA momentum and weight decay."""
    names = ("lr", "ema_momentum", "weight_decay")
    found = [
        _lines(
            runs,
            {name: meaning_of(name).title},
            meaning_of(name),
            name,
            zero=name == "weight_decay",
        )
        for name in names
    ]
    return [chart for chart in found if chart]


def gradient_charts(runs: Sequence[ReportRun]) -> list[Chart]:
    """A heat map of gradient norms for each run, the norms as lines, and the update ratios."""
    found = [_heat_map(run, order, several=len(runs) > 1) for order, run in enumerate(runs)]
    charts = [chart for chart in found if chart]
    for prefix, key in (("gradient_norm/", "norms"), ("update_ratio/", "update-ratio")):
        meaning = GROUPS[prefix]
        chart = _lines(runs, _under(runs, prefix), meaning, key, log=True, wide=True)
        charts += [chart] if chart else []
    return charts


def similarity_charts(runs: Sequence[ReportRun]) -> list[Chart]:
    """Similarities, and the measures that show a collapse."""
    found = []
    for prefix in ("cosine/", "contrast/", "features/"):
        share = prefix == "contrast/"
        key = prefix.strip("/")
        found.append(_lines(runs, _under(runs, prefix), GROUPS[prefix], key, share=share))
    for name in (
        "feature_std",
        "effective_rank",
        "ema_distance",
        "batch_norm_drift",
        "target_entropy",
        "center_norm",
    ):
        names = {name: meaning_of(name).title} | _under(runs, f"{name}/")
        even = {} if name != "feature_std" else _even_spread(runs)
        zero = name == "feature_std"
        found.append(_lines(runs, names, meaning_of(name), name, lines=even, zero=zero))
    return [chart for chart in found if chart]


def _even_spread(runs: Sequence[ReportRun]) -> dict[str, float]:
    """The spread of features that point in all directions alike, where all runs have one width."""
    models = [run.config.get("model") for run in runs]
    widths = {model.get("projection_dim") for model in models if isinstance(model, Mapping)}
    width = widths.pop() if len(widths) == 1 else None
    return {"evenly spread": width**-0.5} if type(width) is int and width > 0 else {}


def speed_charts(runs: Sequence[ReportRun]) -> list[Chart]:
    """Throughput, waiting, the stages of the loader, and where the time of a step went."""
    found = [
        _lines(runs, {"images_per_s": "images/s"}, meaning_of("images_per_s"), "speed", zero=True),
        _lines(
            runs, {"wait_share": "waiting"}, meaning_of("wait_share"), "wait", share=True, zero=True
        ),
        _step_bars(runs),
        _lines(
            runs,
            {f"loader/{name}": label for name, label in LOADER_STAGES.items()},
            GROUPS["loader/"],
            "loader",
            zero=True,
        ),
        *(
            _lines(runs, {name: meaning_of(name).title}, meaning_of(name), key, zero=True)
            for name, key in (("loader/queue_depth", "queue"), ("loader/quarantined", "left-out"))
            if any(run.series[name].values.any() for run in runs if name in run.series)
        ),
    ]
    return [chart for chart in found if chart]


def memory_charts(runs: Sequence[ReportRun]) -> list[Chart]:
    """Every metric about memory."""
    names = [name for name in _names(runs) if name.startswith("memory")]
    found = [
        _lines(runs, {name: spaced(name)}, meaning_of(name), f"memory-{order}", zero=True)
        for order, name in enumerate(names)
    ]
    return [chart for chart in found if chart]


def other_charts(runs: Sequence[ReportRun]) -> list[Chart]:
    """The metrics that no other chart shows."""
    shown = {
        "loss",
        "lr",
        "ema_momentum",
        "weight_decay",
        "images_per_s",
        "wait_share",
        "feature_std",
        "effective_rank",
        "ema_distance",
        "batch_norm_drift",
        "target_entropy",
        "center_norm",
        *(name for run in runs for name in run.panels.figures),
        *(f"loader/{name}" for name in (*LOADER_STAGES, "queue_depth", "quarantined")),
    }
    prefixes = ("cosine/", "contrast/", "features/", "gradient_norm/", "update_ratio/", "memory")
    rest = [
        name
        for name in _names(runs)
        if name not in shown and not name.startswith(prefixes) and name.split("/")[0] not in shown
    ]
    found = [
        _lines(runs, {name: spaced(name)}, meaning_of(name), f"other-{order}")
        for order, name in enumerate(rest[:MOST_REST])
    ]
    return [chart for chart in found if chart]


@dataclass(frozen=True, kw_only=True)
class FeatureMap:
    """Features of images in two dimensions.

    Attributes:
        x: [n], y: [n].
        labels: [n]; -1 where an image has none.
        classes: names by label.
        method: how the dimensions were chosen, for people.
        step: of the encoder.
    """

    x: NDArray[np.float32]
    y: NDArray[np.float32]
    labels: NDArray[np.int64]
    classes: Sequence[str]
    method: str
    step: int


def feature_chart(found: FeatureMap, key: str, name: str) -> Chart:
    """A point for each image, with color and shape of its class."""
    counts = np.bincount(found.labels[found.labels >= 0], minlength=1)
    largest = [int(label) for label in np.argsort(-counts, kind="stable") if counts[label]]
    own = sorted(largest[: 2 * COLORS])
    traces: list[dict[str, Any]] = []
    for order, label in enumerate(own):
        traces.append(
            _points(
                found,
                found.labels == label,
                text(found.classes[label] if label < len(found.classes) else f"class {label}"),
                f"@s{order % COLORS}",
                SYMBOLS[order // COLORS * 4 + order % 4],
            )
        )
    rest = ~np.isin(found.labels, own)
    if rest.any():
        traces.append(_points(found, rest, "other" if own else "images", "@muted", "circle"))
    layout = _layout()
    bare = {"showgrid": False, "showticklabels": False, "showline": False, "title": {"text": ""}}
    layout["xaxis"] |= bare
    layout["yaxis"] |= bare
    layout["margin"] = {"l": 8, "r": 8, "t": 12, "b": 8}
    layout |= {"hovermode": "closest", "showlegend": True}
    rows = [(trace["name"], f"{len(trace['x'])} images", "", "", "") for trace in traces]
    return Chart(
        key=key,
        title=f"Features in two dimensions by {found.method}{_of(name)}",
        note=f"{len(found.x):,} images at step {found.step:,}; color and shape are the class. Groups "
        "of one class are what a good encoder makes; distances between groups say little.",
        figure={"data": traces, "layout": layout},
        rows=rows,
        wide=True,
        height=420,
    )


def _points(
    found: FeatureMap, which: NDArray[np.bool_], name: str, color: str, symbol: str
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": _rounded(found.x[which], 4),
        "y": _rounded(found.y[which], 4),
        "marker": {"size": 6, "color": color, "symbol": symbol, "opacity": 0.8},
        "hovertemplate": "%{fullData.name}<extra></extra>",
    }


# The parts of charts.


def _names(runs: Sequence[ReportRun]) -> list[str]:
    """Metrics of any run, in the order of the files."""
    return list(dict.fromkeys(name for run in runs for name in run.series))


def _under(runs: Sequence[ReportRun], prefix: str) -> dict[str, str]:
    """Metrics with a prefix, and what follows it, as words."""
    names = [name for name in _names(runs) if name.startswith(prefix)]
    return {name: spaced(name.removeprefix(prefix)) for name in names}


def _of(name: str) -> str:
    return f" ({name})" if name else ""


def _lines(
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
    wanted = [
        (order, run, name, label)
        for order, run in enumerate(runs)
        for name, label in metrics.items()
        if name in run.series or name in run.lost
    ]
    wanted = wanted[: MOST_LINES * max(1, len(runs))]
    present = list(dict.fromkeys(name for _, _, name, _ in wanted))
    if not wanted:
        return None
    buckets = max(80, BUCKETS // max(1, -(-len(wanted) // 6)))
    layout = _layout("share" if share else "log" if log else "")
    if zero:
        layout["yaxis"]["rangemode"] = "tozero"
    traces: list[dict[str, Any]] = []
    rows: list[Sequence[str]] = []
    for order, run, name, label in wanted:
        alone = len(runs) == 1
        place = present.index(name)
        shown = label if alone else run.name if len(present) == 1 else f"{run.name}: {label}"
        style = {
            "color": f"@s{(place if alone else order) % COLORS}",
            "dash": DASHES[(place // COLORS if alone else place) % len(DASHES)],
        }
        series = run.series.get(name)
        if series is not None:
            if log:
                series = Series(series.steps[series.values > 0], series.values[series.values > 0])
            if len(series.steps):
                traces += _curve(series, text(shown), style, buckets, share=share)
                rows.append(_row(shown, run.series[name], share=share))
            if dips and len(series.steps):
                traces += _dips(series, style["color"], text(shown))
        lost = run.lost.get(name)
        if lost is not None and len(lost):
            traces.append(_lost(lost, series, style["color"]))
            rows.append((f"{shown}, not finite", f"step {lost[0]:,}", f"step {lost[-1]:,}", "", ""))
    if not traces:
        return None
    known = {
        name: value
        for run in runs
        for name, value in run.panels.lines.get(guides, {}).items()
        if math.isfinite(value)
    }
    drawn = [run.series[name] for _, run, name, _ in wanted if name in run.series]
    near, far = _near_and_far(known | dict(lines or {}), drawn, zero=zero)
    layout["shapes"], layout["annotations"] = _guides(near, share=share)
    layout["shapes"] += [
        _upright(event.step) for run in runs for event in run.events if event.name == "rolled_back"
    ][:MOST_MARKS]
    layout["showlegend"] = sum(trace.get("showlegend", True) for trace in traces) > 1
    unit = f" ({meaning.unit})" if meaning.unit else ""
    beyond = [f"{name.capitalize()}: {number(value, share=share)}." for name, value in far.items()]
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
        "y": _rounded(few.values),
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
            "y": _rounded(middle.values),
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
        "y": _rounded(np.array(values, np.float64)),
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


def _guides(
    values: Mapping[str, float], *, share: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Lines of values to compare with, and their names."""
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


def _row(name: str, series: Series, *, share: bool) -> Sequence[str]:
    """The numbers of a series for a table."""
    low, high = int(np.argmin(series.values)), int(np.argmax(series.values))

    def at(place: int) -> str:
        return f"{number(float(series.values[place]), share=share)} at step {series.steps[place]:,}"

    return (name, at(0), at(len(series.steps) - 1), at(low), at(high))


def _heat_map(run: ReportRun, order: int, *, several: bool) -> Chart | None:
    """Gradient norms by place and step relative to the median of the place, with events."""
    norms = dict(list(run.prefixed("gradient_norm/").items())[:MOST_ROWS])
    lost = {
        name.removeprefix("gradient_norm/"): steps
        for name, steps in run.lost.items()
        if name.startswith("gradient_norm/")
    }
    if not norms:
        return None
    first = min(int(series.steps[0]) for series in norms.values())
    last = max(int(series.steps[-1]) for series in norms.values())
    logged = max(len(series.steps) for series in norms.values())
    parts = max(1, min(HEAT_PARTS, logged, last - first + 1))
    edges = np.linspace(first, last + 1, parts + 1)
    middles = (edges[:-1] + edges[1:] - 1) / 2
    rows, colors, values = [], [], []
    table: list[Sequence[str]] = []
    for place, series in norms.items():
        peaks = np.full(parts, -np.inf)
        part = np.clip(np.searchsorted(edges, series.steps, side="right") - 1, 0, parts - 1)
        np.maximum.at(peaks, part, series.values)
        peaks[~np.isfinite(peaks)] = np.nan
        middle = float(np.median(series.values))
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.log10(peaks / middle) if middle > 0 else np.zeros(parts)
        rows.append(text(spaced(place)))
        colors.append(_rounded(np.where(np.isfinite(ratio), ratio, np.nan), 3))
        values.append(_rounded(peaks))
        table.append(_row(spaced(place), series, share=False))
    finite = [value for row in colors for value in row if value is not None]
    top = max(1.0, *finite) if finite else 1.0
    ticks = list(range(-1, int(top) + 1))
    heat = {
        "type": "heatmap",
        "x": _rounded(middles, 8),
        "y": rows,
        "z": colors,
        "customdata": values,
        "zmin": -1,
        "zmax": top,
        "colorscale": "Cividis",
        "hovertemplate": "%{y}, step %{x:,.0f}: norm %{customdata:.3~g}<extra></extra>",
        "colorbar": {
            "title": {"text": "x median", "side": "top"},
            "orientation": "h",
            "thickness": 10,
            "len": 0.7,
            "y": -0.2,
            "yanchor": "top",
            "x": 0.5,
            "tickvals": ticks,
            "ticktext": [f"{10**tick:,g}" for tick in ticks],
            "tickangle": 0,
            "outlinewidth": 0,
        },
    }
    layout = _layout()
    layout["yaxis"] |= {
        "type": "category",
        "autorange": "reversed",
        "showgrid": False,
        "title": {"text": ""},
    }
    layout |= {"hovermode": "closest", "showlegend": True}
    layout["margin"]["b"] = 84
    marks = _events(run, set(norms), lost)
    return Chart(
        key=f"gradients-{order}",
        title=f"Gradient norms by layer{_of(run.name) if several else ''} (times the median of the layer)",
        note="Each cell is the largest norm of its steps. Instability begins as a bright column in "
        "the first layers, some steps before the last ones. The marks are events.",
        figure={"data": [heat, *marks], "layout": layout},
        rows=table,
        wide=True,
        height=210 + 30 * (len(rows) + any(mark["y"] and mark["y"][0] == "run" for mark in marks)),
    )


_EVENT_MARKS = {
    "gradient_spike": ("triangle-up", "gradient spike"),
    "gradient_not_finite": ("x", "gradient not finite"),
    "rolled_back": ("triangle-left", "rolled back"),
}
"""Symbols of events; of others a diamond."""


def _events(
    run: ReportRun, places: set[str], lost: Mapping[str, NDArray[np.int64]]
) -> list[dict[str, Any]]:
    """The events of a run as marks in its heat map: in the row of their layer, or in one of the run."""
    events = list(run.events)
    known = {(event.step, event.layer) for event in events}
    for place, steps in lost.items():
        events += [
            Event(step, "gradient_not_finite", place, None, "gradient norm is not finite")
            for step in steps[:MOST_MARKS].tolist()
            if (step, place) not in known
        ]
    by_name: dict[str, list[Event]] = {}
    for event in events:
        by_name.setdefault(event.name, []).append(event)
    traces = []
    for order, (name, found) in enumerate(list(by_name.items())[:MOST_LINES]):
        symbol, label = _EVENT_MARKS.get(name, ("diamond", spaced(name)))
        found = sorted(found, key=lambda event: -(event.size or math.inf))[:MOST_MARKS]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": text(label),
                "x": [event.step for event in found],
                "y": [
                    text(spaced(event.layer)) if event.layer in places and event.layer else "run"
                    for event in found
                ],
                "text": [text(event.text or label) for event in found],
                "marker": {
                    "symbol": symbol,
                    "size": 10,
                    "color": "@bad" if symbol != "diamond" else f"@s{order % COLORS}",
                    "line": {"color": "#FFFFFF", "width": 1.5},
                },
                "hovertemplate": "step %{x:,d}: %{text}<extra></extra>",
            }
        )
    return traces


def step_times(run: ReportRun) -> dict[str, float] | None:
    """Milliseconds of the median step, waiting and training; None if they are unknown."""
    batch = run.config.get("global_batch_size")
    speed, wait = run.series.get("images_per_s"), run.series.get("wait_share")
    if type(batch) is not int or batch < 1 or speed is None:
        return None
    rate = float(np.median(speed.values))
    if rate <= 0:
        return None
    whole = 1000 * batch / rate
    waited = float(np.mean(wait.values)) if wait is not None else 0.0
    return {"training": whole * (1 - waited), "waiting for data": whole * waited}


def _step_bars(runs: Sequence[ReportRun]) -> Chart | None:
    """Where the time of a step went: training and waiting, and beside it the loader's stages."""
    parts: dict[str, dict[str, float]] = {}
    for run in runs:
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        times = step_times(run)
        if times is None:
            continue
        parts[f"{prefix}step"] = times
        stages = {
            label: float(np.median(run.series[f"loader/{name}"].values))
            for name, label in LOADER_STAGES.items()
            if f"loader/{name}" in run.series
        }
        if stages:
            parts[f"{prefix}loader"] = stages
    if not parts:
        return None
    labels = list(dict.fromkeys(label for times in parts.values() for label in times))
    traces = []
    for order, label in enumerate(labels):
        bars = [(bar, times[label]) for bar, times in parts.items() if label in times]
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": text(label),
                "x": _rounded(np.array([value for _, value in bars])),
                "y": [text(bar) for bar, _ in bars],
                "marker": {
                    "color": f"@s{order % COLORS}",
                    "pattern": {"shape": "/" if order >= COLORS else ""},
                },
                "hovertemplate": "%{fullData.name}: %{x:.3~g} ms<extra></extra>",
            }
        )
    layout = _layout()
    layout["xaxis"] |= {"title": {"text": "ms per step"}, "rangemode": "tozero", "tickformat": ""}
    layout["yaxis"] |= {"type": "category", "autorange": "reversed", "showgrid": False}
    layout |= {"barmode": "stack", "hovermode": "closest", "showlegend": True}
    layout["legend"] |= {"traceorder": "normal"}
    rows = [
        (f"{bar}: {label}", f"{number(value)} ms", "", "", "")
        for bar, times in parts.items()
        for label, value in times.items()
    ]
    return Chart(
        key="step-time",
        title="Where the time of a step went (ms)",
        note="Medians; waiting is a mean. The loader works beside the training: a step waits only for what is not "
        "ready in time.",
        figure={"data": traces, "layout": layout},
        rows=rows,
        height=230 + 40 * len(parts),
    )


def _layout(kind: str = "") -> dict[str, Any]:
    """The layout that all charts share."""
    axis = {
        "gridcolor": "@grid",
        "zeroline": False,
        "linecolor": "@grid",
        "tickcolor": "@grid",
        "automargin": True,
    }
    y: dict[str, Any] = {**axis, "title": {"text": ""}}
    if kind == "share":
        y["tickformat"] = ".3~p"
    elif kind == "log":
        y |= {"type": "log", "dtick": 1, "exponentformat": "power"}
    return {
        "xaxis": {
            **axis,
            "title": {"text": "step", "standoff": 8},
            "tickformat": ",d",
            "nticks": 8,
        },
        "yaxis": y,
        "margin": {"l": 54, "r": 12, "t": 12, "b": 44},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "@ink", "size": 12},
        "hoverlabel": {"bgcolor": "@card", "bordercolor": "@muted", "font": {"color": "@ink"}},
        "hovermode": "x unified",
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    }


def _rounded(values: NDArray[Any], digits: int = 5) -> list[float | None]:
    """Values with so many significant digits; None where they are not finite."""
    return [
        float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in values.tolist()
    ]


def all_points(charts: Iterable[Chart]) -> int:
    """Values in some charts."""
    return sum(chart.points for chart in charts)
