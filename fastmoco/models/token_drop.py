"""Token dropping (FLIP, Li et al. 2023): the trained encoder sees a random part of the patch tokens
of each view.

A draw is an input of the trunk, not a state of it: which tokens stay follows from seed, step, the
image's row in the global batch and the number of the view. A second pass of a chunk, a resumed run
and another number of ranks therefore keep the same ones.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from fastmoco.distributed.mesh import group_rank
from fastmoco_kernels.tensors import sent

TOKEN_TAG = 0x746F6B656E
"""\"token": second word of the Philox key, so that no other use of the seed shares a stream with
this one."""


class TokenDraws:
    """Which patch tokens stay.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(
        self, images: int, view: int, *, tokens: int, kept: int, step: int, device: torch.device
    ) -> Tensor:
        """The tokens of one view that stay, of this rank's images.

        Args:
            images: of this rank; every rank has equally many.
            view: its number.
            tokens: patch tokens of the view.
            kept: of these that stay.
            step: optimizer steps done before this one.
            device: of the result.

        Returns:
            [images, kept] int64, in the order of their noise.
        """
        noise = row_noise(self.seed, TOKEN_TAG, images, tokens, step=step, view=view, device=device)
        return kept_ids(noise, kept)


def row_noise(
    seed: int, tag: int, images: int, numbers: int, *, step: int, view: int, device: torch.device
) -> Tensor:
    """`row_numbers` on a device: [images, numbers] int64."""
    noise = row_numbers(seed, tag, images, numbers, step=step, view=view)
    return sent(torch.from_numpy(noise), device)


def row_numbers(
    seed: int, tag: int, images: int, numbers: int, *, step: int, view: int
) -> np.ndarray:
    """Random numbers of this rank's images, each a function of seed, step, row of the global batch
    and view.

    The stream of a step and view is numpy's Philox with key (seed, tag) and counter words
    (block, 0, step, view), at four numbers a block; each image has whole blocks of its own.

    Args:
        seed: of the run.
        tag: second word of the key, one for each use.
        images: of this rank; every rank has equally many.
        numbers: of each image.
        step: optimizer steps done before this one.
        view: its number.

    Returns:
        [images, numbers] int64, uniform in [0, 2^63).
    """
    blocks = -(-numbers // 4)
    key = np.array([seed % 2**64, tag], dtype=np.uint64)
    start = np.array([group_rank() * images * blocks, 0, step, view], dtype=np.uint64)
    words = np.random.Philox(key=key, counter=start).random_raw(images * blocks * 4)
    # 63 bits, because torch sorts no unsigned numbers.
    noise = (words >> np.uint64(1)).astype(np.int64).reshape(images, blocks * 4)[:, :numbers]
    return np.ascontiguousarray(noise)


def kept_ids(noise: Tensor, kept: int) -> Tensor:
    """Tokens with the least noise, in its order: [B, L] -> [B, kept] int64."""
    return noise.argsort(dim=1, stable=True)[:, :kept]


def taken(tokens: Tensor, kept: Tensor) -> Tensor:
    """The tokens that stay: [B or 1, L, E] by ids [B, k] -> [B, k, E].

    Of B images there may be n sets of ids, [n * B, k], set by set; then so are the tokens.
    """
    images, sets = len(tokens), len(kept) // len(tokens)
    if images > 1 < sets:
        # All sets of an image in one row: the backward needs no copy of the tokens for each set.
        by_image = kept.view(sets, images, -1).transpose(0, 1)
        found = taken(tokens, by_image.flatten(1)).view(images, *by_image.shape[1:], -1)
        return found.transpose(0, 1).flatten(0, 1)
    rows = kept[:, :, None].expand(-1, -1, tokens.shape[2])
    return tokens.expand(len(kept), -1, -1).gather(1, rows)


def shrunk(views: tuple[Tensor, ...], patch_size: int, own: int) -> tuple[Tensor, ...]:
    """Views whose patches of `own` pixels show what patches of `patch_size` pixels showed.

    Each pixel is the mean of a square of pixels. That is the projection of the large patches by the
    same weights, each spread over a square: the pseudo-inverse resize of FlexiViT (Beyer et al.
    2023) for nearest-neighbour interpolation.

    Args:
        views: [B, 3, S, S], S a multiple of `patch_size`.
        patch_size: a multiple of `own`.
        own: patch size of the encoder.
    """
    return tuple(avg_pool2d(view, patch_size // own) for view in views)
