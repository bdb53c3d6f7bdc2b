"""DALI as a library: whether it is there, its version, a pipeline built, the cause in its errors. No
torch."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastmoco_pipelines.errors import DecoderBrokenError, install_command
from fastmoco_pipelines.spec import require

if TYPE_CHECKING:
    from nvidia.dali import Pipeline


_WITHOUT_DOCSTRINGS = sys.flags.optimize > 1
WHY, CURE = (
    (
        "cannot be imported by python -OO (PYTHONOPTIMIZE=2)",
        "python -O leaves in the docstrings that DALI extends",
    )
    if _WITHOUT_DOCSTRINGS
    else (
        "is not installed",
        f"{install_command('cuda13')} installs it (cuda12 for CUDA 12 drivers)",
    )
)
"""Why DALI is not used where it is not, and what to do."""
WITHOUT_DALI = (
    f"NVIDIA DALI {WHY}: Pillow decodes the images, to the same views; a GPU needs DALI: {CURE}"
)
"""What a user of the CPU is told once. On few cores Pillow decodes as fast: both use libjpeg-turbo."""

DISTRIBUTIONS = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
"""Names of DALI's wheels."""


@functools.cache
def has_dali() -> bool:
    """Whether DALI is installed, without importing it."""
    if _WITHOUT_DOCSTRINGS:
        return False
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # there is no `nvidia` either
        return False


def require_dali(name: str, value: object, otherwise: str) -> None:
    """Refuse a value that needs DALI where DALI is not installed.

    Args:
        name: the field.
        value: what it holds.
        otherwise: what to do without DALI.

    Raises:
        ValueError: naming both cures.
    """
    rule = f"needs NVIDIA DALI, which {WHY}: {CURE}; or {otherwise}"
    require(has_dali(), name, value, rule)


def load_dali() -> None:
    """Import DALI now, if it is installed. It registers its exit handler, which runs after those
    that are registered later.

    Raises:
        DecoderBrokenError: if it is installed and cannot be imported.
    """
    if not has_dali():
        return
    try:
        import nvidia.dali  # noqa: F401
    except (ImportError, OSError) as error:
        raise DecoderBrokenError(
            f"NVIDIA DALI is installed and cannot be imported ({type(error).__name__}: {error}): "
            "fastmoco doctor names the cure; a CPU does without DALI, if it is uninstalled"
        ) from error


def dali_version() -> str | None:
    """DALI's version; None where it is not installed. Its import takes a second, so the version is
    that of the installed distribution, if there is one."""
    if not has_dali():
        return None
    if "nvidia.dali" not in sys.modules:
        for distribution in DISTRIBUTIONS:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                return importlib.metadata.version(distribution)
    try:
        import nvidia.dali as dali
    except ImportError:
        return None
    return str(dali.__version__)


def build_pipeline(graph: Callable[[], Any], **options: Any) -> Pipeline:
    """A pipeline that can run.

    Args:
        graph: builds the graph; returns its outputs.
        options: of DALI's `pipeline_def`.
    """
    from nvidia.dali import pipeline_def

    _leave_to_the_parent()
    pipeline: Pipeline = pipeline_def(graph, **options)()
    pipeline.build()
    return pipeline


@functools.cache
def _leave_to_the_parent() -> None:
    """Processes that are forked from this one, such as workers of a DataLoader, do not collect the
    pipelines that they inherit: to end one would wait for its threads, which only the parent has.
    """
    os.register_at_fork(after_in_child=gc.freeze)


def cause_of(error: Exception) -> str:
    """The cause in an error of DALI, without the traceback of the graph around it."""
    found = re.search(r"encountered:\s*(.+)", str(error))
    return found[1] if found else str(error)
