"""Processor time of a loader and its workers, between two idle moments.

Wall-clock time of a shared machine is unreliable. A loader prefetches into bounded buffers, so
between two moments at which they are full it makes as many batches as are taken.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.loading import Feed


def cpu_seconds() -> float:
    """Processor time of this process and of its living workers."""
    ticks = 0
    for worker in multiprocessing.active_children():
        words = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(words[11]) + int(words[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def settle(feed: Feed, quiet_s: float = 0.1, at_most_s: float = 60.0) -> None:
    """Wait until the buffers of a feed are full and its workers idle."""
    until = time.monotonic() + at_most_s
    while time.monotonic() < until:
        before, resting = cpu_seconds() - time.process_time(), True
        for _ in range(10):
            time.sleep(quiet_s / 10)
            resting = resting and feed.resting()
        if resting and cpu_seconds() - time.process_time() - before < 0.005:
            return


def images_per_cpu_second(feed: Feed, images: int, batches: int) -> Callable[[], float]:
    """A measurement of some batches with the given total of images, between two idle moments."""

    def measure() -> float:
        settle(feed)
        before = cpu_seconds()
        for _ in range(batches):
            feed.next()
        settle(feed)
        return images / (cpu_seconds() - before)

    return measure


def images_per_second(
    feed: Feed, images: int, batches: int, device: torch.device
) -> Callable[[], float]:
    """By wall-clock time, after the prefetched batches are used up."""

    def measure() -> float:
        for _ in range(4):
            feed.next()
        _wait_for(device)
        began = time.perf_counter()
        for _ in range(batches):
            feed.next()
        _wait_for(device)
        return images / (time.perf_counter() - began)

    return measure


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
