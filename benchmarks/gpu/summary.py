"""The summary at the end: at most eighty lines, faults first, because often
only the end of the output is visible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu import goals
from benchmarks.outcome import FAILED, MARKED, SKIPPED

LINES = 80
WIDTH = 150
KERNELS = 25
"""Of a profile; all are in the line."""


def shown(line: Mapping[str, Any], ceilings: Mapping[str, float], card: str) -> list[str]:
    """A line of results as a few short lines of text."""
    name, status = line["name"], line["status"]
    seconds = f" ({line['seconds']:.0f} s)" if line.get("seconds") is not None else ""
    head = f"{name}: {status}{seconds}" + (f": {line['reason']}" if line.get("reason") else "")
    text = [head, *_body(line)]
    if share := line.get("share"):
        text.append(
            "share of this card's ceilings: "
            + ", ".join(f"{key} {value:.0%}" for key, value in share.items())
        )
    if isinstance(line.get("result"), Mapping) and not line.get("dry"):  # dry runs have no goals
        result = {**line["result"], "share": line.get("share", {})}
        text += [str(outcome) for outcome in goals.outcomes(name, result, card, ceilings)]
    return [(row if i == 0 else f"    {row}")[:WIDTH] for i, row in enumerate(text)]


def _body(line: Mapping[str, Any]) -> list[str]:
    result = line.get("result")
    if not isinstance(result, Mapping):
        return _plain(line)
    parts = (
        {"": result}
        if "speedup" in result
        else {name: part for name, part in result.items() if isinstance(part, Mapping)}
    )
    text = []
    for name, part in parts.items():
        text += [f"{name} {row}".strip() for row in _contest(part)]
    return text


def _plain(line: Mapping[str, Any]) -> list[str]:
    hidden = {
        "name",
        "status",
        "reason",
        "seconds",
        "op",
        "stage",
        "machine",
        "results",
        "gate",
        "errors",
        "time",
        "share",
        "dry",
        "row",
        "case",
    }
    fields = [f"{key} {value}" for key, value in line.items() if key not in hidden]
    return [", ".join(fields)] if fields else []


def _contest(part: Mapping[str, Any]) -> list[str]:
    text = []
    for key, label in (("milliseconds", "GPU ms"), ("wall_ms", "wall ms"), ("host_ms", "host ms")):
        if times := part.get(key):
            text.append(
                f"{label}: " + "  ".join(f"{who} {value:.3f}" for who, value in times.items())
            )
    if rates := part.get("images_per_s"):
        text.append(
            "images/s: " + "  ".join(f"{who} {goals.figure(rates, who):.1f}" for who in rates)
        )
    if memory := part.get("peak_bytes"):
        text.append(
            "peak GB: " + "  ".join(f"{who} {value / 1e9:.2f}" for who, value in memory.items())
        )
    text += [
        f"{key}: {part[key]}"
        for key in ("plan", "launches", "busy_ms", "parts_ms", "first_step_s", "graphs")
        if part.get(key)
    ]
    text += [f"    {kernel}" for kernel in part.get("largest_kernels", [])[:KERNELS]]
    if ratios := part.get("speedup"):
        text.append(
            "speed-up over: "
            + "  ".join(f"{who} {value['median']:.2f}x" for who, value in ratios.items())
        )
    for key in ("failed", "skipped"):
        text += [f"{key} {who}: {why}" for who, why in (part.get(key) or {}).items()]
    return text


def summary(
    lines: Sequence[Mapping[str, Any]],
    stages: Sequence[tuple[str, str, float]],
    ceilings: Mapping[str, float],
    card: str,
) -> list[str]:
    """The end of the output.

    Args:
        lines: all results.
        stages: name, outcome and seconds of each stage.
        ceilings: of the card.
        card: its name.
    """
    shown_stages = [f"{name} {outcome} {seconds:.0f}s" for name, outcome, seconds in stages]
    text = [
        "== stages: " + "  ".join(shown_stages[:6]),
        *("   " + "  ".join(shown_stages[i : i + 6]) for i in (6, 12)),
    ]
    for status in (FAILED, MARKED, SKIPPED):
        these = [line for line in lines if line["status"] == status]
        text += [
            f"{status}: {line['name']}: {line.get('reason', '')}"[:WIDTH] for line in these[:12]
        ]
        text += [f"... and {len(these) - 12} more {status}"] if len(these) > 12 else []
    if ceilings:
        text.append(
            "ceilings: "
            + ", ".join(f"{name} {value}" for name, value in ceilings.items() if name != "shapes")
        )
    body: list[str] = []
    for line in lines:
        if isinstance(line.get("result"), Mapping):
            body += _short(line, ceilings, card)
    room = LINES - len(text) - 1
    if len(body) > room:
        body = [*body[: room - 1], f"... {len(body) - room + 1} more lines in gpu.jsonl"]
    return [row[:WIDTH] for row in (*text, *body)]


def _short(line: Mapping[str, Any], ceilings: Mapping[str, float], card: str) -> list[str]:
    """A figure in two or three lines: times, speed-ups, goals."""
    rows = [row.strip() for row in shown(line, ceilings, card)]
    kept = [
        row for row in rows[1:] if row.startswith(("GPU ms", "images/s", "speed-up", "share", "G"))
    ]
    return [
        f"{line['name']} [{line['status']}] " + (kept[0] if kept else ""),
        *(f"    {row}" for row in kept[1:]),
    ]
