"""Runs that wait in a step, so that a test meets them there however fast or slow its machine is."""

from __future__ import annotations

import time
from typing import Any

WORDS = "from tests.held_steps import hold; hold({after})"
"""For the beginning of a process that trains."""
SITE = """
import os, sys
if {"RANK", "SLURM_PROCID"} & os.environ.keys() or "train" in sys.orig_argv:
    from tests.held_steps import hold
    hold(%d)
"""
"""A `sitecustomize.py` for the processes that another program starts."""


def hold(after: int) -> None:
    """The step after this many waits until its process is asked to stop, or is killed."""
    from fastmoco.faults.stop_signal import StopSignal
    from fastmoco.training.trainer import Trainer

    enter, step, stops = StopSignal.__enter__, Trainer.step, list[StopSignal]()

    def entered(self: StopSignal) -> StopSignal:
        stops.append(self)
        return enter(self)

    def held(self: Trainer, *arguments: Any, **options: Any) -> Any:
        while self.step_count == after and stops[-1].received is None:
            time.sleep(0.01)
        return step(self, *arguments, **options)

    StopSignal.__enter__ = entered  # type: ignore[method-assign]
    Trainer.step = held  # type: ignore[method-assign]
