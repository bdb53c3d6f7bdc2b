"""MLflow: https://mlflow.org, also as mlflow-skinny.

Steps that are written again are not sent again: MLflow would keep both values. The run has its last
step as a tag, which is stored with each step's metrics.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmoco.run.events import Event
from fastmoco.telemetry.trackers.interface import Histogram, Sink, Started, TrackedRun

RUN, STEP = "fastmoco.run_id", "fastmoco.last_step"
"""Tags of a run: the id by which it is found again, and its last step."""
_MOST_PARAMS, _LONGEST = 100, 500
"""Parameters of one request, and characters of a value, that every server takes."""
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""Its own patience would be minutes, in which the queue fills, and it would report its use."""


class MlflowSink(Sink):
    """One run of MLflow, found again by a tag."""

    def __init__(self) -> None:
        self._client: Any = None
        self._id = ""
        self._last = -1
        self._total = 0

    def start(self, run: TrackedRun) -> Started:
        """Begin or continue the run, at `uri`, else MLFLOW_TRACKING_URI, else in the folder `mlruns`
        of the run. Offline it is that folder, unless the given place is on this machine."""
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        own = (Path(run.folder) / "mlruns").as_uri()
        uri = run.uri or os.environ.get("MLFLOW_TRACKING_URI") or own
        if run.mode == "offline" and not stays_here(uri):
            uri = own
        if uri.startswith("file:") or ":" not in uri:
            os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # MLflow 3 asks for this word
        from mlflow import MlflowClient
        from mlflow.entities import Param, RunTag

        self._client = client = MlflowClient(tracking_uri=uri)
        self._total = run.total_steps
        project = run.project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "fastmoco"
        experiment = client.get_experiment_by_name(project)
        number = experiment.experiment_id if experiment else client.create_experiment(project)

        # The run of this id, or a new one.
        given = os.environ.get("MLFLOW_RUN_ID")
        known = [client.get_run(given)] if given else []
        known = known or client.search_runs([number], filter_string=f"tags.`{RUN}` = '{run.id}'")
        found = (
            known[0] if known else client.create_run(number, tags={RUN: run.id}, run_name=run.name)
        )
        self._id = found.info.run_id
        self._last = int(found.data.tags.get(STEP, -1))
        if known:
            client.update_run(self._id, status="RUNNING")

        # A parameter cannot be changed: what a resumed run may change is a tag.
        before = found.data.params
        params = {name: str(value)[:_LONGEST] for name, value in run.config.items()}
        new = [Param(name, value) for name, value in params.items() if name not in before]
        for first in range(0, len(new), _MOST_PARAMS):
            client.log_batch(self._id, params=new[first : first + _MOST_PARAMS])
        changed = {k: v for k, v in params.items() if k in before and before[k] != v}
        if changed:
            tags = [RunTag(f"changed.{name}", value) for name, value in changed.items()]
            client.log_batch(self._id, tags=tags)
        return Started(last_step=self._last, where=f"{uri} (experiment {project}, run {self._id})")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics, and the step as a tag, in one request."""
        from mlflow.entities import Metric, RunTag

        now = int(time.time() * 1000)
        rows = [Metric(name, value, now, step) for name, value in metrics.items()]
        self._last = max(self._last, step)
        self._client.log_batch(self._id, metrics=rows, tags=[RunTag(STEP, str(self._last))])

    def event(self, event: Event) -> None:
        """Log the size of the event, 1 if it has none, and its text as a tag."""
        self.write(event.step, {f"event/{event.name}": 1.0 if event.size is None else event.size})
        self._client.set_tag(self._id, f"event.{event.name}", str(event))

    def picture(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        """Store the picture as an artifact."""
        from PIL import Image

        self._client.log_image(self._id, Image.fromarray(image), f"{name}-{step}.png")

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Store the histograms as an artifact: MLflow has none."""
        rows = {
            name: {"edges": found.edges, "counts": found.counts}
            for name, found in histograms.items()
        }
        self._client.log_dict(self._id, rows, f"histograms/{step}.json")

    def summary(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the figures that the metrics do not have."""
        self.write(step, {name: v for name, v in metrics.items() if name.endswith("_best")})

    def close(self) -> None:
        """Mark the run as finished, or as killed if steps are left."""
        status = "FINISHED" if self._last >= self._total else "KILLED"
        self._client.set_terminated(self._id, status)


def stays_here(uri: str) -> bool:
    """Whether a store is a folder or a file of this machine; one that is not known is not."""
    scheme, colon, rest = uri.partition(":")
    if not colon:
        return uri not in ("databricks", "databricks-uc")
    has_host = rest.startswith("//") and not rest.startswith("///")
    return scheme == "sqlite" or (scheme == "file" and not has_host)
