"""A run of a few steps that is measured: built without evaluations in a temporary folder, and
brought to rest before a clock starts."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from fastmoco.config import Config
from fastmoco.distributed.mesh import World
from fastmoco.telemetry.memory import resident_peak
from fastmoco.training.trainer import Trainer
from fastmoco_pipelines import Loader

_SETTLE_S = 120.0
_POLL_S = 0.002


@contextlib.contextmanager
def short_run(config: Config, world: World, *, within: Path | None = None) -> Iterator[Trainer]:
    """A run of a config without evaluations; its folder is removed afterwards.

    Args:
        config: of the run.
        world: this process.
        within: folder of the run's folder; None: that of the system for temporary files.

    Raises:
        ValueError: for a config that is refused.
    """
    config = replace(
        config,
        knn=replace(config.knn, test_shards="", images="", holdout="", every_epochs=0),
        accuracy=replace(config.accuracy, test_shards="", every_epochs=0),
    )
    with tempfile.TemporaryDirectory(prefix="fastmoco-short-", dir=within) as folder:
        trainer = Trainer.build(config, Path(folder) / "run", world)
        try:
            yield trainer
        finally:
            trainer.close()


def settle(trainer: Trainer, *, loader: bool) -> None:
    """Wait for the device; on demand also until the loader has made all its batches ahead."""
    device = trainer.world.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if loader and isinstance(trainer.loader, Loader):
        until = time.monotonic() + _SETTLE_S
        while not trainer.loader.resting and time.monotonic() < until:
            time.sleep(_POLL_S)


def peak_bytes(device: torch.device) -> int:
    """The largest memory that was in use: tensors on a GPU, on a CPU the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident_peak()
