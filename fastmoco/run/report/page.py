"""The page: one file of HTML with the charts, pictures and tables of some runs. It needs no network.

Every text goes through a template that escapes it. The library of the charts and their data are
compressed; the page inflates them. A policy in the page refuses every request and every script that
is not its own.
"""

from __future__ import annotations

import base64
import datetime
import gzip
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from fastmoco.run.report import charts as chart
from fastmoco.run.report.figure import Chart, number, shown
from fastmoco.run.report.health import Health, health_of
from fastmoco.run.report.pictures import Extras, Table
from fastmoco.run.report.reading import ReportRun
from fastmoco.run.report.words import spaced
from fastmoco_pipelines.files.whole import write_file
from fastmoco_pipelines.text import spoken

MOST_EVENTS = 200
"""Events in the table of a run."""
MOST_ROWS = 1000
"""Rows of a table."""
LONGEST_CELL = 1000
"""Characters of a text on the page."""
SYMBOLS = {"healthy": "✓", "look at it": "▲", "not healthy": "✕", "too early": "…"}
CLASSES = {"healthy": "good", "look at it": "odd", "not healthy": "bad", "too early": "early"}


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page.

    Attributes:
        key: its anchor.
        title: its heading.
        short: the same in the list of sections.
        charts: drawn first.
        said: sentences below them.
        none: what is said where there is nothing else.
    """

    key: str
    title: str
    short: str
    charts: Sequence[Chart] = ()
    said: Sequence[str] = ()
    none: str = ""


def write_report(
    runs: Sequence[ReportRun],
    extras: Sequence[Extras],
    out: Path,
    *,
    refresh_s: int = 0,
) -> Path:
    """Write the report of some runs, whole or not at all.

    Args:
        runs: at least one.
        extras: of each run.
        out: the file; its folder is created.
        refresh_s: seconds after which an open page loads itself again; 0: never.

    Returns:
        `out`.

    Raises:
        ImportError: if plotly or Jinja2 is not installed.
        OSError: if the file cannot be written.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    return write_file(out, render(runs, extras, refresh_s=refresh_s).encode(), mode=0o600)


def render(runs: Sequence[ReportRun], extras: Sequence[Extras], *, refresh_s: int = 0) -> str:
    """The page of some runs as text."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    sections = _sections(runs, extras)
    figures = {
        one.key: {"figure": one.figure, "points": one.points}
        for section in sections
        for one in section.charts
    }
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["shown"] = lambda value: shown(value, LONGEST_CELL)
    template = environment.from_string(_file("page.html"))
    now = datetime.datetime.now().astimezone()
    return template.render(
        title="fastmoco: " + ", ".join(run.name for run in runs[:4]),
        made=now.strftime("%Y-%m-%d %H:%M %Z"),
        runs=[_card(run) for run in runs],
        overview=_overview(runs) if len(runs) > 1 else None,
        differing=_differing(runs) if len(runs) > 1 else None,
        sections=sections,
        extras=list(zip(runs, extras, strict=True)),
        events=[_event_table(run) for run in runs],
        configs=[_flat(run.config) for run in runs],
        several=len(runs) > 1,
        most_rows=MOST_ROWS,
        refresh_s=refresh_s,
        nonce=secrets.token_urlsafe(18),
        style=Markup(_file("page.css")),  # noqa: S704 - a file of this package
        script=Markup(_file("page.js")),  # noqa: S704 - a file of this package
        library=_library(),
        figures=_packed(json.dumps(figures, allow_nan=False, separators=(",", ":")).encode()),
    )


@lru_cache(maxsize=1)
def _library() -> str:
    """plotly's library, compressed, as base64."""
    from plotly.offline import get_plotlyjs

    return _packed(get_plotlyjs().encode(), level=9)


def _packed(content: bytes, level: int = 6) -> str:
    return base64.b64encode(gzip.compress(content, level, mtime=0)).decode()


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _sections(runs: Sequence[ReportRun], extras: Sequence[Extras]) -> list[Section]:
    several = len(runs) > 1
    loss = chart.loss_chart(runs)
    maps = [
        chart.feature_chart(one.features, f"features-{order}", run.short if several else "")
        for order, (run, one) in enumerate(zip(runs, extras, strict=True))
        if one.features is not None
    ]

    def said(kind: str) -> list[str]:
        found = []
        for run, one in zip(runs, extras, strict=True):
            prefix = f"{run.name}: " if several else ""
            found += [prefix + sentence for sentence in getattr(one, kind)]
        return found

    absent = [
        f"{run.name}: {one.no_features}" if several else one.no_features
        for run, one in zip(runs, extras, strict=True)
        if one.features is None
    ]
    sections = [
        Section(
            key="training",
            title="Loss and accuracy",
            short="Accuracy",
            charts=[*([loss] if loss else []), *chart.accuracy_charts(runs)],
            none="Neither a loss nor an accuracy is recorded yet.",
        ),
        Section(
            key="schedules",
            title="Learning rate and EMA momentum",
            short="Schedules",
            charts=chart.schedule_charts(runs),
            said=_without_momentum(runs),
            none="No schedule is recorded yet.",
        ),
        Section(
            key="gradients",
            title="Gradients by layer",
            short="Gradients",
            charts=chart.gradient_charts(runs),
            none="No gradient norm is recorded.",
        ),
        Section(
            key="similarity",
            title="Similarity and collapse",
            short="Similarity",
            charts=chart.similarity_charts(runs),
            none="This method records no similarity and no measure of collapse.",
        ),
        Section(
            key="speed",
            title="Throughput, and where the time went",
            short="Speed",
            charts=chart.speed_charts(runs),
            said=said("speed"),
            none="No speed is recorded yet.",
        ),
        Section(
            key="memory",
            title="Memory",
            short="Memory",
            charts=chart.memory_charts(runs),
            said=said("memory"),
            none="No memory is recorded.",
        ),
        Section(
            key="features",
            title="Features by class",
            short="Features",
            charts=maps,
            said=absent,
        ),
    ]
    others = chart.other_charts(runs)
    if others:
        left = len(chart.other_metrics(runs)) - len(others)
        sections.append(
            Section(
                key="others",
                title="Other metrics",
                short="Others",
                charts=others,
                said=[f"{left:,} more are in metrics.jsonl alone."] if left else [],
            )
        )
    return sections


def _without_momentum(runs: Sequence[ReportRun]) -> list[str]:
    """A sentence about runs whose method has no momentum encoder."""
    names = [run.name for run in runs if "lr" in run.series and "ema_momentum" not in run.series]
    if not names:
        return []
    return [
        f"{', '.join(names)}: this method has no momentum encoder, so there is no EMA momentum."
    ]


def _card(run: ReportRun) -> dict[str, Any]:
    """The headline of a run."""
    health = health_of(run)
    return {
        "name": run.name,
        "recipe": run.config.get("recipe") or "recipe unknown",
        "state": run.state,
        "verdict": health.verdict,
        "symbol": SYMBOLS[health.verdict],
        "class": CLASSES[health.verdict],
        "reasons": health.reasons,
        "figures": _figures(run),
        "notes": run.notes,
    }


def _figures(run: ReportRun) -> list[tuple[str, str, str]]:
    """The large numbers of a run: what, value, and a word beside it."""
    found = []
    for name, label in run.panels.figures.items():
        series = run.series.get(name)
        if series is not None:
            best = int(np.argmax(series.values))
            beside = f"best {series.values[best]:.1%} at step {series.steps[best]:,}"
            found.append((label, f"{series.values[-1]:.1%}", beside))
    if not found:
        found.append(("kNN", "-", "not measured"))
    speed = run.series.get("images_per_s")
    if speed is not None:
        last = f"last {number(float(speed.values[-1]))}"
        found.append(("images/s", number(float(np.median(speed.values))), f"median; {last}"))
    loss = run.series.get("loss")
    if loss is not None:
        found.append(("loss", f"{loss.values[-1]:.3f}", f"lowest {loss.values.min():.3f}"))
    total = run.total_steps
    done = f"of {total:,}, {run.last_step / total:.0%}" if total else "logged"
    found.append(("step", f"{run.last_step:,}", done))
    if run.times is not None and len(run.times.values) > 1:
        seconds = float(run.times.values.max() - run.times.values.min())
        found.append(("time", spoken(seconds), "from first to last line"))
    return found


def _overview(runs: Sequence[ReportRun]) -> Table:
    """The headline of all runs, a row for each."""
    columns = list(dict.fromkeys(what for run in runs for what, _, _ in _figures(run)))
    rows = []
    for run in runs:
        values = {what: f"{value} ({beside})" for what, value, beside in _figures(run)}
        health = health_of(run)
        verdict = f"{SYMBOLS[health.verdict]} {health.verdict}"
        rows.append([run.name, verdict, run.state, *(values.get(what, "-") for what in columns)])
    return Table(head=["run", "health", "state", *columns], rows=rows)


def _differing(runs: Sequence[ReportRun]) -> Table:
    """The fields of the configs that are not the same in all runs."""
    flats = [dict(_flat(run.config)) for run in runs]
    names = list(dict.fromkeys(name for flat in flats for name in flat))
    rows = [
        [name, *(flat.get(name, "-") for flat in flats)]
        for name in names
        if len({flat.get(name) for flat in flats}) > 1
    ]
    why = "" if rows else "All runs have the same configuration."
    return Table(head=["field", *(run.name for run in runs)], rows=rows, why=why)


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A config as dotted names and values."""
    found: list[tuple[str, str]] = []
    for name, value in config.items():
        if isinstance(value, Mapping) and len(prefix) < 200:
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", json.dumps(value, ensure_ascii=False)))
    return found


def flat_config(config: Mapping[str, Any]) -> dict[str, str]:
    """A config of JSON as dotted names and values of JSON."""
    return dict(_flat(config))


def _event_table(run: ReportRun) -> Table:
    """The events of a run; of many the first and the last."""
    events = list(run.events)
    note = ""
    if len(events) > MOST_EVENTS:
        half = MOST_EVENTS // 2
        note = f"The first and the last {half} of {len(events):,} events."
        events = [*events[:half], *events[-half:]]
    rows = [
        [
            f"{event.step:,}",
            spaced(event.name),
            spaced(event.layer) if event.layer else "-",
            "-" if event.size is None else number(event.size),
            event.text,
        ]
        for event in events
    ]
    why = "" if rows else "No event is recorded."
    return Table(
        head=["step", "event", "layer", "size", "what was noticed"], rows=rows, note=note, why=why
    )


__all__ = ["Health", "flat_config", "render", "write_report"]
