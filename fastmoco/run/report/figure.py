"""What all charts of a report share: the form, colors by name, texts, numbers and the layout.

Colors are names such as `@s0`, which the page replaces by those of its light or dark theme. Texts
are escaped, because plotly reads tags in them.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmoco.run.metrics_file import Series
from fastmoco_pipelines.text import escaped, without_secrets

MOST_MARKS = 200
"""Events that are marked in a chart; of more, the largest."""
MOST_LINES = 12
"""Lines of a chart."""
COLORS = 7
"""Colors of the palette, `@s0` to `@s6`."""
LONGEST_TEXT = 120
"""Characters of a text in a chart."""


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
    return html.escape(shown(value, LONGEST_TEXT), quote=False)


def shown(value: object, most: int) -> str:
    """A text of a file for people: printable, without passwords, and of at most so many characters."""
    # Cut first: a line of a file may have a megabyte.
    said = without_secrets(escaped(str(value)[: 4 * most]))
    return said if len(said) <= most else f"{said[: most - 1]}…"


def number(value: float, *, share: bool = False) -> str:
    """A value for a table."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.1%}" if share else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def in_brackets(name: str) -> str:
    """The name of a run behind a title, if it needs one."""
    return f" ({name})" if name else ""


def table_row(name: str, series: Series, *, share: bool) -> Sequence[str]:
    """The numbers of a series for a table."""
    low, high = int(np.argmin(series.values)), int(np.argmax(series.values))

    def at(place: int) -> str:
        return f"{number(float(series.values[place]), share=share)} at step {series.steps[place]:,}"

    return (name, at(0), at(len(series.steps) - 1), at(low), at(high))


def base_layout(kind: str = "") -> dict[str, Any]:
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


def rounded(values: NDArray[Any], digits: int = 5) -> list[float | None]:
    """Values with so many significant digits; None where they are not finite."""
    return [
        float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in values.tolist()
    ]
