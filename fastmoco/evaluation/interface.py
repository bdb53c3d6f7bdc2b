"""The interface of an evaluation: when it is due, and its figures by name."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import nn

from fastmoco.distributed.agree import of_first_rank
from fastmoco.distributed.mesh import World


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
        last_epoch: epoch of the last measurement; 0 before the first.
    """

    name: ClassVar[str]
    figures: ClassVar[Mapping[str, str]]

    def __init__(self, world: World, *, every_epochs: float, max_share: float) -> None:
        self.world = world
        self.report: Callable[[str], None] | None = None
        self.last: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.last_epoch = 0.0
        self._every_epochs = every_epochs
        self._max_share = max_share
        self._spent = 0.0
        self._started = time.monotonic()

    @abstractmethod
    def evaluate(self, encoder: nn.Module) -> Mapping[str, float]:
        """Measure now; every rank gets the same figures.

        Args:
            encoder: maps [B, 3, H, W] to [B, E]. Its weights, buffers and modes must be the same
                afterwards.

        Returns:
            The value of each of `figures`.
        """

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
        if epoch - self.last_epoch < self._every_epochs - 1e-9:
            return False
        share = self._spent / max(time.monotonic() - self._started, 1e-9)
        return bool(of_first_rank(share <= self._max_share, self.world.device))

    def measure(self, encoder: nn.Module, epoch: float) -> Mapping[str, float]:
        """Evaluate, and store the figures in `last` and `best`.

        Args:
            encoder: as for `evaluate`.
            epoch: epochs trained so far, fractional.
        """
        began = time.monotonic()
        self.last = dict(self.evaluate(encoder))
        self.last_epoch = epoch
        for name, value in self.last.items():
            self.best[name] = max(value, self.best.get(name, value))
        self._spent += time.monotonic() - began
        return self.last

    def state_dict(self) -> dict[str, Any]:
        """The state that a checkpoint stores."""
        return {"last_epoch": self.last_epoch, "last": dict(self.last), "best": dict(self.best)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a saved state; an empty one gives the initial state."""
        self.last_epoch = float(state.get("last_epoch", 0.0))
        self.last = self._by_name(state.get("last"))
        self.best = self._by_name(state.get("best"))

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
