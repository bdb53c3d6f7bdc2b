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


class CollapseDetector:
    """Event when `feature_std` stays below a share of its healthy value 1/sqrt(D)."""

    def __init__(self, *, dim: int, floor: float = 0.1, patience: int = 3) -> None:
        """Set the rule: an event after `patience` consecutive values below `floor / sqrt(dim)`."""
        self._healthy = dim**-0.5
        self._floor = floor
        self._patience = patience
        self._low = 0

    def observe(self, step: int, std: float) -> Event | None:
        """Take one value; return the event when the patience ends, once until recovery. Its size is
        the value as a share of the healthy one."""
        low = not std >= self._floor * self._healthy  # NaN counts as low
        self._low = self._low + 1 if low else 0
        if self._low != self._patience:
            return None
        text = (
            f"features are collapsing, their deviation over the batch is {std:.2g} "
            f"and would be {self._healthy:.2g} if they were evenly spread"
        )
        return Event(step, "collapse", None, std / self._healthy, text)


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
