"""Rules of a classifier that depend on the labelled set: of a linear probe and of a fine-tuning."""

from __future__ import annotations

from fastmoco.config.run import SMALL_SIDE, Config

OFFICIAL_CROP = 0.08
"""Smallest share of a photograph's area in a crop."""
MOST_BATCH = 1024
LEAST_STEPS = 16
"""Steps of an epoch below which the batch is halved."""
LEAST_BATCH = 32


def labelled_batch(images: int) -> int:
    """The default batch on a training set: 1024, as the official linear protocol and MAE's
    fine-tuning, halved until an epoch has 16 steps, down to 32."""
    batch = MOST_BATCH
    while batch > LEAST_BATCH and batch * LEAST_STEPS > images:
        batch //= 2
    return batch


def own_crops(image_size: int, before: Config | None) -> tuple[tuple[float, float], float] | None:
    """Crops (`ViewSpec.crop_scale`) and the probability of a flip for small images: those of the
    first view of the run that the encoder is from, whose recipe knows which keep the class.

    Returns:
        None for images above 64 pixels, and without a run.
    """
    if before is None or image_size > SMALL_SIDE:
        return None
    view = before.data.view1
    return view.crop_scale, view.flip_probability
