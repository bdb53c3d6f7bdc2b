"""The health of a run at its log steps: all detectors that judge figures of the objective and of the
weights.

Spikes and accuracies have their own: `detectors.SpikeEvents`, `accuracies`.
"""

from __future__ import annotations

from collections.abc import Mapping

from fastmoco.run.collapse import PAIRS, apart
from fastmoco.run.events import Event
from fastmoco.telemetry.detectors import (
    BoundDetector,
    CollapseDetector,
    ForgettingDetector,
    NarrowingDetector,
    UninformedDetector,
)

BOUNDS = {
    "update_ratio": (
        0.05,
        "a step changes the weights of {layer} by {{value}} of their norm (bound {{bound}}): "
        "lower --optim.lr",
    ),
    "batch_norm_drift": (
        3.0,
        "the running statistics of the momentum encoder's batch norms are {{value}} standard "
        "deviations from the encoder's (bound {{bound}})",
    ),
}
"""Figures that have a bound, after the warm-up: the bound, and the text of the event."""


class Health:
    """Judges the figures of each log step.

    Args:
        warm: steps of the run before a loss, a rank or a figure with a bound is judged.
        uninformed_loss: the loss of knowing nothing (`Objective.uninformed_loss`).
    """

    def __init__(self, *, warm: int, uninformed_loss: float | None) -> None:
        self._warm = warm
        self._collapse: CollapseDetector | None = None
        self._narrowing = NarrowingDetector(after=warm)
        self._forgetting = ForgettingDetector()
        self._uninformed = UninformedDetector(uninformed_loss, after=warm)
        self._bounds: dict[str, BoundDetector] = {}

    def observe(
        self, step: int, loss: float, figures: Mapping[str, float], *, dim: int | None
    ) -> list[Event]:
        """Take the figures of a log step; return its events.

        Args:
            step: optimizer steps done.
            loss: mean over ranks.
            figures: by metric name; those that are missing are not judged.
            dim: width of the queries; None if no loss reads the features, which are then not judged.
        """
        found: list[Event | None] = []
        pairs = [figures[name] for name in PAIRS if name in figures]
        if dim is not None:
            if self._collapse is None:
                self._collapse = CollapseDetector(dim=dim, after=self._warm)
            images_apart = apart(*pairs) if pairs else None
            found.append(self._collapse.observe(step, figures["feature_std"], images_apart))
            found.append(self._narrowing.observe(step, figures["effective_rank"]))
        if pairs:
            found.append(self._forgetting.observe(step, *pairs))
        found.append(self._uninformed.observe(step, loss))
        found += [self._within_bound(step, name, value) for name, value in figures.items()]
        return [event for event in found if event is not None]

    def _within_bound(self, step: int, name: str, value: float) -> Event | None:
        """Judge a figure that has a bound."""
        kind, _, layer = name.partition("/")
        if kind not in BOUNDS:
            return None
        if name not in self._bounds:
            bound, text = BOUNDS[kind]
            self._bounds[name] = BoundDetector(
                kind, text.format(layer=layer), bound=bound, layer=layer or None, after=self._warm
            )
        return self._bounds[name].observe(step, value)
