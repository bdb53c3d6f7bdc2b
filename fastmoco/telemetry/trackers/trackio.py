"""trackio: https://huggingface.co/docs/trackio, on this machine or in a Space.

Steps that are written again are not sent again: trackio would keep both rows. Its database has the
last step.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmoco.run.events import Event
from fastmoco.telemetry.trackers.interface import Histogram, Sink, Started, TrackedRun

_REMOTE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


class TrackioSink(Sink):
    """One run of trackio. It finds a run by its name, so the name ends with the id."""

    def __init__(self) -> None:
        self._trackio: Any = None
        self._run: Any = None

    def start(self, run: TrackedRun) -> Started:
        """Begin or continue the run, in the database of TRACKIO_DIR."""
        if run.mode == "offline":
            for variable in _REMOTE:
                os.environ.pop(variable, None)
        import trackio

        self._trackio = trackio
        project = run.project or os.environ.get("TRACKIO_PROJECT") or "fastmoco"
        name = f"{run.name}-{run.id[:7]}"
        self._run = trackio.init(
            project=project, name=name, resume="allow", config=dict(run.config), embed=False
        )
        return Started(
            last_step=self._run._next_step - 1,  # trackio keeps it private
            where=f"trackio show --project {project}",
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics."""
        self._run.log(dict(metrics), step=step)

    def event(self, event: Event) -> None:
        """Log the size of the event, 1 if it has none, and raise an alert with its text."""
        size = 1.0 if event.size is None else event.size
        self._run.log({f"event/{event.name}": size}, step=event.step)
        self._run.alert(title=event.name, text=event.text, step=event.step)

    def picture(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        """Log a picture."""
        self._run.log({name: self._trackio.Image(image)}, step=step)

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Log the histograms."""
        made = {
            name: self._trackio.Histogram(np_histogram=(found.counts, found.edges))
            for name, found in histograms.items()
        }
        self._run.log(made, step=step)

    def summary(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the figures that the metrics do not have."""
        self.write(step, {name: v for name, v in metrics.items() if name.endswith("_best")})

    def close(self) -> None:
        """Write what is left."""
        self._run.finish()
