"""How a benchmark is taken: alternating segments, medians, ratios within one run."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping
from typing import Any

import torch


def interleave(measures: Mapping[str, Callable[[], float]], *, rounds: int) -> dict[str, list[float]]:
    """Take each measurement once a round, in turn, so that a noisy neighbour hits all of them alike.

    Args:
        measures: by name; each call returns one figure.
        rounds: measurements of each.

    Raises:
        ValueError: if ``rounds`` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: needs at least one")
    figures: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            figures[name].append(measure())
    return figures


def ratios(numerator: list[float], denominator: list[float]) -> dict[str, float]:
    """Median, smallest and largest of the ratios of measurements that were taken side by side."""
    each = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return {"median": statistics.median(each), "smallest": min(each), "largest": max(each)}


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    described: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "cpu": _cpu_model(),
        "commit": _commit(),
    }
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    return described


def _cpu_model() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    """The commit of the tree, with a plus sign where it is changed."""
    shown = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=False)
    return shown.stdout.strip() or "unknown"
