"""TensorBoard: scalars, pictures, histograms, events as text, and hyper-parameters.

Steps that are written again: the reader hides everything from the first step of the newer process
on, so the curve is that of the resumed run.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmoco.run.events import Event
from fastmoco.telemetry.trackers.interface import Histogram, Sink, Started, TrackedRun
from fastmoco_pipelines.files.whole import utf8_name


class TensorBoardSink(Sink):
    """Event files in the folder `tensorboard` of a run."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._writer: Any = None

    def start(self, run: TrackedRun) -> Started:
        """Open an event file of a name that nobody knows before; earlier values from `first_step` on
        are hidden.

        Raises:
            ImportError: if TensorBoard is not installed.
        """
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self._open.enter_context(_silent_threads())
        folder = Path(run.folder) / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        place = self._open.enter_context(utf8_name(folder))
        suffix = f".{secrets.token_hex(4)}"
        self._writer = SummaryWriter(
            log_dir=place, purge_step=run.first_step, filename_suffix=suffix
        )

        # The page of hyper-parameters shows these metrics, the last value of each.
        shown = {name: _plain(value) for name, value in run.config.items()}
        metrics = [*run.measures, *(f"{name}_best" for name in run.measures)]
        for part in hparams(shown, dict.fromkeys(metrics, 0.0)):
            self._writer.file_writer.add_summary(part)
        return Started()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one scalar for each metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def event(self, event: Event) -> None:
        """Add the text, and the size as a scalar."""
        self._writer.add_text(f"event/{event.name}", event.text, event.step)
        if event.size is not None:
            self._writer.add_scalar(f"event_size/{event.name}", event.size, event.step)

    def picture(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        """Add a picture."""
        self._writer.add_image(name, image, step, dataformats="HWC")

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Add the histograms with the counts that they have."""
        for name, found in histograms.items():
            self._writer.add_histogram_raw(
                name,
                min=found.edges[0],
                max=found.edges[-1],
                num=sum(found.counts),
                sum=found.total,
                sum_squares=found.squares,
                bucket_limits=found.edges[1:],
                bucket_counts=found.counts,
                global_step=step,
            )

    def summary(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add what the page of hyper-parameters shows beside the scalars of the run."""
        self.write(step, {name: v for name, v in metrics.items() if name.endswith("_best")})

    def close(self) -> None:
        """Flush and close; may be called more than once."""
        with self._open:
            if self._writer is not None:
                self._writer.close()


@contextmanager
def _silent_threads() -> Iterator[None]:
    """A context in which the thread that writes an event file ends without a traceback. TensorBoard
    raises its error, such as that of a full disk, again in the next call."""
    before = threading.excepthook

    def told(error: threading.ExceptHookArgs) -> None:
        if not type(error.thread).__module__.startswith("tensorboard."):
            before(error)

    threading.excepthook = told
    try:
        yield
    finally:
        if threading.excepthook is told:
            threading.excepthook = before


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else str(value)
