"""Measuring: alternating segments, medians, ratios within one run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def interleave(
    measures: Mapping[str, Callable[[], float]], *, rounds: int
) -> dict[str, list[float]]:
    """Take each measurement once per round, in turn, so that other load on the
    machine affects all of them equally.

    Args:
        measures: by name; each call returns one figure.
        rounds: number of measurements of each.

    Raises:
        ValueError: if `rounds` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: needs at least one")
    figures: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            figures[name].append(measure())
    return figures


def ratios(numerator: list[float], denominator: list[float]) -> dict[str, float]:
    """Median and quantiles of the ratio of paired measurements."""
    return quantiles([a / b for a, b in zip(numerator, denominator, strict=True)])


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """`median`, and `q20` and `q80`: one value in five is below, one above."""
    if len(values) == 1:
        return dict.fromkeys(("median", "q20", "q80"), values[0])
    q20, *_, q80 = statistics.quantiles(values, n=5, method="inclusive")
    return {"median": statistics.median(values), "q20": q20, "q80": q80}


def machine() -> dict[str, Any]:
    """Description of the machine. Missing information is "unknown", so that it
    never fails a result.
    """
    described: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "cores": len(os.sched_getaffinity(0)),
        "cpu": _cpu_model(),
        "commit": commit(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        described["gpu"] = properties.name
        described["gpu_gib"] = round(properties.total_memory / 2**30, 1)
        described["driver"] = _driver()
    return described


def commit() -> str:
    """The commit of the tree, with a plus sign if the tree is modified; without
    git the value of `FASTMOCO_COMMIT`.
    """
    if commit := os.environ.get("FASTMOCO_COMMIT"):
        return commit
    here = Path(__file__).resolve().parent
    return _output(["git", "-C", str(here), "describe", "--always", "--dirty=+"]) or "unknown"


def _driver() -> str:
    """Version of NVIDIA's driver."""
    shown = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return shown.splitlines()[0] if shown else "unknown"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def _output(command: list[str]) -> str:
    """Output of a program; "" if it is missing, fails or hangs."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
