"""The rules of masks, and their draws."""

from __future__ import annotations

import random
from unittest import mock

import numpy as np
import pytest
import torch

from fastmoco.models import masks
from fastmoco.models.masks import (
    beit_blocks,
    blocks2x2,
    disjoint,
    kept_count,
    mask_noise,
    mask_of,
    shuffled,
)
from tests.golden_objective import read_sibling_b

CPU = torch.device("cpu")


def test_counts_are_those_of_the_published_codes() -> None:
    counts = [kept_count(196, ratio) for ratio in (0.75, 0.8, 0.9)]
    assert counts == [49, 39, 19]
    assert (kept_count(49, 0.6), kept_count(49, 0.65)) == (19, 17)


def test_patches_with_the_least_noise_stay_in_its_order() -> None:
    noise = torch.tensor([[3, 1, 2, 1], [0, 0, 0, 0]])
    assert shuffled(noise, 3).tolist() == [[1, 3, 2], [0, 1, 2]]
    assert mask_of(shuffled(noise, 3), 4).tolist() == [
        [True, False, False, False],
        [False] * 3 + [True],
    ]


def test_pieces_are_disjoint_parts_of_one_order() -> None:
    noise = mask_noise(3, 5, 196, step=2, device=CPU)
    pieces = disjoint(noise, 39, 5)
    assert pieces.shape == (5, 5, 39)
    order = noise.argsort(dim=1, stable=True)
    assert torch.equal(pieces.transpose(0, 1).reshape(5, -1), order[:, :195])
    with pytest.raises(ValueError, match="6 pieces of 39"):
        disjoint(noise, 39, 6)


def test_blocks_are_two_by_two() -> None:
    noise = torch.tensor([[5, 0, 3, 1]])
    assert blocks2x2(noise, 2).tolist() == [[2, 3, 6, 7, 10, 11, 14, 15]]
    many = blocks2x2(mask_noise(0, 7, 49, step=0, device=CPU), kept_count(49, 0.65))
    shown = ~mask_of(many, 196).view(7, 7, 2, 7, 2)
    assert (shown.sum(dim=(1, 2, 3, 4)) == 68).all()
    assert torch.equal(shown.any(dim=4).any(dim=2), shown.all(dim=4).all(dim=2))


def test_rectangles_of_beit_match_golden() -> None:
    data = read_sibling_b("maskfeat")
    grid, masked, least = data["beit/args"].tolist()
    expected = np.unpackbits(data["beit/masks"], axis=1)[:, : grid**2]
    for row, seed in enumerate(data["beit/seeds"].tolist()):
        mask = beit_blocks(random.Random(seed), grid, masked, least)
        assert np.array_equal(mask.ravel(), expected[row] == 1)
        assert mask.sum() == data["beit/counts"][row]


def test_draws_are_of_seed_step_view_and_row() -> None:
    def drawn(seed: int = 1, images: int = 6, step: int = 4, view: int = 0) -> torch.Tensor:
        return mask_noise(seed, images, 10, step=step, view=view, device=CPU)

    whole = drawn()
    assert torch.equal(whole, drawn())
    assert whole.dtype == torch.int64
    assert len(whole.unique()) == 60
    for other in (drawn(seed=2), drawn(step=5), drawn(view=1)):
        assert not torch.equal(whole, other)
    # Ranks draw their own rows; another use of the seed draws other numbers.
    with mock.patch("fastmoco.models.token_drop.group_rank", return_value=1):
        assert torch.equal(drawn(images=3), whole[3:])
    with mock.patch.object(masks, "MASK_TAG", 0):
        assert not torch.equal(drawn(), whole)
