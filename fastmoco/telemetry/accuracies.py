"""The accuracies of a run as its records show them: the last, the best, and dips below it."""

from __future__ import annotations

from collections.abc import Mapping

from fastmoco.run.events import Event
from fastmoco.telemetry.detectors import DipDetector


class Accuracies:
    """Accuracies by metric name, as shares.

    Args:
        labels: metric name -> label, of all that will come.
        chance: what knowing nothing gives, where it is known.

    Attributes:
        labels: as given.
    """

    def __init__(self, labels: Mapping[str, str], chance: Mapping[str, float]) -> None:
        self.labels = dict(labels)
        self._chance = dict(chance)
        self._dips = {name: DipDetector(label, name=name) for name, label in labels.items()}
        self._last: dict[str, float] = {}
        self._best: dict[str, float] = {}
        self._best_step: dict[str, int] = {}

    def known(
        self, last: Mapping[str, float], best: Mapping[str, float], best_step: Mapping[str, int]
    ) -> None:
        """Take accuracies from before a resume."""
        self._last |= last
        self._best |= best
        self._best_step |= best_step
        for name, value in best.items():
            self._dips[name].observe(0, value)

    def observe(self, step: int, figures: Mapping[str, float]) -> list[Event]:
        """Take measured accuracies, all finite; return the dips that begin with them."""
        self._last |= figures
        for name, value in figures.items():
            if name not in self._best or value > self._best[name]:
                self._best[name], self._best_step[name] = value, step
        dips = (self._dips[name].observe(step, value) for name, value in figures.items())
        return [dip for dip in dips if dip is not None]

    def metrics(self) -> dict[str, float]:
        """The last ones by metric name, and the best ones as `NAME_best`."""
        return {**self._last, **{f"{name}_best": value for name, value in self._best.items()}}

    def uninformed(self) -> list[str]:
        """What knowing nothing gives, an accuracy each."""
        return [f"{self.labels[name]} {value:.1%}" for name, value in self._chance.items()]

    def text(self, step: int, figures: Mapping[str, float]) -> str:
        """Accuracies of a step, each with the best one so far, and what knowing nothing gives."""
        return ", ".join(self._text(name, value, step) for name, value in figures.items())

    def _text(self, name: str, value: float, step: int) -> str:
        at = self._best_step.get(name)
        if at == step:
            beside = ["best so far"]
        else:
            beside = [f"best {self._best[name]:.1%}" + (f" at step {at}" if at is not None else "")]
        if name in self._chance:
            beside.append(f"chance {self._chance[name]:.1%}")
        return f"{self.labels[name]} {value:.1%} ({', '.join(beside)})"
