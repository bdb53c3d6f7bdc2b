"""DALI as a library: imported, its version, a pipeline built, the cause in its errors. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nvidia.dali import Pipeline


def load_dali() -> None:
    """Import DALI now. It registers its exit handler, which runs after those that are registered
    later.

    Raises:
        ModuleNotFoundError: if it is not installed.
    """
    import nvidia.dali  # noqa: F401


def dali_version() -> str | None:
    """DALI's version; None where it is not installed."""
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

    pipeline: Pipeline = pipeline_def(graph, **options)()
    pipeline.build()
    return pipeline


def cause_of(error: Exception) -> str:
    """The cause in an error of DALI, without the traceback of the graph around it."""
    found = re.search(r"encountered:\s*(.+)", str(error))
    return found[1] if found else str(error)
