"""Stochastic depth: its factors, and the passes that recompute a block."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from fastmoco.config import ModelConfig
from fastmoco.models import drop_path, vit_nano
from fastmoco.models.drop_path import PathDraws

CPU = torch.device("cpu")


def test_factors_have_the_rates_of_their_blocks_and_keep_the_mean() -> None:
    factors = PathDraws(0.4, 3, seed=1)(4096, 2, 0, CPU)
    assert factors.shape == (4096, 2, 3, 2)
    assert torch.equal(factors[:, :, 0], torch.ones(4096, 2, 2))
    for block, rate in ((1, 0.2), (2, 0.4)):
        own = factors[:, :, block]
        assert own.unique().tolist() == pytest.approx([0, 1 / (1 - rate)])
        # 16384 draws: four standard deviations.
        assert float((own == 0).double().mean()) == pytest.approx(rate, abs=4 * 0.5 / 128)
    # Attention and MLP, both views and all images draw for themselves.
    last = factors[:, :, 2] == 0
    assert not torch.equal(last[..., 0], last[..., 1])
    assert not torch.equal(last[:, 0], last[:, 1])


def test_a_step_always_has_the_same_draws_and_a_rank_has_its_rows_of_them() -> None:
    draws = PathDraws(0.4, 3, seed=1)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    whole = draws(8, 2, 5, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(PathDraws(0.4, 3, seed=1)(8, 2, 5, CPU), whole)
    for step, seed in ((6, 1), (5, 2)):
        assert not torch.equal(PathDraws(0.4, 3, seed)(8, 2, step, CPU), whole)
    with mock.patch.object(drop_path, "group_size", return_value=2):
        for rank in (0, 1):
            with mock.patch.object(drop_path, "group_rank", return_value=rank):
                assert torch.equal(draws(4, 2, 5, CPU), whole[4 * rank :][:4])


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_blocks_use_the_same_factors(recompute: str) -> None:
    torch.manual_seed(0)
    encoder = vit_nano().double()
    images = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    paths = PathDraws(0.6, 2, seed=3)(6, 1, 0, CPU)[:, 0]
    assert (paths == 0).any()
    found = []
    for how in ("none", recompute):
        encoder.recompute(how)  # type: ignore[arg-type]
        encoder.zero_grad()
        feature = encoder(images, paths)
        feature.square().sum().backward()
        found.append([feature, *(p.grad for p in encoder.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_an_image_whose_branches_are_left_out_is_its_tokens() -> None:
    encoder = vit_nano().double()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    paths = torch.ones(2, 2, 2)
    paths[1] = 0
    feature = encoder(images, paths)
    assert torch.equal(feature[:1], encoder(images)[:1])
    class_token = encoder.cls_token[0] + encoder.pos_embed[0, :1]
    assert torch.equal(feature[1:], encoder.norm(class_token))


def test_what_has_no_stochastic_depth_refuses_it() -> None:
    with pytest.raises(ValueError, match=r"drop_path=0\.1: blocks=fused has no stochastic depth"):
        ModelConfig(drop_path=0.1, blocks="fused")
    with pytest.raises(ValueError, match=r"drop_path=0\.1: .*that of a ViT"):
        ModelConfig(drop_path=0.1, architecture="resnet50")
    with pytest.raises(ValueError, match=r"drop_path=1\.0"):
        PathDraws(1.0, 3, seed=1)
    encoder = vit_nano()
    encoder.blocks[0].fused = True
    with pytest.raises(ValueError, match="blocks=fused: has neither drop_path nor"):
        encoder(torch.zeros(2, 3, 8, 8), torch.ones(2, 2, 2))
