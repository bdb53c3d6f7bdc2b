"""Speed of training: images per second, the share of time that it waits for
data, and the time left.

It reads the clock only and never waits for a device. On a GPU the figures are correct over an
interval, because the log step at its end waits for the device once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

SMOOTHING = 0.3
"""Weight of the newest interval in the smoothed time per step, for the ETA."""


class Speed(NamedTuple):
    """Figures of one log interval."""

    images_per_s: float
    """Images, not views, per second of training, without evaluation and saving."""
    wait_share: float
    """Share of that time that the host waited for the loader, 0 to 1."""
    eta_s: float
    """Seconds of training until the last step, without evaluation and saving. NaN after the first
    step alone: it fills caches, and may compile."""


class Throughput:
    """Meter of one run. Call `step` after every step and `report` at every log step."""

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
            first_step: the step at which this process starts, above 0 after a resume.
            clock: seconds, monotonic.
        """
        self._batch = global_batch_size
        self._total = total_steps
        self._done = first_step
        self._clock = clock
        self._start = clock()
        # Since the last report.
        self._steps = 0
        self._waited = 0.0
        self._paused = 0.0
        self._seconds_per_step: float | None = None
        self._reported = False
        self._last = Speed(0.0, 0.0, 0.0)

    def step(self, wait_seconds: float) -> None:
        """Count one finished step, of which the host waited `wait_seconds` for the loader."""
        self._steps += 1
        self._done += 1
        self._waited += wait_seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside (evaluation, saving) from every figure."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - start

    def report(self) -> Speed:
        """Return the figures since the last report and start the next interval;
        without a step the last figures again.
        """
        if self._steps == 0:
            return self._last
        now = self._clock()
        wall = now - self._start
        training = max(wall - self._paused, 1e-9)

        newest = training / self._steps
        left = self._total - self._done
        start_up = not self._reported and self._steps == 1 and left > 0
        smoothed = self._seconds_per_step
        smoothed = newest if smoothed is None else smoothed + SMOOTHING * (newest - smoothed)
        self._last = Speed(
            images_per_s=self._steps * self._batch / training,
            wait_share=min(1.0, self._waited / training),
            eta_s=math.nan if start_up else max(0, left) * smoothed,
        )

        if not start_up:
            self._seconds_per_step = smoothed
        self._reported = True
        self._start = now
        self._steps = 0
        self._waited = 0.0
        self._paused = 0.0
        return self._last
