"""Weights & Biases: https://docs.wandb.ai.

Steps that are written again are not sent again: a history of W&B only grows. Online W&B itself says
which step it has; offline the files of earlier processes in the folder of the run do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmoco.run.events import Event
from fastmoco.telemetry.trackers.interface import Histogram, Sink, Started, TrackedRun

INIT_S = 20
"""Seconds that the server has to accept a run, before the run is written offline."""
_BLOCK, _HEADER = 32768, 7
"""Bytes of a block of a `.wandb` file, and of the header of the file and of each part of a record."""


class WandbSink(Sink):
    """One run of W&B, in the folder `wandb` of a run, with the run's id."""

    def __init__(self) -> None:
        self._wandb: Any = None
        self._run: Any = None

    def start(self, run: TrackedRun) -> Started:
        """Begin or continue the run. Without an API key, or where the server does not answer, it is
        written offline."""
        if run.mode == "offline":
            os.environ["WANDB_ERROR_REPORTING"] = "false"
        import wandb

        self._wandb = wandb
        name = os.environ.get("WANDB_RUN_ID") or run.id
        mode = "offline" if run.mode == "offline" else os.environ.get("WANDB_MODE", "online")
        if mode == "online" and not (wandb.api.api_key or os.environ.get("WANDB_API_KEY")):
            mode = "offline"
        why = ""
        try:
            self._run = self._begin(run, name, mode)
        except (wandb.errors.CommError, wandb.errors.AuthenticationError, TimeoutError) as error:
            wandb.teardown(exit_code=0)
            mode, why = "offline", f", since {type(error).__name__}: {' '.join(str(error).split())}"
            self._run = self._begin(run, name, mode)

        # Metrics come with the step of the run; of an accuracy W&B shows the best.
        for measure in run.measures:
            self._run.define_metric(measure, summary="last,max")
        if mode == "disabled":
            return Started()
        if mode == "online":
            return Started(last_step=self._run.step - 1, where=str(self._run.url or ""))
        files = Path(run.folder) / "wandb"
        last = max(
            (_last_step(file) for file in files.glob(f"offline-run-*/run-{name}.wandb")), default=-1
        )
        return Started(last_step=last, where=f"{files} (offline{why}; to send it: wandb sync)")

    def _begin(self, run: TrackedRun, name: str, mode: str) -> Any:
        wandb = self._wandb
        settings = wandb.Settings(
            init_timeout=INIT_S,
            console="off",
            silent=True,
            disable_code=True,
            disable_git=True,
            x_save_requirements=False,
        )
        return wandb.init(
            project=run.project or os.environ.get("WANDB_PROJECT") or "fastmoco",
            name=run.name,
            id=name,
            resume="allow",
            mode=mode,
            dir=run.folder,
            config=dict(run.config),
            settings=settings,
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics."""
        self._run.log(dict(metrics), step=step)

    def event(self, event: Event) -> None:
        """Log the size of the event, 1 if it has none, and keep its text in the summary."""
        size = 1.0 if event.size is None else event.size
        self._run.log({f"event/{event.name}": size}, step=event.step)
        self._run.summary[f"event/{event.name}/last"] = str(event)

    def picture(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        """Log a picture."""
        self._run.log({name: self._wandb.Image(image)}, step=step)

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Log the histograms."""
        made = {
            name: self._wandb.Histogram(np_histogram=(found.counts, found.edges))
            for name, found in histograms.items()
        }
        self._run.log(made, step=step)

    def summary(self, step: int, metrics: Mapping[str, float]) -> None:
        """Set the summary."""
        self._run.summary.update(dict(metrics))

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


def _last_step(file: Path) -> int:
    """The last step in the history of a `.wandb` file; -1 if it has none."""
    from wandb.proto import wandb_internal_pb2

    last = -1
    for content in records(file):
        record = wandb_internal_pb2.Record.FromString(content)
        if record.WhichOneof("record_type") == "history":
            last = max(last, record.history.step.num)
    return last


def records(file: Path) -> Iterator[bytes]:
    """The records of a `.wandb` file, each a `wandb_internal_pb2.Record`, up to the end or to where
    it is cut short.

    The format is the log of LevelDB behind a header: blocks of 32 KiB, in which each part of a record
    has a checksum (4 bytes), a length (2), and a kind (1: whole, 2: first, 3: middle, 4: last).
    """
    at, parts = _HEADER, b""
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK):
            while at + _HEADER <= len(block):
                length, kind = int.from_bytes(block[at + 4 : at + 6], "little"), block[at + 6]
                part = block[at + _HEADER : at + _HEADER + length]
                if len(part) < length or not 1 <= kind <= 4:
                    return
                at += _HEADER + length
                parts = part if kind in (1, 2) else parts + part
                if kind in (1, 4):
                    yield parts
            at = 0
