"""The interface of an evaluation: when it is due, and its figures by name."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import nn

from fastmoco.distributed.agree import of_first_rank
from fastmoco.distributed.mesh import World


class Unmeasurable(ValueError):
    """A figure has no value: there are no images, or features are not finite."""


class Monitor(ABC):
    """An evaluation of the encoder during training.

    A subclass names its figures and defines `evaluate`. A measurement is postponed while the
    monitor has taken more than its share of the time of the run.

    Args:
        world: this process among its peers; all of them measure together.
        every_epochs: epochs between two measurements.
        max_share: of the time of the run, in (0, 1].

    Attributes:
        name: of the monitor; a checkpoint stores its state under this name.
        figures: its accuracies, shares in [0, 1]: metric name -> label for users.
        report: called with lines for the user, if set.
        last: figures of the last measurement; empty before the first.
        best: the largest value of each figure so far.
        best_step: the step at which each of them was measured.
        last_epoch: epoch of the last measurement; 0 before the first.
        idle: set where a measurement could say nothing; then none is made.
        notes: what a reader of the figures must know, in sentences.
        chance: the value of each figure that knowing nothing gives, where that is known.
    """

    name: ClassVar[str]
    figures: ClassVar[Mapping[str, str]]

    def __init__(self, world: World, *, every_epochs: float, max_share: float) -> None:
        self.world = world
        self.report: Callable[[str], None] | None = None
        self.last: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.best_step: dict[str, int] = {}
        self.idle = False
        self.notes: tuple[str, ...] = ()
        self.chance: Mapping[str, float] = {}
        self.last_epoch = 0.0
        self._every_epochs = every_epochs
        self._max_share = max_share
        self._spent = 0.0
        self._postponed = False
        self._started = time.monotonic()

    @abstractmethod
    def evaluate(self, encoder: nn.Module) -> Mapping[str, float]:
        """Measure now; every rank gets the same figures.

        Args:
            encoder: what `subject` returns, which maps [B, 3, H, W] to [B, E]. Its weights, buffers and modes must be the same
                afterwards.

        Returns:
            The value of each of `figures`.

        Raises:
            Unmeasurable: on all ranks, if these features or images have no figure.
        """

    def subject(self, objective: Any) -> nn.Module:
        """What `evaluate` gets of an objective: the encoder that it names, unless a subclass measures
        more."""
        encoder: nn.Module = objective.evaluation_encoder
        return encoder

    @property
    def images(self) -> int:
        """Images that one measurement embeds, on all ranks; 0: unknown."""
        return 0

    def close(self) -> None:  # noqa: B027 - most monitors hold nothing
        """Release what the monitor holds, e.g. open sets. Safe to call twice."""

    def is_due(self, epoch: float) -> bool:
        """Whether the epochs between two measurements have passed and the time budget allows one.

        All ranks must call this at the same step; the clock of rank 0 decides for all.
        """
        if self.idle or epoch - self.last_epoch < self._every_epochs - 1e-9:
            return False
        share = self._spent / max(time.monotonic() - self._started, 1e-9)
        now = bool(of_first_rank(share <= self._max_share, self.world.device))
        if not now and not self._postponed:
            self._postponed = True
            self._report(
                f"{', '.join(self.figures.values())} is measured less often than asked "
                f"({self.name}.every_epochs={self._every_epochs:g}): it may take "
                f"{self._max_share:.0%} of the time ({self.name}.max_share) and has taken "
                f"{share:.0%}; the end of the run is measured"
            )
        return now

    def measure(self, encoder: nn.Module, epoch: float, step: int = 0) -> Mapping[str, float]:
        """Evaluate, and store the figures in `last` and `best`.

        Args:
            encoder: as for `evaluate`.
            epoch: epochs trained so far, fractional.
            step: optimizer steps done.

        Returns:
            The value of each of `figures`, NaN where it has none; empty if idle.
        """
        if self.idle:
            return {}
        began = time.monotonic()
        try:
            found = dict(self.evaluate(encoder))
        except Unmeasurable as error:
            self._report(
                f"warning: {', '.join(self.figures.values())} has no value at step {step}: {error}"
            )
            found = dict.fromkeys(self.figures, math.nan)

        # Only numbers are remembered: a checkpoint stores them, and NaN is above nothing.
        self.last_epoch = epoch
        self.last = {name: value for name, value in found.items() if math.isfinite(value)}
        for name, value in self.last.items():
            if name not in self.best or value > self.best[name]:
                self.best[name] = value
                self.best_step[name] = step
        self._spent += time.monotonic() - began
        return found

    def state_dict(self) -> dict[str, Any]:
        """The state that a checkpoint stores."""
        return {
            "last_epoch": self.last_epoch,
            "last": dict(self.last),
            "best": dict(self.best),
            "best_step": dict(self.best_step),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a saved state; an empty one gives the initial state."""
        self.last_epoch = float(state.get("last_epoch", 0.0))
        self.last = self._by_name(state.get("last"))
        self.best = self._by_name(state.get("best"))
        steps = state.get("best_step", {})
        self.best_step = {name: int(steps[name]) for name in self.best if name in steps}

    def _report(self, text: str) -> None:
        if self.report is not None:
            self.report(text)

    def _by_name(self, saved: Mapping[str, float] | float | None) -> dict[str, float]:
        """The figures of a state; one without a name is from when only kNN was measured."""
        if saved is None:
            return {}
        named = saved if isinstance(saved, Mapping) else {self.name: float(saved)}
        # A figure that this monitor no longer has, e.g. after a change of its config, is dropped.
        return {name: value for name, value in named.items() if name in self.figures}


def saved_states(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The states of the monitors in the JSON state of a checkpoint, by the name of the monitor."""
    found: Mapping[str, Any] = state.get("monitors", {"knn": state.get("knn", {})})
    return found
