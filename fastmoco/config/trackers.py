"""Config of trackers: where the records of a run go beside `metrics.jsonl`."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Literal

from fastmoco_pipelines.spec import require

KNOWN = ("tensorboard", "wandb", "mlflow", "trackio")
"""Trackers with a name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackersConfig:
    """TensorBoard, W&B, MLflow or trackio."""

    use: tuple[str, ...] = ("tensorboard",)
    """Any of tensorboard, wandb, mlflow and trackio, or a class of your own, `module:Class`. One that
    is not installed, fails or hangs is left out with a warning."""
    project: str = ""
    """Project of W&B and trackio, experiment of MLflow; empty: WANDB_PROJECT, TRACKIO_PROJECT or
    MLFLOW_EXPERIMENT_NAME, else `fastmoco`."""
    name: str = ""
    """Name of the run in the trackers; empty: that of its folder."""
    mode: Literal["online", "offline"] = "online"
    """`offline`: nothing leaves this machine; W&B writes files that `wandb sync` sends later."""
    uri: str = ""
    """Where MLflow stores the run; empty: MLFLOW_TRACKING_URI, else a folder `mlruns` of the run."""
    histogram_every: int = 10
    """Log steps between two histograms of the gradients; 0: none."""

    def __post_init__(self) -> None:
        for name in self.use:
            if name in KNOWN or re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
                continue
            near = difflib.get_close_matches(name, KNOWN, n=1)
            rule = f"must be any of {', '.join(KNOWN)}, or module:Class"
            require(False, "use", name, rule + (f"; is it {near[0]}?" if near else ""))
        require(self.mode in ("online", "offline"), "mode", self.mode, "must be online or offline")
        every = self.histogram_every
        require(every >= 0, "histogram_every", every, "must not be negative")
