"""The config of a run: a tree of frozen dataclasses that check their values when constructed.

Imports neither torch nor DALI.
"""

from __future__ import annotations

from fastmoco.config.data import AccuracyConfig, DataConfig, KnnConfig
from fastmoco.config.faults import FaultConfig
from fastmoco.config.model import AttentionBackend, ModelConfig
from fastmoco.config.objective import MoCoV3Config, ObjectiveConfig
from fastmoco.config.optim import OptimConfig
from fastmoco.config.parallel import ParallelConfig
from fastmoco.config.resolve import Resolved, resolve, schedule_notes
from fastmoco.config.run import BatchConfig, CheckpointConfig, Config
from fastmoco.config.trackers import TrackersConfig

__all__ = [
    "AccuracyConfig",
    "AttentionBackend",
    "BatchConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "FaultConfig",
    "KnnConfig",
    "MoCoV3Config",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "ParallelConfig",
    "Resolved",
    "TrackersConfig",
    "resolve",
    "schedule_notes",
]
