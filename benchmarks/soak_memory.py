"""Memory, open files and threads of a process over time, and whether they are flat.

RSS is not sufficient: its file-backed part (`RssFile`) is libraries and page cache that the kernel
may reclaim. A leak grows `RssAnon`, open files or threads.

**Flat** means: a straight line fitted by least squares to all samples of the second half of a run
rises by at most 5 % of their mean (RssAnon), or by at most 5 (files, threads), from one end to the
other. The first half is warm-up, in which a heap grows to its largest need. The line is over all
samples, because single ones vary by several per cent.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MARKS = (0.1, 0.25, 0.5, 0.75, 1.0)
"""Shares of a run at which a report shows the resources."""
ALLOWED_SHARE = 0.05
ALLOWED_COUNT = 5.0
_SAMPLES = 400
_LEAST_SAMPLES = 20  # in the second half: fewer do not determine a line


class MemorySample(NamedTuple):
    """Resources of a process at one time.

    Attributes:
        seconds: since the start of the run.
        anon_mib: RssAnon: heaps and stacks.
        file_mib: RssFile: pages of libraries and mapped files.
        files: open descriptors.
        threads: of the process.
    """

    seconds: float
    anon_mib: float
    file_mib: float
    files: int
    threads: int


@dataclass(frozen=True, slots=True)
class Rise:
    """Increase of a resource over the second half of a run, and the allowed increase."""

    name: str
    rise: float
    allowed: float
    unit: str = ""

    @property
    def flat(self) -> bool:
        """Whether the increase is allowed. A decrease is flat."""
        return self.rise <= self.allowed

    def __str__(self) -> str:
        return f"{self.name} {self.rise:+.1f}{self.unit} ({self.allowed:.1f} allowed)"


def sample_memory(seconds: float) -> MemorySample:
    """Resources of this process now, `seconds` after the start of the run."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    status = {
        words[0]: int(words[1])
        for words in lines
        if words[0] in ("RssAnon:", "RssFile:", "Threads:")
    }
    files = len(os.listdir("/proc/self/fd")) - 1  # without the descriptor of listdir
    anon, file = status["RssAnon:"] / 1024, status["RssFile:"] / 1024
    return MemorySample(
        round(seconds, 2), round(anon, 1), round(file, 1), files, status["Threads:"]
    )


class MemoryLog:
    """Samples of this process, evenly spaced over a run.

    Args:
        duration: of the run in seconds.
    """

    def __init__(self, duration: float) -> None:
        self.samples: list[MemorySample] = []
        self._pause = duration / _SAMPLES
        self._start = time.monotonic()

    def look(self) -> None:
        """Take a sample if one is due."""
        now = time.monotonic() - self._start
        if not self.samples or now >= self.samples[-1].seconds + self._pause:
            self.samples.append(sample_memory(now))


def at_marks(samples: Sequence[MemorySample], duration: float) -> list[MemorySample]:
    """The sample nearest to each of `MARKS`; empty without samples."""
    return [
        min(samples, key=lambda sample: abs(sample.seconds - mark * duration))
        for mark in MARKS
        if samples
    ]


def rises(samples: Sequence[MemorySample], duration: float) -> list[Rise]:
    """Increases over the second half of a run of `duration` seconds; empty with
    too few samples there.
    """
    second = [sample for sample in samples if sample.seconds >= duration / 2]
    if len(second) < _LEAST_SAMPLES:
        return []
    at = np.array([sample.seconds for sample in second])
    anon = np.array([sample.anon_mib for sample in second])
    return [
        Rise("RssAnon", _line_rise(at, anon), ALLOWED_SHARE * float(anon.mean()), " MiB"),
        Rise(
            "open files",
            _line_rise(at, np.array([float(sample.files) for sample in second])),
            ALLOWED_COUNT,
        ),
        Rise(
            "threads",
            _line_rise(at, np.array([float(sample.threads) for sample in second])),
            ALLOWED_COUNT,
        ),
    ]


def _line_rise(at: NDArray[np.float64], values: NDArray[np.float64]) -> float:
    """Increase of the least-squares line from the first to the last sample."""
    centred = at - at.mean()
    slope = float(centred @ values) / float(centred @ centred)
    return slope * float(at[-1] - at[0])
