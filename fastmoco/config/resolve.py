"""The numbers of a run that depend on its world size and data set."""

from __future__ import annotations

from dataclasses import dataclass

from fastmoco.config.run import Config
from fastmoco_pipelines.spec import require


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """The numbers of a run that depend on its world size and data set."""

    world_size: int
    sample_count: int
    steps_per_epoch: int
    total_steps: int
    local_batch_size: int
    peak_lr: float


def resolve(config: Config, *, world_size: int, sample_count: int) -> Resolved:
    """Compute the numbers that depend on the world size and the data set.

    Args:
        config: of the run.
        world_size: processes that train.
        sample_count: images in the training set.

    Raises:
        ValueError: if `world_size` does not divide the global batch, or the set is smaller than
            one batch.
    """
    batch = config.global_batch_size
    require(
        batch % world_size == 0,
        "global_batch_size",
        batch,
        f"must be a multiple of the {world_size} processes",
    )
    steps_per_epoch = sample_count // batch
    fits = fitting_batch(sample_count, most=batch, world_size=world_size)
    cure = f"; --global-batch-size {fits} fits" if fits <= sample_count else ""
    require(
        steps_per_epoch >= 1,
        "global_batch_size",
        batch,
        f"must be at most the {sample_count} training images{cure}",
    )
    total_steps = max(1, round(config.epochs * steps_per_epoch))
    return Resolved(
        world_size=world_size,
        sample_count=sample_count,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        local_batch_size=batch // world_size,
        peak_lr=config.peak_lr,
    )


def schedule_notes(config: Config, resolved: Resolved) -> list[str]:
    """A sentence about each schedule that the run leaves unfinished. A trial of a few epochs is a
    run like that, so none is refused."""
    epochs = config.epochs
    late = [f"{mark:g}" for mark in config.optim.milestones if mark >= epochs]
    notes = []
    if config.optim.schedule == "steps" and late:
        notes.append(
            f"optim.milestones: the run ends after epoch {epochs:g}, so the learning rate does not "
            f"fall at {' and '.join(late)}"
        )
    return notes + config.objective.schedule_notes(epochs, resolved.total_steps)


def fitting_batch(images: int, *, most: int, world_size: int = 1) -> int:
    """A global batch size for a set: `most`, or for a small set a power of two with three steps an
    epoch or more; a multiple of the processes, and at least 2 images for each.

    Args:
        images: in the set.
        most: largest batch, that of the recipe.
        world_size: processes that train.
    """
    batch = min(most, 1 << max(1, (images // 3).bit_length() - 1))
    return max(2 * world_size if world_size > 1 else 2, batch - batch % world_size)
