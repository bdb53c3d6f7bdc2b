"""The charts of each section of a report, as figures of plotly: plain dictionaries, which the page
draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmoco.run.report.figure import (
    COLORS,
    Chart,
    base_layout,
    in_brackets,
    number,
    rounded,
    text,
)
from fastmoco.run.report.heat_map import heat_map
from fastmoco.run.report.lines import line_chart
from fastmoco.run.report.reading import ReportRun
from fastmoco.run.report.words import GROUPS, Meaning, meaning_of, spaced

MOST_REST = 24
"""Metrics of unknown meaning that get a chart."""
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
MEASURES = (
    "feature_std",
    "effective_rank",
    "ema_distance",
    "batch_norm_drift",
    "target_entropy",
    "center_norm",
)
"""Of collapse and of the distance of the encoders: each has a chart of its own."""


def loss_chart(runs: Sequence[ReportRun]) -> Chart | None:
    """The loss, with that of knowing nothing."""
    return line_chart(runs, {"loss": "loss"}, meaning_of("loss"), "loss", wide=True, guides="loss")


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
        chart = line_chart(
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
        line_chart(
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
    found = [heat_map(run, order, several=len(runs) > 1) for order, run in enumerate(runs)]
    charts = [chart for chart in found if chart]
    for prefix, key in (("gradient_norm/", "norms"), ("update_ratio/", "update-ratio")):
        meaning = GROUPS[prefix]
        chart = line_chart(runs, _under(runs, prefix), meaning, key, log=True, wide=True)
        charts += [chart] if chart else []
    return charts


def similarity_charts(runs: Sequence[ReportRun]) -> list[Chart]:
    """Similarities, and the measures that show a collapse."""
    found = []
    for prefix in ("cosine/", "contrast/", "features/"):
        share = prefix == "contrast/"
        key = prefix.strip("/")
        found.append(line_chart(runs, _under(runs, prefix), GROUPS[prefix], key, share=share))
    for name in MEASURES:
        names = {name: meaning_of(name).title} | _under(runs, f"{name}/")
        even = {} if name != "feature_std" else _even_spread(runs)
        zero = name == "feature_std"
        found.append(line_chart(runs, names, meaning_of(name), name, lines=even, zero=zero))
    return [chart for chart in found if chart]


def _even_spread(runs: Sequence[ReportRun]) -> dict[str, float]:
    """The spread of features that point in all directions alike, where all runs have one width."""
    widths = {run.width for run in runs}
    width = widths.pop() if len(widths) == 1 else None
    return {"evenly spread": width**-0.5} if width is not None else {}


def speed_charts(runs: Sequence[ReportRun]) -> list[Chart]:
    """Throughput, waiting, the stages of the loader, and where the time of a step went."""
    found = [
        line_chart(
            runs, {"images_per_s": "images/s"}, meaning_of("images_per_s"), "speed", zero=True
        ),
        line_chart(
            runs, {"wait_share": "waiting"}, meaning_of("wait_share"), "wait", share=True, zero=True
        ),
        _step_bars(runs),
        line_chart(
            runs,
            {f"loader/{name}": label for name, label in LOADER_STAGES.items()},
            GROUPS["loader/"],
            "loader",
            zero=True,
        ),
        *(
            line_chart(
                runs,
                {name: meaning_of(name).title},
                meaning_of(name),
                key,
                zero=True,
            )
            for name, key in (("loader/queue_depth", "queue"), ("loader/quarantined", "left-out"))
            if any(run.series[name].values.any() for run in runs if name in run.series)
        ),
    ]
    return [chart for chart in found if chart]


def memory_charts(runs: Sequence[ReportRun]) -> list[Chart]:
    """The peaks of memory."""
    names = {
        name: label.removesuffix(" gb").capitalize()
        for name, label in _under(runs, "memory/").items()
    }
    chart = line_chart(runs, names, GROUPS["memory/"], "memory-peaks", zero=True, wide=True)
    return [chart] if chart else []


def other_metrics(runs: Sequence[ReportRun]) -> list[str]:
    """The metrics that no other chart shows."""
    shown = {
        "loss",
        "lr",
        "ema_momentum",
        "weight_decay",
        "images_per_s",
        "wait_share",
        *MEASURES,
        *(name for run in runs for name in run.panels.figures),
        *(f"loader/{name}" for name in (*LOADER_STAGES, "queue_depth", "quarantined")),
    }
    prefixes = ("cosine/", "contrast/", "features/", "gradient_norm/", "update_ratio/", "memory/")
    return [
        name
        for name in _names(runs)
        if name not in shown and not name.startswith(prefixes) and name.split("/")[0] not in shown
    ]


def other_charts(runs: Sequence[ReportRun]) -> list[Chart]:
    """Charts of the first of these metrics."""
    found = [
        line_chart(runs, {name: spaced(name)}, meaning_of(name), f"other-{order}")
        for order, name in enumerate(other_metrics(runs)[:MOST_REST])
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
    layout = base_layout()
    bare = {
        "showgrid": False,
        "showticklabels": False,
        "showline": False,
        "ticks": "",
        "title": {"text": ""},
    }
    layout["xaxis"] |= bare
    layout["yaxis"] |= bare
    layout["margin"] = {"l": 8, "r": 8, "t": 12, "b": 8}
    layout |= {"hovermode": "closest", "showlegend": True}
    rows = [(trace["name"], f"{len(trace['x'])} images", "", "", "") for trace in traces]
    return Chart(
        key=key,
        title=f"Features in two dimensions by {found.method}{in_brackets(name)}",
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
        "x": rounded(found.x[which], 4),
        "y": rounded(found.y[which], 4),
        "marker": {"size": 6, "color": color, "symbol": symbol, "opacity": 0.8},
        "hovertemplate": "%{fullData.name}<extra></extra>",
    }


def _names(runs: Sequence[ReportRun]) -> list[str]:
    """Metrics of any run, in the order of the files; last those that were never finite."""
    found = dict.fromkeys(name for run in runs for name in run.series)
    return list(found | dict.fromkeys(name for run in runs for name in run.lost))


def _under(runs: Sequence[ReportRun], prefix: str) -> dict[str, str]:
    """Metrics with a prefix, and what follows it, as words."""
    names = [name for name in _names(runs) if name.startswith(prefix)]
    return {name: spaced(name.removeprefix(prefix)) for name in names}


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
    parts: list[tuple[str, dict[str, float]]] = []
    for run in runs:
        prefix = f"{run.short}: " if len(runs) > 1 else ""
        times = step_times(run)
        if times is None:
            continue
        parts.append((f"{prefix}step", times))
        stages = {
            label: float(np.median(run.series[f"loader/{name}"].values))
            for name, label in LOADER_STAGES.items()
            if f"loader/{name}" in run.series
        }
        if stages:
            parts.append((f"{prefix}loader", stages))
    if not parts:
        return None
    labels = list(dict.fromkeys(label for _, times in parts for label in times))
    traces = []
    for order, label in enumerate(labels):
        bars = [(row, times[label]) for row, (_, times) in enumerate(parts) if label in times]
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": text(label),
                "x": rounded(np.array([value for _, value in bars])),
                "y": [row for row, _ in bars],
                "marker": {
                    "color": f"@s{order % COLORS}",
                    "pattern": {"shape": "/" if order >= COLORS else ""},
                },
                "hovertemplate": "%{fullData.name}: %{x:.3~g} ms<extra></extra>",
            }
        )
    layout = base_layout()
    layout["xaxis"] |= {"title": {"text": "ms per step"}, "rangemode": "tozero", "tickformat": ""}
    layout["yaxis"] |= {
        "tickvals": list(range(len(parts))),
        "ticktext": [text(bar) for bar, _ in parts],
        "autorange": "reversed",
        "showgrid": False,
    }
    layout |= {"barmode": "stack", "hovermode": "closest", "showlegend": True}
    layout["legend"] |= {"traceorder": "normal"}
    rows = [
        (f"{bar}: {label}", f"{number(value)} ms", "", "", "")
        for bar, times in parts
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
