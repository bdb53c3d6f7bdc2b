"""The counts of a chaos run as a table, and the page that contains it."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks.chaos.plan import BEFORE, LIMITS
from benchmarks.chaos.processes import ROOT
from benchmarks.chaos.story import Told

BEGIN, END = "<!-- begin of make chaos -->", "<!-- end of make chaos -->"
"""Around the table in a page."""
_HEAD = (
    *("", "events", "runs", "ended bit-equal", "silent differences", "refused by name"),
    *("processes left", "hangs above 60 s"),
)

_HEAD_OF_KINDS = ("event", "times", "the start ended with 0", "75", "1 or 2", "a signal")


def table_of(told: list[Told], seed: int, *, seconds: float) -> str:
    """The counts by mode and by kind of event, with commit and date."""
    events = sum(len(one.happened) for one in told)
    lines = [
        f"{events} events, seed {seed}, {seconds / 60:.0f} min; commit {_commit()}, "
        f"{time.strftime('%Y-%m-%d', time.gmtime())}. Rows of the metrics that an event damaged: "
        f"{sum(len(one.excused) for one in told)}.",
        "",
        _row(_HEAD),
        _row(["---"] * len(_HEAD)),
    ]
    modes = dict.fromkeys(one.story.mode for one in told)
    lines += [_counts(mode, [one for one in told if one.story.mode == mode]) for mode in modes]
    lines += [_counts("all", told), "", _row(_HEAD_OF_KINDS), _row(["---"] * len(_HEAD_OF_KINDS))]
    outcomes: dict[str, list[str]] = {}
    for one in (one for story in told for one in story.happened):
        outcomes.setdefault(_kind(one.event.what), []).append(one.outcome)
    lines += [_outcomes(kind, found) for kind, found in sorted(outcomes.items())]
    return "\n".join(lines)


def write_table(page: Path, table: str) -> None:
    """Put a table in its place in a page.

    Raises:
        ValueError: if the page has no such place.
    """
    text = page.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page}: has no lines {BEGIN} and {END}: add them")
    page.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")


def read_table(page: Path) -> str:
    """The table in a page; empty without one."""
    found = re.search(f"{re.escape(BEGIN)}\n(.*?)\n{re.escape(END)}", page.read_text(), re.DOTALL)
    return found[1] if found else ""


def _counts(name: str, told: list[Told]) -> str:
    runs = sum(one.runs + bool(one.stuck) for one in told)
    same = runs - sum(bool(one.silent or one.stuck) for one in told)
    numbers = [
        sum(len(one.happened) for one in told),
        runs,
        same,
        sum(bool(one.silent) for one in told),
        sum(one.refusals for one in told),
        sum(one.left for one in told),
        sum(one.hangs for one in told),
    ]
    return _row([name, *map(str, numbers)])


def _outcomes(kind: str, found: list[str]) -> str:
    starts = {
        "0": ("finished",),
        "75": ("code 75",),
        "1 or 2": ("code 1", "code 2"),
        "a signal": ("code -", "code 130", "code 143"),
    }
    counts = [0] * len(starts)
    for outcome in found:
        word = outcome.partition(":")[0]
        for at, beginnings in enumerate(starts.values()):
            exact = word in beginnings
            if exact or (at == 3 and word.startswith(beginnings[0])):
                counts[at] += 1
                break
    return _row([kind, str(len(found)), *map(str, counts)])


def _kind(what: str) -> str:
    if what in BEFORE:
        return f"before a start: {what}"
    return f"limit: {what}" if what in LIMITS else f"during a start: {what}"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"
