"""What the metrics of a run are called, in which unit they are, and how to read them."""

from __future__ import annotations

from typing import NamedTuple


class Meaning(NamedTuple):
    """A metric for people."""

    title: str
    unit: str
    """Of the axis; "" for a plain number."""
    note: str
    """How to read it, in a sentence."""


MEANINGS = {
    "loss": Meaning(
        "Loss", "", "It should fall and stay below the loss of an encoder that knows nothing."
    ),
    "lr": Meaning("Learning rate", "", "Warm-up, then decay, as the schedule says."),
    "ema_momentum": Meaning(
        "EMA momentum", "", "Share of the momentum encoder that each step keeps."
    ),
    "weight_decay": Meaning("Weight decay", "", "Of the optimizer."),
    "images_per_s": Meaning(
        "Throughput", "images/s", "Images, not views, without evaluation and saving."
    ),
    "wait_share": Meaning(
        "Waiting for data", "share of the time", "Above 20 % the loader is the bottleneck."
    ),
    "loader/queue_depth": Meaning(
        "Batches ready", "batches", "When the trainer asked for one; at 0 it waited each time."
    ),
    "loader/quarantined": Meaning(
        "Images left out", "images", "Bad images that are replaced by others."
    ),
    "feature_std": Meaning(
        "Spread of the features",
        "",
        "Standard deviation over the batch of unit features: 1/sqrt(D) if they are evenly spread, "
        "0 after a collapse.",
    ),
    "effective_rank": Meaning(
        "Effective rank of the features",
        "dimensions",
        "Steady or rising after the warm-up; a quarter of its best is a dimensional collapse.",
    ),
    "batch_norm_drift": Meaning(
        "Drift of batch-norm statistics",
        "",
        "Running statistics of the momentum encoder in deviations of the encoder's: above 3 is too much.",
    ),
    "ema_distance": Meaning(
        "Distance to the momentum encoder",
        "share of the weights' norm",
        "Falls as the momentum rises; above 0.5 the targets are those of another network.",
    ),
    "target_entropy": Meaning(
        "Entropy of the targets", "nats", "0 or ln(K) for K outputs is a collapse."
    ),
    "center_norm": Meaning("Norm of the center", "", "Of the targets' running mean."),
}
"""By name of the metric."""

GROUPS = {
    "cosine/": Meaning(
        "Similarity of pairs",
        "cosine",
        "Two views of one image (positive) should be far more alike than two images (negative).",
    ),
    "contrast/": Meaning(
        "Own key found", "share of queries", "Queries whose positive key ranks first (among five)."
    ),
    "features/": Meaning("Features", "", "Measures of the features."),
    "gradient_norm/": Meaning(
        "Gradient norm", "", "The largest norm of each log interval, by place in the network."
    ),
    "update_ratio/": Meaning(
        "Update to weight ratio",
        "",
        "Size of a step relative to the weights: 0.0001 to 0.005 with AdamW; above 0.05 is too much.",
    ),
    "memory/": Meaning(
        "Peak memory so far",
        "GB",
        "Of rank 0: tensors on the device, what torch's allocator reserved for them, and the process "
        "on the host. A host that grows for hours leaks.",
    ),
    "loader/": Meaning(
        "Loader", "ms per step", "Work of the loader's threads, beside the training."
    ),
}
"""By the prefix of several metrics that share a chart."""


def meaning_of(metric: str) -> Meaning:
    """A metric for people; of an unknown one the name."""
    return MEANINGS.get(metric) or Meaning(spaced(metric).capitalize(), "", "")


def spaced(name: str) -> str:
    """A name of a metric or an event as words: `first_block` is "first block"."""
    return name.replace("_", " ").replace("/", ": ")
