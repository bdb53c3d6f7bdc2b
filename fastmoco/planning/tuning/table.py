"""A search as text: a table, a line for each measurement, and JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fastmoco.planning.tuning.measure import Measurement
from fastmoco.planning.tuning.search import Criterion, Result, Row
from fastmoco.planning.tuning.settings import Settings
from fastmoco.planning.tuning.space import Skipped

HEADING = ("settings", "round", "img/s", "img/CPU-s", "GiB", "ratio", "")
"""Columns of a table; the last one has what became of the settings."""


def cells(row: Row) -> tuple[str, ...]:
    """A row, column by column."""
    found = row.measured
    figures = ("", "", "")
    if found is not None:
        peak = f"{found.peak_bytes / 2**30:.2f}"
        figures = (_figure(found.images_per_s), _figure(found.images_per_cpu_s), peak)
    ratio = f"{row.ratio:.3f}" if row.ratio is not None else ""
    shown = "" if row.state in ("waiting", "measured") else row.state
    state = ": ".join(part for part in (shown, row.reason) if part)
    return (str(row.settings), str(row.round or ""), *figures, ratio, state)


def line(row: Row) -> str:
    """A measurement in a line, for a log."""
    name, number, wall, cpu, peak, ratio, state = cells(row)
    parts = [f"round {number}"] if number else []
    parts += [f"{wall} img/s, {cpu} img/CPU-s, {peak} GiB"] if wall else []
    parts += [f"ratio {ratio}"] if ratio and row.candidate is not None else []
    parts += [state] if state else []
    return f"{name}: {', '.join(parts)}"


def table(rows: Sequence[Row], skipped: Sequence[Skipped] = ()) -> str:
    """All rows as a Markdown table, the fastest first, and what was skipped."""
    ranked = sorted(rows, key=_rank)
    body = [HEADING, tuple("---" for _ in HEADING), *(cells(row) for row in ranked)]
    lines = [f"| {' | '.join(line)} |" for line in body]
    lines += [f"skipped: {one.what} ({one.reason})" for one in skipped]
    return "\n".join(lines)


def _rank(row: Row) -> tuple[int, float]:
    """The winner, then what may win, then by ratio."""
    order = {"winner": 0, "measured": 1, "waiting": 2, "out": 1}
    return order.get(row.state, 3), -(row.ratio or 0.0)


def spread(values: Sequence[float], digits: str = ".3f") -> str:
    """Median, smallest and largest: `1.052 (1.031 to 1.078)`."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{digits}} ({low:{digits}} to {high:{digits}})"


def summary(result: Result) -> list[str]:
    """The last comparison in lines."""
    if not result.pairs:
        return ["the defaults are the fastest settings that were measured"]
    by, digits = UNITS[result.criterion], ".0f"
    mine = [winner.rate(result.criterion) for _, winner in result.pairs]
    default = [other.rate(result.criterion) for other, _ in result.pairs]
    if max(default) < 100:
        digits = ".2f"
    other: Criterion = "cpu" if result.criterion == "wall" else "wall"
    return [
        f"{by}, {len(mine)} pairs of measurements in turn, {result.steps} steps each:",
        f"  with these settings  {spread(mine, digits)}",
        f"  with the defaults    {spread(default, digits)}",
        f"  ratio                {spread(result.ratios())}",
        f"  ratio of {UNITS[other]}: {spread(result.ratios(other))}",
    ]


UNITS: dict[Criterion, str] = {"wall": "images per second", "cpu": "images per CPU-second"}
"""What is compared, by criterion."""


def to_json(result: Result) -> dict[str, Any]:
    """A result for programs."""
    return {
        "criterion": UNITS[result.criterion],
        "chosen": settings_json(result.chosen),
        "ratios": result.ratios(),
        "pairs": [[_figures(other), _figures(mine)] for other, mine in result.pairs],
        "steps": result.steps,
        "seconds": result.seconds,
        "others_share": result.others_share,
        "rows": [_row_json(row) for row in result.rows],
        "skipped": [asdict(one) for one in result.skipped],
        "notes": result.notes,
        "device": result.default.details.get("device"),
        "precision": result.default.details.get("precision"),
        "versions": result.default.details.get("versions"),
    }


def settings_json(settings: Settings) -> dict[str, Any]:
    """Settings for programs."""
    return {
        "options": dict(settings.options),
        "variables": dict(settings.variables),
        "prefix": list(settings.prefix),
    }


def _row_json(row: Row) -> dict[str, Any]:
    group = row.candidate.group if row.candidate is not None else None
    return {
        "settings": settings_json(row.settings),
        "group": group,
        "state": row.state,
        "reason": row.reason,
        "round": row.round,
        "ratio": row.ratio,
        "measured": _figures(row.measured) if row.measured is not None else None,
    }


def _figures(found: Measurement) -> dict[str, Any]:
    return {
        "images_per_s": found.images_per_s,
        "images_per_cpu_s": found.images_per_cpu_s,
        "peak_bytes": found.peak_bytes,
        "others_share": found.others_share,
        "losses": list(found.losses),
        "gradient_norms": list(found.gradient_norms),
    }


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
