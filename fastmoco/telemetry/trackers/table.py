"""The trackers that are known by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_HERE = "fastmoco.telemetry.trackers"


@dataclass(frozen=True, kw_only=True)
class Tracker:
    """Where a tracker is implemented, and what it needs."""

    sink: str
    """Module and class, as `module:Class`."""
    module: str = ""
    """What must be installed; "": nothing."""
    extra: str = ""
    """The extra of fastmoco that installs it."""
    preload: str = ""
    """What is imported before its thread begins, of one in the process of the run."""
    own_process: bool = True
    """Whether it runs in a process of its own: what has a network, or is not known here. It could
    hang, hold the interpreter, or keep the process from ending."""


TRACKERS: Mapping[str, Tracker] = {
    "tensorboard": Tracker(
        sink=f"{_HERE}.tensorboard:TensorBoardSink",
        module="tensorboard",
        extra="logging",
        preload="torch.utils.tensorboard",
        own_process=False,
    ),
    "wandb": Tracker(sink=f"{_HERE}.wandb:WandbSink", module="wandb", extra="wandb"),
    "mlflow": Tracker(sink=f"{_HERE}.mlflow:MlflowSink", module="mlflow", extra="mlflow"),
    "trackio": Tracker(sink=f"{_HERE}.trackio:TrackioSink", module="trackio", extra="trackio"),
}


def tracker(name: str) -> Tracker:
    """A tracker by its name, or of a user's own class `module:Class`."""
    return TRACKERS[name] if name in TRACKERS else Tracker(sink=name)
