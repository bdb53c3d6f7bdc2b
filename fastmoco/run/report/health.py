"""Whether a run is healthy, and why, from what it has recorded."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fastmoco.run.collapse import PAIRS, apart, has_collapsed
from fastmoco.run.events import Event
from fastmoco.run.report.figure import number
from fastmoco.run.report.reading import DIP, ReportRun, dips_of
from fastmoco.run.report.words import spaced
from fastmoco_pipelines.text import counted

Verdict = Literal["healthy", "look at it", "not healthy", "too early"]
SERIOUS = ("collapse", "forgetting", "no_learning")
"""Events after which the encoder is of no use, unless it has learned since."""
SPIKES = ("gradient_spike", "gradient_not_finite")
SLOW = 0.2
"""Share of the time spent waiting for data that is worth a look."""
MOST_REASONS = 20
"""Reasons that are given; events of unknown names have one each."""
EARLY = 20
"""Logged steps before a run that has not finished is judged healthy."""
WORSE = 0.05
"""A loss above that of knowing nothing by this share of it is worth a look."""


@dataclass(frozen=True, kw_only=True)
class Health:
    """A judgement with its reasons, the gravest first."""

    verdict: Verdict
    reasons: tuple[str, ...]


def health_of(run: ReportRun) -> Health:
    """Judge a run."""
    grave: list[str] = []
    odd: list[str] = []
    good: list[str] = []
    _judge_loss(run, grave, odd, good)
    _judge_accuracy(run, grave, odd, good)
    _judge_features(run, grave, good)
    _judge_events(run, grave, odd, good)
    _judge_speed(run, odd, good)
    logged = max((len(one.steps) for one in run.series.values()), default=0)
    if grave:
        return Health(verdict="not healthy", reasons=(*grave, *odd)[:MOST_REASONS])
    if odd:
        return Health(verdict="look at it", reasons=(*odd, *good)[:MOST_REASONS])
    if logged < EARLY and run.state != "finished":
        few = f"{counted(logged, 'logged step')}: too early to judge"
        return Health(verdict="too early", reasons=(few, *good))
    return Health(verdict="healthy", reasons=tuple(good))


def _judge_loss(run: ReportRun, grave: list[str], odd: list[str], good: list[str]) -> None:
    loss, lost = run.series.get("loss"), run.lost.get("loss")
    if lost is not None and len(lost):
        last = int(loss.steps[-1]) if loss is not None else -1
        if int(lost[-1]) > last:
            grave.append(f"the last loss, at step {lost[-1]:,}, is not finite")
        else:
            odd.append(f"the loss was not finite in {counted(len(lost), 'logged step')}")
    if loss is None:
        if lost is None and (run.series or run.lost or run.state == "finished"):
            odd.append("no loss is recorded")
        return
    first, end = float(loss.values[0]), float(np.median(loss.values[-9:]))
    known = run.panels.lines.get("loss", {})
    uninformed = next(iter(known.values()), math.nan)
    beside = f", {number(uninformed)} for knowing nothing" if math.isfinite(uninformed) else ""
    went = f"the loss went from {number(first)} to {number(end)}"
    if len(loss.steps) >= EARLY and end > uninformed + WORSE * abs(uninformed):
        odd.append(f"{went}, above {number(uninformed)} for knowing nothing")
    else:
        good.append(f"{went}{beside}")


def _judge_accuracy(run: ReportRun, grave: list[str], odd: list[str], good: list[str]) -> None:
    measured = {
        label: (run.series[name], run.panels.lines.get(name, {}).get("chance"))
        for name, label in run.panels.figures.items()
        if name in run.series
    }
    if not measured:
        good.append("no accuracy was measured, so its dips cannot be judged")
    for label, (series, chance) in measured.items():
        last, best = float(series.values[-1]), int(np.argmax(series.values))
        dips = dips_of(series)
        top = f"{series.values[best]:.1%} at step {series.steps[best]:,}"
        if dips and not dips[-1].recovered:
            points = 100 * (float(series.values[best]) - last)
            grave.append(f"{label} is {last:.1%}, {points:.1f} points below its best, {top}")
        elif dips:
            odd.append(
                f"{label} had {counted(len(dips), 'dip')} of more than {100 * DIP:.0f} points below its best "
                f"before it, the deepest at step {min(dips, key=lambda d: d.value - d.best).step:,}"
            )
        else:
            above = f", chance is {chance:.1%}" if chance is not None else ""
            good.append(f"{label} is {last:.1%}, its best {top}{above}; it has no dip")


def _judge_features(run: ReportRun, grave: list[str], good: list[str]) -> None:
    spread = run.series.get("feature_std")
    width = run.width
    if spread is None or width is None:
        return
    end, even = float(np.median(spread.values[-9:])), width**-0.5
    pairs = [float(np.median(run.series[name].values[-9:])) for name in PAIRS if name in run.series]
    images_apart = apart(*pairs) if len(pairs) == len(PAIRS) else None
    if has_collapsed(end / even, images_apart):
        grave.append(
            f"the features have collapsed: their spread is {number(end)}, and {number(even)} if they "
            "were evenly spread"
        )
    elif has_collapsed(end / even):
        share = f"{end / even:.0%}"
        good.append(f"the spread of the features is {share} of an even one, and tells images apart")
    else:
        good.append(f"the spread of the features is {end / even:.0%} of an even one")


def _judge_events(run: ReportRun, grave: list[str], odd: list[str], good: list[str]) -> None:
    counts = Counter(event.name for event in run.events)
    for name in SERIOUS:
        if counts[name]:
            (odd if _recovered(run, name) else grave).append(_last(run, name))
    spikes = [event for event in run.events if event.name in SPIKES]
    if spikes:
        steps = {event.step for event in spikes}
        where = Counter(spaced(event.layer) for event in spikes if event.layer)
        places = ", ".join(place for place, _ in where.most_common(3))
        odd.append(
            f"gradient spikes in {counted(len(steps), 'step')}, from step {min(steps):,} on (in {places})"
        )
    elif any(name.startswith("gradient_norm/") for name in run.series):
        good.append("no gradient spike is recorded")
    others = set(counts) - set(SERIOUS) - set(SPIKES)
    odd += [_last(run, name) for name in sorted(others) if not name.endswith("_dip")]


def _recovered(run: ReportRun, name: str) -> bool:
    """Whether an accuracy shows that the run has learned after the last event of a name: its best is
    of a later step, is no chance, and was kept. No accuracy takes back a collapse."""
    if name == "collapse":
        return False
    step = max(event.step for event in run.events if event.name == name)
    for metric in run.panels.figures:
        series = run.series.get(metric)
        if series is None:
            continue
        best = int(np.argmax(series.values))
        chance = run.panels.lines.get(metric, {}).get("chance", 0.0)
        top, last = series.values[best], series.values[-1]
        if series.steps[best] > step and top > chance + DIP and last >= top - DIP:
            return True
    return False


def _last(run: ReportRun, name: str) -> str:
    """The last event of a name, in words."""
    found = [event for event in run.events if event.name == name]
    last: Event = found[-1]
    times = f" ({len(found)} times, last here)" if len(found) > 1 else ""
    return f"step {last.step:,}: {last.text or spaced(name)}{times}"


def _judge_speed(run: ReportRun, odd: list[str], good: list[str]) -> None:
    wait = run.series.get("wait_share")
    if wait is None:
        return
    share = float(np.mean(wait.values))
    if share > SLOW:
        if not any(event.name == "slow_loader" for event in run.events):
            odd.append(f"the training waited {share:.0%} of the time for data")
    else:
        good.append(f"the training waited {share:.1%} of the time for data")
