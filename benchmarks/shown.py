"""How a result is shown: tables in Markdown, and charts as data for `benchmarks.plot`.

A case may show its result itself: `table(result)` returns Markdown, `charts(result)` charts. What is
here shows every contest, and any other result as a list of its figures.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COUNTED = ("errors", "plain_errors", "checked", "work", "shape", "roofline", "losses")
"""Parts of a result that are not figures of speed or memory."""


@dataclass(frozen=True, kw_only=True)
class Bars:
    """A bar for each thing.

    Attributes:
        title: what is compared.
        unit: of the values.
        bars: median, low and high by name.
        equal: a value at which nothing is gained, which gets a line; None: no line.
    """

    title: str
    unit: str
    bars: Mapping[str, tuple[float, float, float]]
    equal: float | None = None


@dataclass(frozen=True, kw_only=True)
class Lines:
    """A line for each thing.

    Attributes:
        title: what is compared.
        x: label.
        y: label.
        lines: points by name.
        log: both axes are logarithmic.
    """

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    log: bool = False


Chart = Bars | Lines


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; all columns but the first are aligned to the right, unless their cells are words."""
    numeric = [all(_is_number(row[i]) for row in rows) for i in range(len(head))]
    rules = ["--:" if number and i else "---" for i, number in enumerate(numeric)]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (list(head), rules, *cells))


def _is_number(cell: str) -> bool:
    return not cell or cell[0].isdigit() or cell[0] == "-"


def number(value: float) -> str:
    """Three digits that count, without an exponent where that is readable."""
    if value != value or abs(value) in (float("inf"),):
        return str(value)
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"


def low_high(spread: Mapping[str, float]) -> tuple[float, float]:
    """The ends of a spread: quantiles, or of older lines the smallest and the largest."""
    names = ("q20", "q80") if "q20" in spread else ("smallest", "largest")
    return spread[names[0]], spread[names[1]]


def contests(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The contests of a result by name; "" for the result itself."""
    if "speedup" in result:
        return {"": result}
    parts = {name: part for name, part in result.items() if isinstance(part, Mapping)}
    return {name: part for name, part in parts.items() if "speedup" in part}


def subject_of(part: Mapping[str, Any]) -> str:
    """The contender whose speed-ups are reported; older lines do not name it."""
    others = {*part["speedup"], *(part.get("failed") or {}), *(part.get("skipped") or {})}
    checked = part.get("errors") or part.get("checked") or {}
    left = [name for name in checked if name not in others]
    return str(part.get("subject") or (left[0] if left else "fastmoco"))


def table(result: Mapping[str, Any]) -> str:
    """A result in Markdown."""
    if reason := result.get("skipped_because"):
        return f"Skipped: {reason}."
    parts = contests(result)
    if not parts:
        rows = [(name, number(value)) for name, value in figures(result)]
        return markdown(("figure", "value"), rows)
    found = []
    for name, part in parts.items():
        found += [f"**{name}**"] * bool(name) + [_contest(part)]
    return "\n\n".join(found)


def _contest(part: Mapping[str, Any]) -> str:
    subject = subject_of(part)
    spreads = list(part["speedup"].values())
    ends = "q20 to q80" if not spreads or "q20" in spreads[0] else "smallest to largest"
    measured: dict[str, Mapping[str, float]] = {
        "GPU ms": part.get("milliseconds", {}),
        "images per CPU-second": part.get("median", {}),
    }
    columns = {name: {k: number(v) for k, v in each.items()} for name, each in measured.items()}
    peaks = part.get("peak_bytes") or {}
    columns["peak MB in torch"] = {name: f"{peak / 1e6:,.1f}" for name, peak in peaks.items()}
    columns = {name: values for name, values in columns.items() if values}
    failed, skipped = part.get("failed") or {}, part.get("skipped") or {}
    names = [subject, *part["speedup"], *failed, *skipped]
    rows = []
    for name in dict.fromkeys(names):
        spread = part["speedup"].get(name)
        low, high = low_high(spread) if spread else (0.0, 0.0)
        note = f"failed: {failed[name]}" if name in failed else ""
        note = f"skipped: {skipped[name]}" if name in skipped else note
        rows.append(
            (
                name,
                number(spread["median"]) if spread else "",
                f"{number(low)} to {number(high)}" if spread else "",
                *(values.get(name, "") for values in columns.values()),
                note or ("the subject" if name == subject else ""),
            )
        )
    head = ("contender", f"speed-up of {subject} over it", ends, *columns, "note")
    text = markdown(head, rows)
    if marked := part.get("marked"):
        text += f"\n\nThe check failed: {marked}. There is no speed-up."
    if roofline := part.get("roofline"):
        text += (
            f"\n\n{subject} reaches {roofline['share']:.0%} of the roofline of {roofline['chip']}"
            + (
                f", which was measured in the same run: {roofline['flops_per_s'] / 1e9:.0f} GFLOP "
                f"and {roofline['bytes_per_s'] / 1e9:.0f} GB per CPU-second."
                if "flops_per_s" in roofline
                else "."
            )
        )
    return text


def charts(result: Mapping[str, Any]) -> list[Chart]:
    """The speed-ups of a result's contests."""
    return [
        Bars(
            title=f"{name}: speed-up of {subject_of(part)} over".removeprefix(": "),
            unit="times",
            bars={who: (s["median"], *low_high(s)) for who, s in part["speedup"].items()},
            equal=1.0,
        )
        for name, part in contests(result).items()
        if part["speedup"]
    ]


def figures(result: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of a result by their path, medians of lists; without `COUNTED` parts."""
    for name, value in result.items():
        here = f"{path}.{name}" if path else name
        if name in COUNTED or isinstance(value, bool):
            continue
        if isinstance(value, Mapping) and "median" not in value:
            yield from figures(value, here)
            continue
        value = value["median"] if isinstance(value, Mapping) else value
        if isinstance(value, list) and value and all(isinstance(x, int | float) for x in value):
            value = statistics.median(value)
        if isinstance(value, int | float):
            yield here, float(value)
