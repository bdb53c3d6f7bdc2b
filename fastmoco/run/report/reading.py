"""What a report shows of a run, read from its folder: metrics, events, config, and whether it trains."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastmoco.errors import RunError, no_run
from fastmoco.run import listing
from fastmoco.run.curves import LARGEST, ROLLED_BACK, Panels
from fastmoco.run.events import Event, read_events
from fastmoco.run.folder import RunFolder
from fastmoco.run.metrics_file import SPIKE, Series, ends_torn, read_curves

NO_CURVE = ("step", "time", "epoch")
"""Entries of a line of metrics that are no metrics of their own."""
MOST_FIGURES = 16
"""Accuracies of a run, and lines to compare a metric with."""
MOST_SECONDS = 1e11
"""Of a time that is one."""
LONGEST_NAME = 40
"""Characters of the name of a run in a chart."""
DIP = 0.02
"""An accuracy this far below the best one before it is a dip; docs/stability.md says why."""


class Dip(NamedTuple):
    """An accuracy that fell below the best one before it."""

    step: int
    value: float
    best: float
    recovered: bool
    """Whether a later value came back to within the tolerance."""


@dataclass(frozen=True, kw_only=True)
class ReportRun:
    """One run of a report.

    Attributes:
        name: for people, unlike those of the other runs of the report.
        folder: of the run.
        saved: its `config.json`.
        panels: figures and lines to compare with.
        series: finite values by metric.
        lost: steps at which a metric was not finite, by metric.
        times: seconds since 1970 of the logged steps.
        events: in the order of steps.
        state: that of `fastmoco runs`.
        notes: what is wrong with the files, in sentences.
    """

    name: str
    folder: RunFolder
    saved: Mapping[str, Any]
    panels: Panels
    series: Mapping[str, Series]
    lost: Mapping[str, NDArray[np.int64]]
    times: Series | None
    events: Sequence[Event]
    state: listing.State
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def short(self) -> str:
        """The name for a chart, without the middle of a long one: names of runs often differ at the
        end."""
        half = LONGEST_NAME // 2
        long = len(self.name) > LONGEST_NAME
        return f"{self.name[: half - 1]}…{self.name[-half:]}" if long else self.name

    @property
    def config(self) -> Mapping[str, Any]:
        """The config as stored; empty if it is missing."""
        found = self.saved.get("config")
        return found if isinstance(found, Mapping) else {}

    @property
    def resolved(self) -> Mapping[str, Any]:
        """The resolved values as stored; empty if they are missing."""
        found = self.saved.get("resolved")
        return found if isinstance(found, Mapping) else {}

    @property
    def width(self) -> int | None:
        """Of the projections that `feature_std` measures; None if it is unknown, and of methods that
        compare no pairs: theirs measures features of another width, which no loss spreads."""
        if "cosine/positive" not in self.series:
            return None
        model = self.config.get("model")
        return whole(model.get("projection_dim")) if isinstance(model, Mapping) else None

    @property
    def last_step(self) -> int:
        """Of all metrics."""
        ends = [int(one.steps[-1]) for one in self.series.values()]
        return max([0, *ends, *(int(steps[-1]) for steps in self.lost.values())])

    @property
    def total_steps(self) -> int | None:
        """That the run shall train."""
        return whole(self.resolved.get("total_steps"))

    def prefixed(self, prefix: str) -> dict[str, Series]:
        """Series by what follows a prefix of their names, in the order of the file."""
        return {
            name.removeprefix(prefix): series
            for name, series in self.series.items()
            if name.startswith(prefix)
        }


def whole(value: Any) -> int | None:
    """A number of `config.json` that is whole and positive, else None."""
    return value if type(value) is int and 0 < value < 2**63 else None


def read_run(path: Path, name: str | None = None) -> ReportRun:
    """Read one run, also while it trains, before its first step, or after an interruption; needs no
    lock.

    The time is linear in the number of lines: some seconds for 300,000. Damaged lines are left out
    and named in `notes`.

    Args:
        path: folder of the run.
        name: for people; default that of the folder.

    Raises:
        RunError: if the folder has neither metrics nor the config of a run.
        UnfitFileError: if they are a link or no regular file.
    """
    folder = RunFolder(path)
    if not os.path.lexists(path):
        raise no_run(path)
    # Before the metrics: those of a run that ends meanwhile may lack its last lines.
    state = listing.read_run(path).state
    notes: list[str] = []
    saved = folder.read_config()
    if not saved:
        notes.append(
            f"{path / 'config.json'} is missing or damaged, so the configuration is unknown."
        )
    if os.path.lexists(folder.metrics):
        series, lost = read_curves(folder.metrics, lambda name: name != "step", tell=notes.append)
        found = read_events(folder.metrics, tell=notes.append)
        if state in ("finished", "stopped") and ends_torn(folder.metrics):
            notes.append(f"{folder.metrics} ends within a line, although the run has ended.")
    elif isinstance(saved.get("config"), Mapping):
        series, lost, found = {}, {}, []
        notes.append(f"{folder.metrics} is missing: no step is logged.")
    else:
        raise RunError(
            f"{path} contains no {folder.metrics.name}; "
            "is it the folder given to fastmoco train --out?"
        )
    times = series.pop("time", None)
    if times is not None and not (abs(times.values) < MOST_SECONDS).all():
        times = None
    back = series.pop(ROLLED_BACK, None)
    for entry in NO_CURVE:
        series.pop(entry, None)
        lost.pop(entry, None)
    found += _spikes(series, lost)
    if back is not None:
        found += [
            Event(step, "rolled_back", None, step - to, f"rolled back to step {to:.0f}")
            for step, to in zip(back.steps.tolist(), back.values.tolist(), strict=True)
        ]
    kept = {
        metric: Series(one.steps, one.values.clip(-LARGEST, LARGEST))
        for metric, one in series.items()
        if not metric.startswith(SPIKE)
    }
    return ReportRun(
        name=name or names_of([path])[0],
        folder=folder,
        saved=saved,
        panels=_fewer(Panels.of(saved), kept),
        series=kept,
        lost={metric: steps for metric, steps in lost.items() if not metric.startswith(SPIKE)},
        times=times,
        events=_in_order(found),
        state=state,
        notes=notes,
    )


def _fewer(panels: Panels, series: Mapping[str, Series]) -> Panels:
    """The accuracies that have been measured, and a readable number of lines."""
    measured = {name: label for name, label in panels.figures.items() if name in series}
    return Panels(
        figures=dict(islice(measured.items(), MOST_FIGURES)),
        lines={
            name: dict(islice(lines.items(), MOST_FIGURES)) for name, lines in panels.lines.items()
        },
        steps_per_epoch=panels.steps_per_epoch,
    )


def names_of(paths: Sequence[Path]) -> list[str]:
    """A short name for each of some runs, no two alike: the end of its path."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    own = list(dict.fromkeys(parts))
    depths = dict.fromkeys(own, 1)

    def name(part: tuple[str, ...]) -> str:
        return "/".join(part[-depths[part] :]) or "/"

    for _ in range(max(map(len, own), default=0)):
        names = [name(part) for part in own]
        for part in own:
            depths[part] += names.count(name(part)) > 1 and depths[part] < len(part) - 1
    found, seen = [], Counter[str]()
    for part in parts:
        seen[name(part)] += 1
        count = seen[name(part)]
        found.append(f"{name(part)} ({count})" if count > 1 else name(part))
    return found


def dips_of(series: Series, tolerance: float = DIP) -> list[Dip]:
    """The dips of an accuracy: the lowest value of each stretch more than a tolerance below the best
    value before it."""
    dips: list[Dip] = []
    best, lowest = -math.inf, None
    for step, value in zip(series.steps.tolist(), series.values.tolist(), strict=True):
        if value < best - tolerance:
            if lowest is None or value < lowest.value:
                lowest = Dip(step, value, best, False)
        elif lowest is not None:
            dips.append(lowest._replace(recovered=True))
            lowest = None
        best = max(best, value)
    return [*dips, lowest] if lowest is not None else dips


def _spikes(series: Mapping[str, Series], lost: Mapping[str, NDArray[np.int64]]) -> list[Event]:
    """The gradient spikes of a run of an earlier version, from the metrics `spike/PLACE`."""
    found = []
    for name, one in series.items():
        place = name.removeprefix(SPIKE)
        if place != name:
            for step, norm in zip(one.steps.tolist(), one.values.tolist(), strict=True):
                text = f"gradient norm of {place.replace('_', ' ')} is {norm:.3g}"
                found.append(Event(step, "gradient_spike", place, norm, text))
    for name, steps in lost.items():
        place = name.removeprefix(SPIKE)
        if place != name:
            text = f"gradient norm of {place.replace('_', ' ')} is not finite"
            found += [
                Event(step, "gradient_not_finite", place, None, text) for step in steps.tolist()
            ]
    return found


def _in_order(events: list[Event]) -> list[Event]:
    """Events by step; of one that is recorded in two forms the named one, which comes first."""
    kept: dict[tuple[int, str, str | None], Event] = {}
    for event in events:
        kept.setdefault((event.step, event.name, event.layer), event)
    return sorted(kept.values(), key=lambda event: event.step)
