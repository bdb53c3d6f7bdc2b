"""Which recipe fits a device and a set of images: for the commands that name the next one."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Literal

from fastmoco.config.resolve import fitting_batch
from fastmoco.recipes import get_recipe

CPU_PASSES = 3_000_000
"""Images that pass a tiny ViT in about an hour on two cores: epochs times images."""
LEAST_EPOCHS = 3
FEW_IMAGES = 2000
"""Below this number a ViT-S has too little to learn from."""
SMALL_SIDE = 64
"""Pixels; images below this have no more detail than the views of the small recipes."""
LARGE_SET = 500_000
"""From this number of images on, several GPUs take the batch of the paper."""


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """A recipe, and the options with which it fits.

    Attributes:
        recipe: its name.
        options: words of the command line, without those that name data and output.
    """

    recipe: str
    options: tuple[str, ...] = ()

    def command(self, *source: str, out: str = "runs/first", program: str = "fastmoco") -> str:
        """The command that trains.

        Args:
            source: the words that name the images, e.g. `--data.shards` and a pattern.
            out: folder of the run.
            program: the command of this installation.
        """
        words = ["train", self.recipe, *source, *self.options, "--out", out]
        return f"{program} {shlex.join(words)}"


def suggest(
    device: Literal["cpu", "gpu"],
    *,
    images: int | None = None,
    side: float | None = None,
    gpus: int = 1,
) -> Suggestion:
    """The recipe for a device and a set.

    Args:
        device: that trains.
        images: in the training set; None: unknown, many.
        side: length of the longer side of a typical image in pixels; None: unknown, a photograph.
        gpus: of the machine, each with one process.
    """
    small = device == "cpu" or (images or FEW_IMAGES) < FEW_IMAGES
    if small or (side or SMALL_SIDE) < SMALL_SIDE:
        recipe = "vit_nano8_e60_b256"
    elif gpus > 1 and (images or 0) >= LARGE_SET:
        recipe = "vit_s16_e300_b4096"
    else:
        recipe = "vit_s16_e300_b1024"

    options: list[str] = []
    if images is not None:
        config = get_recipe(recipe)
        processes = gpus if device == "gpu" else 1
        batch = fitting_batch(images, most=config.global_batch_size, world_size=processes)
        if batch != config.global_batch_size:
            options += ["--global-batch-size", str(batch)]
        if device == "cpu" and images * config.epochs > CPU_PASSES:
            options += ["--epochs", str(max(LEAST_EPOCHS, CPU_PASSES // images))]
    if device == "gpu" and gpus > 1:
        options += ["--gpus", str(gpus)]
    return Suggestion(recipe=recipe, options=tuple(options))
