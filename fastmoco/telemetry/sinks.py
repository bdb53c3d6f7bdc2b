"""The record of a run: JSON lines, written at once. Trackers get copies (`trackers`)."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastmoco.run.events import Event
from fastmoco.run.metrics_file import EVENT
from fastmoco_pipelines.files.small import open_regular


class JsonlSink:
    """One JSON object per line: `{"step": 20, "time": 1767225600.0, "loss": 3.41, ...}`.

    Every line is written with one call, so a killed run loses at most the line that it was writing,
    and several processes could append. NaN and infinity, which JSON does not have, become null. A
    line contains any subset of metrics, and a step may have several lines, such as one for the loss
    and one for kNN.
    """

    def __init__(self, path: Path) -> None:
        """Open `path` (mode 0600 if new) for appending. An incomplete last line of a killed run is
        ended, not continued.

        Raises:
            UnfitFileError: if it is a link, or no regular file.
            OSError: if it cannot be opened.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        self._descriptor = open_regular(path, flags, 0o600, follow=False)
        size = os.fstat(self._descriptor).st_size
        self._torn = size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n"

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of one step.

        Raises:
            OSError: if the file system fails.
        """
        self._append(
            step,
            {name: value if math.isfinite(value) else None for name, value in metrics.items()},
        )

    def event(self, event: Event) -> None:
        """Append an event as a line of its own (`run/events.py`).

        Raises:
            OSError: if the file system fails.
        """
        self._append(event.step, {EVENT: event.to_json()})

    def _append(self, step: int, content: Mapping[str, Any]) -> None:
        row = {"step": step, "time": round(time.time(), 3), **content}
        line = json.dumps(row, allow_nan=False) + "\n"
        data = memoryview((("\n" if self._torn else "") + line).encode())
        self._torn = True  # until the whole line is written: a full disk may accept a part of it
        while data:
            data = data[os.write(self._descriptor, data) :]
        self._torn = False

    def close(self) -> None:
        """Close the file; may be called more than once."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
