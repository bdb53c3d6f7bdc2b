"""The number of classes of a run that learns them: of its config, its checkpoint or its images."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from fastmoco.checkpoint import Checkpoint
from fastmoco.config import Config
from fastmoco.distributed.first_rank import first_rank_does
from fastmoco.distributed.mesh import World
from fastmoco_pipelines import ShardSet


def with_classes(
    config: Config, world: World, checkpoint: Checkpoint | None, *, may_open: bool = True
) -> Config:
    """The config with the number of classes in place of 0. All ranks call this together.

    Args:
        config: of the run.
        world: this process among its peers.
        checkpoint: that the run continues from, with the number it began with.
        may_open: whether the training set may be opened to count its classes; otherwise, and without
            a set, 0 may stay.

    Raises:
        ValueError: for synthetic images, which have any number of classes.
        ShardError: if the set cannot be opened, or images have no label.
    """
    if config.objective.label_count != 0:
        return config
    saved: dict[str, Any] = checkpoint.state["config"]["objective"] if checkpoint else {}
    count = 0
    if saved.get("kind") == config.objective.kind:
        count = int(saved.get("classes", 0))
    if not count and not (may_open and (config.data.shards or config.data.synthetic)):
        return config
    if not count and config.data.synthetic:
        raise ValueError(
            "objective.classes=0: synthetic images have as many classes as you say; give "
            "--objective.classes N"
        )
    if not count:
        count = int(first_rank_does(world, "classes", lambda: json.dumps(_counted(config))))
    return replace(config, objective=replace(config.objective, **{"classes": count}))


def _counted(config: Config) -> int:
    """Classes of the training set."""
    with ShardSet.open(config.data.shards, cache=config.data) as shards:
        shards.require_labels(config.data.shards)
        return shards.class_count
