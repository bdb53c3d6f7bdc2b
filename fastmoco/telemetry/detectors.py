"""Detectors: rules that turn the figures of a run into named events.

They only return events, with the numbers in them; the recorder writes and prints them.
docs/stability.md lists the names, and what the size of each one is.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from fastmoco.run.collapse import POINT, SPREAD, has_collapsed
from fastmoco.run.events import Event


@dataclass(frozen=True, slots=True, kw_only=True)
class Spike:
    """One value far above its history, or a non-finite one."""

    step: int
    name: str
    value: float
    median: float

    @property
    def ratio(self) -> float:
        """The value as a multiple of the median."""
        return self.value / self.median if self.median else math.inf

    def event(self) -> Event:
        """The event; its size is `ratio`, None of a value that is not finite."""
        if not math.isfinite(self.value):
            text = f"gradient of {self.name} is {self.value}"
            return Event(self.step, "gradient_not_finite", self.name, None, text)
        text = f"gradient spike in {self.name}, {self.value:.3g} is {self.ratio:.0f} x its median"
        return Event(self.step, "gradient_spike", self.name, self.ratio, text)

    def __str__(self) -> str:
        return str(self.event())


class SpikeDetector:
    """Event when a gradient norm exceeds `factor` times its running median, or is not finite.

    The median over the last `window` steps follows a slow drift, and a spike in it does not move
    it. Finite spikes are added to the history, so that a lasting new level causes no more events
    after 50 % of a window.
    """

    def __init__(self, *, factor: float = 5.0, window: int = 100, warmup: int = 20) -> None:
        """Set the rule.

        Args:
            factor: multiple of the median above which a value is a spike, > 1.
            window: steps of history.
            warmup: steps of history before the first event of a finite value; at most `window`.

        Raises:
            ValueError: if a number is out of its range.
        """
        if not factor > 1:
            raise ValueError(f"factor={factor}: a spike is more than 1 x the median")
        if not 1 <= warmup <= window:
            raise ValueError(f"warmup={warmup}: needs 1 <= warmup <= window={window}")
        self._factor = factor
        self._window = window
        self._warmup = warmup
        self._history: dict[str, deque[float]] = {}

    def observe(self, step: int, norms: Mapping[str, float]) -> list[Spike]:
        """Take the norms of one step and return the spikes. Each name has its own history."""
        spikes = []
        for name, value in norms.items():
            history = self._history.setdefault(name, deque(maxlen=self._window))
            median = statistics.median(history) if history else 0.0
            finite = math.isfinite(value)
            if not finite or (len(history) >= self._warmup and value > self._factor * median):
                spikes.append(Spike(step=step, name=name, value=value, median=median))
            if finite:
                history.append(value)
        return spikes


@dataclass(slots=True)
class _Episode:
    """Spikes of one place that follow each other."""

    first: Spike
    last: int
    """The step of the latest one."""
    largest: float
    """The largest ratio of which an event told."""
    count: int = 1


class SpikeEvents:
    """Events of the spikes of a run, one for each place and episode.

    An episode is a sequence of spikes with less than `quiet` steps between them. Its first spike is
    an event, and so is one that is over `louder` times as large as those told before. At the end of an
    episode of at least `lasting` spikes one more event, `gradient_level`, tells what has become of
    the norm: so a new level of hundreds of steps is two events.
    """

    def __init__(
        self,
        detector: SpikeDetector | None = None,
        *,
        quiet: int = 50,
        lasting: int = 10,
        louder: float = 5.0,
    ) -> None:
        """Set the rule.

        Args:
            detector: what a spike is.
            quiet: steps without a spike that end an episode.
            lasting: spikes of an episode whose end is an event.
            louder: see the class.
        """
        self._detector = detector or SpikeDetector()
        self._quiet = quiet
        self._lasting = lasting
        self._louder = louder
        self._episodes: dict[tuple[str, bool], _Episode] = {}
        self._recent: dict[str, deque[float]] = {}

    def observe(self, step: int, norms: Mapping[str, float]) -> tuple[list[Spike], list[Event]]:
        """Take the norms of one step; return its spikes, and the events of which to tell."""
        events = [event for name in norms if (event := self._ended(step, name))]
        spikes = self._detector.observe(step, norms)
        for spike in spikes:
            key = (spike.name, math.isfinite(spike.value))
            episode = self._episodes.get(key)
            if episode is None or step - episode.last > self._quiet:
                self._episodes[key] = _Episode(spike, step, spike.ratio)
                events.append(spike.event())
                continue
            episode.last = step
            episode.count += 1
            # Of two infinite ratios none is larger.
            if spike.ratio > self._louder * episode.largest:
                episode.largest = spike.ratio
                events.append(spike.event())
        for name, value in norms.items():
            if math.isfinite(value):
                self._recent.setdefault(name, deque(maxlen=self._quiet)).append(value)
        return spikes, events

    def _ended(self, step: int, name: str) -> Event | None:
        """The event of an episode that is over, if it was a long one."""
        episode = self._episodes.get((name, True))
        if episode is None or step - episode.last <= self._quiet:
            return None
        del self._episodes[name, True]
        if episode.count < self._lasting:
            return None
        before, now = episode.first.median, statistics.median(self._recent[name])
        ratio = now / before if before else math.inf
        steps = episode.last - episode.first.step + 1
        text = (
            f"gradient of {name}: {episode.count} spikes in {steps} steps from step "
            f"{episode.first.step} on are over, its median is {now:.3g} and was {before:.3g}"
        )
        return Event(step, "gradient_level", name, ratio, text)


SLOW = 10
"""Log steps that heads have, before images were ever apart, to find the direction that all features
have in common."""
LEARNED = 0.1
"""`apart` of images that an encoder distinguishes."""


class CollapseDetector:
    """Event when the features have collapsed (`run.collapse`): `feature_std` stays below a share of
    its healthy value 1/sqrt(D), and no more distance is left between images than between views.

    Methods that have neither negatives nor batch norms at the end of their heads may pass through a
    small spread about one common direction, in which images keep their distances.
    """

    def __init__(self, *, dim: int, patience: int = 3, after: int = 0) -> None:
        """Set the rule: an event after `patience` consecutive values below `SPREAD / sqrt(dim)`.

        Args:
            dim: D.
            patience: values.
            after: first step that is judged where no value was healthy before: at their start some
                heads give nearly one output for all images. Until then `SLOW` values are needed
                where images have never been apart, and features are no point.
        """
        self._after = after
        self._warm = after
        self._learned = False
        self._told = False
        self._healthy = dim**-0.5
        self._patience = patience
        self._low = 0
        self._apart: deque[float | None] = deque(maxlen=patience)

    def observe(self, step: int, std: float, images_apart: float | None = None) -> Event | None:
        """Take one value; return the event when the patience ends, once until a value is at twice the
        floor. Its size is the value as a share of the healthy one.

        Args:
            step: optimizer steps done.
            std: `feature_std`.
            images_apart: `run.collapse.apart`, whose mean over the patience counts, as few images give
                a noisy one; None if it is unknown.
        """
        spread = std / self._healthy
        low = has_collapsed(spread)
        if not low:
            self._after = 0
        if spread >= 2 * SPREAD:
            self._told = False
        self._low = self._low + 1 if low and step >= self._after else 0
        self._apart.append(images_apart)
        self._learned = self._learned or (images_apart or 0.0) >= LEARNED
        if self._low < self._patience or self._told:
            return None
        starts = images_apart is not None and not self._learned and step < self._warm
        if starts and self._low < SLOW and not spread < POINT:
            return None
        known = [value for value in self._apart if value is not None]
        if not has_collapsed(spread, statistics.fmean(known) if known else None):
            return None
        self._told = True
        text = (
            f"features are collapsing, their deviation over the batch is {std:.2g} "
            f"and would be {self._healthy:.2g} if they were evenly spread"
        )
        return Event(step, "collapse", None, spread, text)


class NarrowingDetector:
    """Event when the features have lost most of the directions that they used: dimensional
    collapse."""

    def __init__(
        self, *, share: float = 0.25, least: float = 4.0, patience: int = 3, after: int = 0
    ) -> None:
        """Set the rule: an event after `patience` consecutive values of `effective_rank` below
        `share` of the largest one, once that was at least `least`. Values before step `after` do not
        count: heads that were not trained yet use many directions."""
        self._after = after
        self._share = share
        self._least = least
        self._patience = patience
        self._best = 0.0
        self._low = 0

    def observe(self, step: int, rank: float) -> Event | None:
        """Take one value; return the event when the patience ends, once until recovery. Its size is
        the value."""
        if step >= self._after:
            self._best = max(self._best, rank)  # NaN leaves it
        low = self._best >= self._least and not rank >= self._share * self._best
        self._low = self._low + 1 if low else 0
        if self._low != self._patience:
            return None
        text = (
            f"features lose directions, their effective rank is {rank:.1f} and was {self._best:.1f}"
        )
        return Event(step, "effective_rank", None, rank, text)


class BoundDetector:
    """Event when a figure stays above a bound.

    Args:
        name: of the event.
        text: of it, with `{value}` and `{bound}`.
        bound: above which a value is none of a healthy run; so is one that is not finite.
        layer: place in the network.
        after: steps of the run before the first event.
        patience: consecutive values.
    """

    def __init__(
        self,
        name: str,
        text: str,
        *,
        bound: float,
        layer: str | None = None,
        after: int = 0,
        patience: int = 3,
    ) -> None:
        self._name = name
        self._text = text
        self._bound = bound
        self._layer = layer
        self._after = after
        self._patience = patience
        self._high = 0

    def observe(self, step: int, value: float) -> Event | None:
        """Take one value; return the event when the patience ends, once until recovery. Its size is
        the value."""
        high = step >= self._after and not value <= self._bound
        self._high = self._high + 1 if high else 0
        if self._high != self._patience:
            return None
        text = self._text.format(value=f"{value:.2g}", bound=f"{self._bound:g}")
        return Event(step, self._name, self._layer, value, text)


class ForgettingDetector:
    """Event when an encoder no longer distinguishes images after it did: collapse before the heads.

    Watches the gap of `pair_cosines`, which no BatchNorm can restore.
    """

    def __init__(self, *, learned: float = 0.1, lost: float = 0.02, patience: int = 3) -> None:
        """Set the rule: an event after `patience` consecutive gaps below `lost`.

        It applies once the gap has exceeded `learned`.
        """
        self._learned = learned
        self._lost = lost
        self._patience = patience
        self._armed = False
        self._low = 0

    def observe(self, step: int, positive: float, other: float) -> Event | None:
        """Take both mean cosines; return the event as the other detectors do. Its size is the
        gap."""
        gap = positive - other
        self._armed = self._armed or gap > self._learned
        # NaN counts as low.
        self._low = self._low + 1 if self._armed and not gap >= self._lost else 0
        if self._low != self._patience:
            return None
        text = (
            "the encoder has collapsed, the two views of an image are no more alike "
            f"than two images (cosines {positive:.3f} and {other:.3f})"
        )
        return Event(step, "forgetting", None, gap, text)


class UninformedDetector:
    """Event when the loss has not left that of knowing nothing at the end of the warm-up."""

    def __init__(
        self, value: float | None, *, after: int, margin: float = 0.02, patience: int = 3
    ) -> None:
        """Set the rule.

        Args:
            value: `Objective.uninformed_loss`; None: no events.
            after: first step that is judged; earlier ones only tell whether the loss has left.
            margin: share of the value by which a loss has left it.
            patience: logged steps from `after` on that must all be at the value.
        """
        self._value = value
        self._after = after
        self._margin = margin
        self._patience = patience

    def observe(self, step: int, loss: float) -> Event | None:
        """Take one loss; return the event, once. Its size is the loss as a share of the value."""
        if self._value is None:
            return None
        if loss < (1 - self._margin) * self._value:
            self._value = None
            return None
        if step < self._after or not math.isfinite(loss):
            return None
        self._patience -= 1
        if self._patience > 0:
            return None
        value, self._value = self._value, None
        text = (
            f"after the warm-up the loss is {loss:.3f}, still that of an encoder that "
            f"knows nothing ({value:.3f}). Look at the views (fastmoco data views), and change "
            "--optim.lr"
        )
        return Event(step, "no_learning", None, loss / value, text)


class DipDetector:
    """Event when an accuracy falls more than `tolerance` below its best: the visible sign of
    instability in the paper."""

    def __init__(self, label: str, *, name: str = "knn", tolerance: float = 0.02) -> None:
        """Set the rule.

        Args:
            label: of the accuracy.
            name: of its metric; the event is `NAME_dip`.
            tolerance: a share; should exceed the noise of the held-out set, at most 2/sqrt(n).
        """
        self._label = label
        self._name = f"{name}_dip"
        self._tolerance = tolerance
        self._best = -math.inf
        self._inside = False

    def observe(self, step: int, accuracy: float) -> Event | None:
        """Take one accuracy (a share); return the event when a dip begins. Its size is the distance
        to the best, a share."""
        best = self._best
        was_inside = self._inside
        self._best = max(best, accuracy)
        self._inside = accuracy < best - self._tolerance
        if not self._inside or was_inside:
            return None
        below = best - accuracy
        text = f"{self._label} fell to {accuracy:.1%}, {100 * below:.1f} points below its best"
        return Event(step, self._name, None, below, text)
