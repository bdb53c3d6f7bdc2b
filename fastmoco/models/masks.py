"""Which patches a masked objective shows to its encoder.

A rule is a pure function of the noise of each image, so a draw can be given, stored and repeated:
`mask_noise` draws it from the seed, the step, the image's row in the global batch and the view,
which together name epoch and sample. A second pass of a chunk, a resumed run and another number of
ranks therefore hide the same patches. The number of patches that stay is the same for all images,
so images have equally many masked patches, and the mean of a loss over masked patches is a mean
over images. The blocks of BEiT alone hide a number that differs (`block_masks`, `masked_shares`).

Legend: B images, L patches in rows of g (row by row), K of them that stay.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastmoco.distributed.agree import mean
from fastmoco.models.token_drop import kept_ids, row_noise, row_numbers
from fastmoco_kernels.tensors import sent

MASK_TAG = 0x6D61736B
""""mask": second word of the Philox key, so that no other use of the seed shares a stream with
it."""
TRIES = 10
"""Rectangles that are tried before a mask of BEiT is left as it is."""
FLATTEST = 0.3
"""Smallest ratio of height to width of a rectangle of BEiT; the largest is its inverse."""


def mask_noise(
    seed: int, images: int, cells: int, *, step: int, view: int = 0, device: torch.device
) -> Tensor:
    """Noise for the rules below, of this rank's images.

    Args:
        seed: of the run.
        images: of this rank; every rank has equally many.
        cells: that a rule orders: L, or L / 4 for blocks.
        step: optimizer steps done before this one.
        view: number of the view.
        device: of the result.

    Returns:
        [images, cells] int64, uniform in [0, 2^63): wide enough to have no ties.
    """
    return row_noise(seed, MASK_TAG, images, cells, step=step, view=view, device=device)


def kept_count(
    cells: int, ratio: float, what: str = "patches", *, field: str = "mask_ratio"
) -> int:
    """Cells that stay when a share of them is masked: int(cells * (1 - ratio)), with the rounding
    of the published codes. 196 * (1 - 0.9) is 19.59..., so 19 stay.

    Args:
        cells: L, or L / 4 for blocks.
        ratio: share that is masked.
        what: how a message calls the cells.
        field: of the ratio, in its message.

    Raises:
        ValueError: if none would stay, or all.
    """
    kept = int(cells * (1 - ratio))
    if not 1 <= kept < cells:
        few, cure = ("none", "smaller") if kept < 1 else ("all", "larger")
        raise ValueError(
            f"objective.{field}={ratio}: shows the encoder {few} of the {cells} {what}; take a "
            f"{cure} share"
        )
    return kept


def shuffled(noise: Tensor, kept: int) -> Tensor:
    """The patches with the least noise stay, in its order (He et al. 2022, MAE).

    Args:
        noise: [B, L] of any type that sorts; ties keep the order of the patches.
        kept: K.

    Returns:
        [B, K] int64, numbers of patches.
    """
    return kept_ids(noise, kept)


def disjoint(noise: Tensor, kept: int, pieces: int) -> Tensor:
    """The same order cut into pieces, so that no patch is in two of them (ExtreMA).

    Args:
        noise: [B, L].
        kept: K, of each piece.
        pieces: n, with n * K at most L.

    Returns:
        [n, B, K] int64.

    Raises:
        ValueError: if the patches do not suffice.
    """
    if pieces * kept > noise.shape[1]:
        raise ValueError(
            f"pieces={pieces}: {pieces} pieces of {kept} patches need more than {noise.shape[1]}"
        )
    order = kept_ids(noise, pieces * kept)
    return order.view(len(noise), pieces, kept).transpose(0, 1)


def blocks2x2(noise: Tensor, kept: int) -> Tensor:
    """Whole blocks of 2 x 2 patches stay, those with the least noise (CMAE).

    Args:
        noise: [B, L / 4], of the blocks row by row; g is even.
        kept: blocks that stay.

    Returns:
        [B, 4 * kept] int64, numbers of patches: the four of the first block, row by row, and so on.
    """
    side = math.isqrt(noise.shape[1])
    blocks = kept_ids(noise, kept)
    first = 4 * side * (blocks // side) + 2 * (blocks % side)
    two = torch.arange(2, device=noise.device)  # made there: a copy from the host would wait
    within = (2 * side * two[:, None] + two).flatten()
    return (first[:, :, None] + within).flatten(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchMasks:
    """Draws the patches of the images of a view that stay: single ones, or blocks of 2 x 2.

    Raises:
        ValueError: if none would stay, or all, or blocks do not fit.
    """

    seed: int
    """Of the run."""
    grid: int
    """g, patches per side."""
    ratio: float
    """Share that is masked."""
    blocks: bool = False
    """Whether blocks of 2 x 2 patches stay or not as a whole."""
    field: str = "mask_ratio"
    """That has the ratio, in a message."""

    def __post_init__(self) -> None:
        if self.blocks and self.grid % 2:
            raise ValueError(
                f"model.image_size: {self.grid} patches per side: must be an even number, because "
                "blocks of 2 x 2 patches are masked"
            )
        what = "blocks of 2 x 2 patches" if self.blocks else "patches"
        kept_count(self.cells, self.ratio, what, field=self.field)

    @property
    def cells(self) -> int:
        """What is masked or not as a whole: patches, or blocks of them."""
        return self.grid**2 // (4 if self.blocks else 1)

    @property
    def kept(self) -> int:
        """K, patches of an image that stay."""
        return kept_count(self.cells, self.ratio) * (4 if self.blocks else 1)

    def __call__(self, view: Tensor, *, step: int, number: int = 0) -> Tensor:
        """[B, K] int64 numbers of patches of a view [B, 3, H, W] in a step.

        `number`: of the view.
        """
        noise = mask_noise(
            self.seed, len(view), self.cells, step=step, view=number, device=view.device
        )
        rule = blocks2x2 if self.blocks else shuffled
        return rule(noise, kept_count(self.cells, self.ratio))


def beit_blocks(draws: random.Random, grid: int, masked: int, least: int) -> np.ndarray:
    """Masked rectangles until enough patches are masked (Bao et al. 2022, BEiT; MaskFeat).

    A rectangle is taken if it masks something new and not too much. Where ten in a row are not, the
    mask stays smaller than asked: the number of masked patches is not fixed.

    Args:
        draws: of one image.
        grid: g.
        masked: patches to mask.
        least: smallest area of a rectangle that is drawn.

    Returns:
        [g, g] bool, True where masked.
    """
    mask, count = np.zeros((grid, grid), dtype=bool), 0
    while count < masked:
        room = masked - count
        for _ in range(TRIES):
            area = draws.uniform(least, room)
            aspect = math.exp(draws.uniform(math.log(FLATTEST), math.log(1 / FLATTEST)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= grid or width >= grid:
                continue
            top, left = draws.randint(0, grid - height), draws.randint(0, grid - width)
            part = mask[top : top + height, left : left + width]
            new = part.size - int(part.sum())
            if 0 < new <= room:
                part[:] = True
                count += new
                break
        else:
            break
    return mask


def block_masks(
    seed: int,
    images: int,
    grid: int,
    masked: int,
    *,
    step: int,
    view: int = 0,
    device: torch.device,
) -> Tensor:
    """Masks of `beit_blocks` for this rank's images, none smaller than a fifth of what is masked.

    Python's random numbers of an image start from its own noise. They are drawn on the host: about
    0.1 ms an image at g = 14.

    Args:
        seed: of the run.
        images: of this rank; every rank has equally many.
        grid: g.
        masked: patches to mask in each image.
        step: optimizer steps done before this one.
        view: number of the view.
        device: of the result.

    Returns:
        [images, L] bool, True where masked; at most `masked` in each row.
    """
    starts = row_numbers(seed, MASK_TAG, images, 1, step=step, view=view)
    least = max(1, masked // 5)
    masks = [
        beit_blocks(random.Random(start), grid, masked, least).ravel()  # noqa: S311 - masks
        for start in starts[:, 0].tolist()
    ]
    return sent(torch.from_numpy(np.stack(masks)), device)


def masked_shares(masks: Tensor) -> Tensor:
    """What each patch counts in the loss of its image, where images have unequal numbers of masked
    patches.

    The loss of a batch over all ranks is a sum over its masked patches by their number. So a masked
    patch counts one over the mean number of an image of that batch; then the loss is a mean over
    images, whose parts on ranks and in chunks add up. All ranks must call this together.

    Args:
        masks: [B, L] bool, True where masked; the same B on every rank.

    Returns:
        [B, L] float64, 0 where a patch is seen.
    """
    wide = masks.to(torch.float64)
    count = mean(wide.sum() / len(masks)).clamp(min=1 / len(masks))  # a batch without a mask
    return wide / count


def mask_of(kept: Tensor, cells: int) -> Tensor:
    """[B, K] patches that stay -> [B, L] bool, True where masked."""
    shown = torch.ones(len(kept), cells, dtype=torch.bool, device=kept.device)
    return shown.scatter(1, kept, False)
