"""Speed of training: images per second, the share of time spent waiting for data, and when it will be done.

Wall clock only: nothing here touches a tensor or waits for a device. On a GPU the figures are right over an interval, because
the log step at its end waits for the device once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

SMOOTHING = 0.3
"""Weight of the newest interval in the time per step from which the ETA is computed."""


class Speed(NamedTuple):
    """Figures of one log interval."""

    images_per_s: float
    """Images of the global batch (each gives two views) per second of training, evaluation and saving left out."""
    wait_share: float
    """Share of that time the host stood waiting for the loader, 0 to 1."""
    eta_s: float
    """Seconds of training until the last step; evaluation and saving come on top."""


class Throughput:
    """Meter of one training run; `step` after every step, `report` at every log step."""

    def __init__(
        self,
        *,
        global_batch_size: int,
        total_steps: int,
        first_step: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Start the clock.

        Args:
            global_batch_size: images of one step over all ranks.
            total_steps: optimizer steps of the whole run.
            first_step: the step this process starts with, above 0 after a resume.
            clock: seconds, monotonic.
        """
        self._batch, self._total, self._done, self._clock = global_batch_size, total_steps, first_step, clock
        self._start = clock()
        self._steps, self._waited, self._paused = 0, 0.0, 0.0
        self._seconds_per_step: float | None = None
        self._last = Speed(0.0, 0.0, 0.0)

    def step(self, wait_seconds: float) -> None:
        """Count one finished step, of which the host waited `wait_seconds` for the loader."""
        self._steps += 1
        self._done += 1
        self._waited += wait_seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside (evaluation, saving) out of every figure."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - start

    def report(self) -> Speed:
        """Figures since the last report, and start the next interval. Without a step in between: the last figures."""
        if self._steps == 0:
            return self._last
        now = self._clock()
        wall = now - self._start
        training = max(wall - self._paused, 1e-9)
        newest, smoothed = training / self._steps, self._seconds_per_step
        smoothed = newest if smoothed is None else smoothed + SMOOTHING * (newest - smoothed)
        self._last = Speed(
            images_per_s=self._steps * self._batch / training,
            wait_share=min(1.0, self._waited / training),
            eta_s=max(0, self._total - self._done) * smoothed,
        )
        self._seconds_per_step, self._start = smoothed, now
        self._steps, self._waited, self._paused = 0, 0.0, 0.0
        return self._last
