"""All trackers of a run: where its records go beside `metrics.jsonl`."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fastmoco.run.events import Event
from fastmoco.telemetry.trackers.interface import Histogram, Sink, TrackedRun
from fastmoco.telemetry.trackers.isolated import Isolated
from fastmoco.telemetry.trackers.outlet import Outlet
from fastmoco.telemetry.trackers.table import Tracker, tracker

CLOSE_S = 10.0
"""Seconds for all trackers together to send what they have, at the end of a run."""


class Trackers:
    """The trackers of a run, each behind its own queue. No method raises or waits, except `close`.

    Args:
        names: of `table.TRACKERS`, or `module:Class`.
        run: what they get to know of it.
        tell: shows a sentence to the user; called by this thread alone.
    """

    def __init__(
        self, names: Sequence[str], run: TrackedRun, *, tell: Callable[[str], None]
    ) -> None:
        self._tell = tell
        self._outlets: list[Outlet] = []
        for name in dict.fromkeys(names):
            known = tracker(name)
            if known.module and not _installed(known.module):
                self._tell(_missing(name, known))
            else:
                _preload(known)
                self._outlets.append(Outlet(name, _maker(known), run))

    @property
    def active(self) -> bool:
        """Whether there are any."""
        return bool(self._outlets)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send metrics of a step; they must not change afterwards."""
        self._put("write", step, step, metrics)

    def event(self, event: Event) -> None:
        """Send an event."""
        self._put("event", event.step, event)

    def picture(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        """Send a picture [H, W, 3]."""
        self._put("picture", step, step, name, image)

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Send histograms by name."""
        self._put("histograms", step, step, histograms)

    def summary(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the figures of the whole run."""
        self._put("summary", step, step, metrics)

    def news(self) -> None:
        """Show what the trackers have to say."""
        for outlet in self._outlets:
            for text in outlet.news():
                self._tell(text)

    def close(self, seconds: float | None = None) -> None:
        """Let all trackers send what they have, for `CLOSE_S` or other seconds; may be called more
        than once."""
        deadline = time.monotonic() + (CLOSE_S if seconds is None else seconds)
        for outlet in self._outlets:
            outlet.finish()
        for outlet in self._outlets:
            outlet.join(deadline)
        self.news()
        self._outlets = []

    def _put(self, method: str, step: int, *arguments: object) -> None:
        for outlet in self._outlets:
            outlet.put(method, step, *arguments)


def _maker(known: Tracker) -> Callable[[], Sink]:
    def make() -> Sink:
        if known.own_process:
            return Isolated(known.sink)
        module, _, kind = known.sink.partition(":")
        made: Sink = getattr(importlib.import_module(module), kind)()
        return made

    return make


def _preload(known: Tracker) -> None:
    """Import what a tracker in this process needs: two threads that import the same packages can get
    in each other's way. If it fails, the sink says why."""
    if known.preload:
        with contextlib.suppress(Exception):
            importlib.import_module(known.preload)


def _installed(module: str) -> bool:
    """Whether a module could be imported; the folder that W&B leaves behind is none."""
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return False
    return found is not None and found.origin is not None


def _missing(name: str, known: Tracker) -> str:
    """What is said of a tracker that is not installed."""
    if name == "tensorboard":
        return "TensorBoard is not installed: metrics are written to metrics.jsonl only"
    return (
        f"warning: trackers.use: {name} is not installed (pip install 'fastmoco[{known.extra}]'); "
        "the run goes on without it, and metrics.jsonl is complete"
    )
