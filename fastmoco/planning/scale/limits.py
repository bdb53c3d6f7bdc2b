"""What grows with the batch and with the set, and where it breaks: each with its number.

Bytes and seconds of a step are those of the planner and of the model of scale. Figures of a set are
measured once (`python -m benchmarks run growth`, docs/data.md) and given per image.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fastmoco.config import Config
from fastmoco.planning.scale.layout import Layout
from fastmoco.planning.scale.messages import Ranks, step_messages
from fastmoco.planning.scale.report import Cluster, Planned

OPEN_CPU_S = 6.4e-8
"""CPU-seconds per image to open a set, by the first process of a machine."""
OPEN_BYTES = 0.19
"""Memory per image of an open set."""
INDEX_BYTES = 74
"""On disk, per image with a path."""
ORDER_BYTES = 0.5e6
"""Memory of the order of any set, which is computed for each batch."""
TABLE_BYTES = 20
"""Memory per image of an order that is stored as a table, as version 1 was."""
STATE_OF_LOADER = 8
"""Bytes that a checkpoint stores of the loader: the number of the step."""
KEPT_LOGITS = 2 * 2
"""Matrices that a plain loss keeps: logits and their softmax, in both directions."""
LARGE_KNN = 50_000
"""Images of a kNN bank during training by default (`knn.max_train_images`)."""


class Limit(NamedTuple):
    """One figure that grows."""

    what: str
    value: float
    unit: str
    grows_with: str
    note: str = ""


def batch_limits(
    config: Config,
    layout: Layout,
    planned: Planned,
    cluster: Cluster,
    report: dict[str, Any],
    precision: str,
) -> list[Limit]:
    """Of one GPU, for the batch of a config.

    Args:
        config: of the run.
        layout: of its objective.
        planned: the step of one GPU.
        cluster: the GPUs.
        report: `step_report` of the same.
        precision: of the run.
    """
    batch = config.global_batch_size
    images = batch // cluster.gpus
    costs, plan = planned.costs, planned.plan
    norms = [
        message
        for message in step_messages(
            config, layout, Ranks(total=cluster.gpus, shards=planned.shards), plan, precision
        )
        if message.part == "batch norms" and message.kind == "all_gather"
    ]
    norm_bytes = max((message.bytes for message in norms), default=0.0)
    kept = plan.kept_images if plan.chunk else images
    keys = report["keys"]
    of_keys = (
        []
        if keys is None
        else [
            Limit("logits of a plain loss", KEPT_LOGITS * 4.0 * images * batch, "B", "B N"),
            Limit("logits of this loss", 0.0, "B", "", "one pass over blocks of keys"),
            Limit("keys of other ranks, gathered", keys["gathered_bytes"], "B", "N"),
            Limit("the same in a ring", keys["ring_bytes"], "B", "B"),
        ]
    )
    return [
        *of_keys,
        Limit("views and features", images * (costs.view_bytes + costs.feature_bytes), "B", "B"),
        Limit("heads and loss", costs.heads.at(images), "B", "B"),
        Limit("activations of all images", costs.graph.at(images), "B", "B"),
        Limit("images that keep them", float(kept), "images", "memory"),
        Limit("FLOPs computed twice", plan.overhead, "share", "B"),
        Limit("memory of the GPU in use", report["limits"]["memory"], "share", "B"),
        Limit("largest message of a batch norm", norm_bytes, "B", "ranks"),
        Limit("seconds of a step", report["step_s"], "s", "B"),
        Limit("peak learning rate", config.peak_lr, "", "N"),
    ]


def set_limits(
    images: float, config: Config, width: int, cluster: Cluster, rate: float
) -> list[Limit]:
    """Of a set.

    Args:
        images: of the set.
        config: of the run.
        width: of the features.
        cluster: the GPUs.
        rate: images per second of the run.
    """
    stored = images * cluster.image_bytes
    return [
        Limit("images, stored", stored, "B", "set"),
        Limit(
            "reading them once", stored / cluster.storage_bytes_per_s / cluster.nodes, "s", "set"
        ),
        Limit("indexes on disk", INDEX_BYTES * images, "B", "set"),
        Limit("opening, first process of a machine", OPEN_CPU_S * images, "CPU-s", "set"),
        Limit("memory of the open set", OPEN_BYTES * images, "B", "set"),
        Limit("order of the images", ORDER_BYTES, "B", "", "a keyed permutation"),
        Limit("the same as a table", TABLE_BYTES * images, "B", "set", "not used"),
        Limit("loader in a checkpoint", float(STATE_OF_LOADER), "B", "", "the number of the step"),
        Limit("kNN bank during training", 4.0 * width * LARGE_KNN, "B", "", "50,000 images"),
        Limit("kNN bank of all images", 4.0 * width * images, "B", "set", "knn.max_train_images 0"),
        Limit("steps of an epoch", images / config.global_batch_size, "steps", "set"),
        Limit("an epoch", images / rate, "s", "set"),
    ]
