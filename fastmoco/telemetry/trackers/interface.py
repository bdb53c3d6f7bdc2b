"""What a tracker is to a run: the interface `Sink`, and what it is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastmoco.run.events import Event


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRun:
    """A run, as a tracker gets to know it."""

    name: str
    """For people. Several runs may have the same."""
    id: str
    """14 hexadecimal digits, of this run alone, the same after a resume."""
    folder: str
    """Of the run, absolute. A tracker may write into a folder of its own there."""
    project: str = ""
    """What groups runs; "": the tracker's own variable of the environment, else `fastmoco`."""
    mode: str = "online"
    """`offline`: nothing may leave this machine."""
    uri: str = ""
    """Where MLflow stores; "": its variable of the environment, else the folder of the run."""
    config: Mapping[str, Any]
    """Every field by its dotted name, without passwords."""
    measures: tuple[str, ...] = ()
    """Metrics of accuracy, the first of which ranks checkpoints; the summary has the best of each
    as `NAME_best`."""
    first_step: int = 0
    """The first step that this process will report; whatever the tracker has from there on is of a
    process that has ended."""
    total_steps: int = 0
    """Optimizer steps of the whole run."""
    resumed: bool = False
    """Whether the run continues from a checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """What a tracker says when it has begun."""

    last_step: int = -1
    """The last step of this run that the tracker has already; what is of that step or an earlier
    one is not sent again. -1: it has none, or hides what is replaced."""
    where: str = ""
    """Where people find it, in a few words or as a URL; shown once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """Counts of values between edges."""

    edges: list[float]
    """One more than counts, ascending."""
    counts: list[float]
    total: float
    """Sum of the values."""
    squares: float
    """Sum of their squares."""


class Sink(Protocol):
    """A tracker. A class of this interface is constructed without arguments, and its methods are
    called one after the other: `start`, then any of the others, then `close`.

    Every method may raise and may take long: it is called outside of the training. A method that is
    not overridden, or that a class of a user's own does not have, does nothing.
    """

    def start(self, run: TrackedRun) -> Started:
        """Begin, or continue the run that has this id. None is returned for `Started()`, too."""
        return Started()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take metrics of a step, some of which may be NaN or infinite. A step may come several times,
        each time with other metrics; steps never decrease."""

    def event(self, event: Event) -> None:
        """Take an event of a detector."""

    def picture(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        """Take a picture [H, W, 3], RGB."""

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Take histograms by name."""

    def summary(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the figures that describe the run as a whole, each time that one has changed."""

    def close(self) -> None:
        """Send what is not sent, and end."""
