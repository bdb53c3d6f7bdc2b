"""Gradient norms by layer over time as a heat map, with the events of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmoco.run.events import Event
from fastmoco.run.report.figure import (
    COLORS,
    MOST_LINES,
    MOST_MARKS,
    Chart,
    base_layout,
    in_brackets,
    rounded,
    table_row,
    text,
)
from fastmoco.run.report.reading import ReportRun
from fastmoco.run.report.words import spaced

HEAT_PARTS = 240
"""Columns of a heat map."""
LOWEST, HIGHEST = -1, 4
"""Powers of ten of the median between which colors differ; what is beyond has the color of the end."""
MOST_ROWS = 64
"""Rows of a heat map."""
_EVENT_MARKS = {
    "gradient_spike": ("triangle-up", "gradient spike"),
    "gradient_not_finite": ("x", "gradient not finite"),
    "rolled_back": ("triangle-left", "rolled back"),
}
"""Symbols of events; of others a diamond."""


def heat_map(run: ReportRun, order: int, *, several: bool) -> Chart | None:
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
        with np.errstate(divide="ignore"):
            # A quotient of the norms may overflow.
            ratio = np.log10(peaks) - math.log10(middle) if middle > 0 else 0 * peaks
        ratio = ratio.clip(LOWEST, HIGHEST)
        rows.append(text(spaced(place)))
        colors.append(rounded(ratio, 3))
        values.append(rounded(peaks))
        table.append(table_row(spaced(place), series, share=False))
    finite = [value for row in colors for value in row if value is not None]
    top = max(1.0, *finite) if finite else 1.0
    ticks = list(range(LOWEST, int(top) + 1))
    heat = {
        "type": "heatmap",
        "x": rounded(middles, 8),
        "y": rows,
        "z": colors,
        "customdata": values,
        "zmin": LOWEST,
        "zmax": top,
        "colorscale": "Cividis",
        "hovertemplate": "%{y}, step %{x:,.0f}: norm %{customdata:.3~g}<extra></extra>",
        "colorbar": {
            "orientation": "h",
            "thickness": 10,
            "len": 0.7,
            "y": -0.2,
            "yanchor": "top",
            "x": 0.5,
            "tickvals": ticks,
            "ticktext": [f"{10**tick:,g} x" for tick in ticks],
            "tickangle": 0,
            "outlinewidth": 0,
        },
    }
    layout = base_layout()
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
        title=f"Gradient norms by layer{in_brackets(run.short) if several else ''} (times the median of the layer)",
        note="Each cell is the largest norm of its steps. Instability begins as a bright column in "
        "the first layers, some steps before the last ones. The marks are events.",
        figure={"data": [heat, *marks], "layout": layout},
        rows=table,
        wide=True,
        height=210 + 30 * (len(rows) + any(mark["y"] and mark["y"][0] == "run" for mark in marks)),
    )


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
