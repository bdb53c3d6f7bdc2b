"""MaskFeat against golden numbers: one step and the schedule; its masks, start values and views.

What every objective must do is in test_conformance.py, histograms are in test_hog.py.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmoco.config import resolve
from fastmoco.config.serial import from_json, to_json
from fastmoco.models import VisionTransformer
from fastmoco.models.encoder import trunk_of
from fastmoco.models.masks import block_masks, masked_shares
from fastmoco.objectives.build import build_objective
from fastmoco.objectives.chunked import ChunkedStep
from fastmoco.objectives.maskfeat import MaskFeat
from fastmoco.optim import learning_rate
from fastmoco.optim.schedule import run_end
from fastmoco.recipes import RECIPES, get_recipe
from fastmoco.recipes.maskfeat import MaskFeatConfig
from tests.golden_objective import Data, error, read_sibling_b

CPU = torch.device("cpu")
GATES = {torch.float64: (1e-9, 1e-9, 1.1e-7), torch.float32: (2e-6, 1e-5, 6e-5)}
"""Largest errors of loss, features and gradients; in float32 twice those of a second
implementation."""
NAMES = {
    "pred_head.transforms.0.0.": "decoder.norm.",
    "pred_head.projections.0.": "decoder.pred.",
}


def our_name(name: str) -> str:
    for theirs, ours in NAMES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return f"encoder.{name}"


def golden(data: Data, dtype: torch.dtype) -> MaskFeat:
    """The objective of the file with its weights."""
    size, patch, width, depth, heads = data["cfg"].tolist()
    build = partial(
        VisionTransformer,
        image_size=size,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        positions="learned",
        freeze_patch_embed=False,
    )
    objective = MaskFeat(build).to(dtype)
    weights = {
        our_name(key.removeprefix("init/")): torch.from_numpy(value)
        for key, value in data.items()
        if key.startswith("init/")
    }
    missing, unexpected = objective.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["encoder.norm.weight", "encoder.norm.bias"], [])
    return objective


def small() -> MaskFeat:
    objective = build_objective(replace(get_recipe("maskfeat_digits"), precision="fp64"), CPU)
    assert isinstance(objective, MaskFeat)
    return objective


def views(images: int) -> Tensor:
    drawn = torch.Generator().manual_seed(0)
    return torch.randn(images, 3, 8, 8, dtype=torch.float64, generator=drawn)


@pytest.mark.parametrize("dtype", GATES, ids=str)
def test_one_step_matches_golden(dtype: torch.dtype) -> None:
    data = read_sibling_b("maskfeat")
    objective, (of_loss, of_feature, of_gradient) = golden(data, dtype), GATES[dtype]
    x, masked = torch.from_numpy(data["x"]).to(dtype), torch.from_numpy(data["mask"]).bool()
    masked = masked.flatten(1)
    with torch.no_grad():
        rows = objective.decoder(objective.encoder.masked_tokens(x, masked)[:, 1:][masked])
    assert error(rows, data["preds"]) <= of_feature
    loss = objective(x, masks=(masked,)).loss
    assert error(loss.detach(), data["loss"]) <= of_loss
    loss.backward()
    found = {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}
    keys = [key for key in data if key.startswith("grad/")]
    assert {our_name(key.removeprefix("grad/")) for key in keys} == found.keys()
    for key in keys:
        ours, expected = found[our_name(key.removeprefix("grad/"))], data[key]
        assert ours is not None
        if key.endswith("qkv.bias"):  # the third of the keys has no true gradient
            (first, of_keys, last), parts = ours.chunk(3), np.split(expected, 3)
            noise = 1e-9 if dtype == torch.float64 else 4e-5
            assert np.abs(of_keys.double().numpy() - parts[1]).max() <= noise
            ours, expected = torch.cat([first, last]), np.concatenate([parts[0], parts[2]])
        assert error(ours, expected) <= of_gradient, key


def test_the_schedule_matches_golden() -> None:
    data = read_sibling_b("schedules")
    epochs, warmup, peak, first, last = data["maskfeat/args"].tolist()
    config = replace(get_recipe("maskfeat_vit_b16_e1600_b2048"), epochs=epochs)
    optim = config.optim
    assert (config.peak_lr, optim.warmup_epochs) == (pytest.approx(peak), warmup)
    assert (optim.warmup_lr, optim.final_lr) == (first, last)
    for epoch, expected in zip(data["maskfeat/epoch"], data["maskfeat/lr"], strict=True):
        rate = learning_rate(
            round(epoch * 10**6),
            peak=peak,
            epochs=epochs,
            warmup_epochs=warmup,
            steps_per_epoch=10**6,
            warmup_lr=first,
            final_lr=last,
        )
        assert rate == pytest.approx(expected, rel=1e-9)
    resolved = resolve(config, world_size=1, sample_count=2048 * 10)
    assert run_end(config, resolved) == (10 * epochs, last)


def test_the_loss_is_by_the_masked_patches_of_all_chunks_and_ranks() -> None:
    """An image without a mask counts nothing, and one with a larger mask more."""
    objective, x = small(), views(5)
    masked = torch.zeros(5, 16, dtype=torch.bool)
    for image, count in enumerate((0, 3, 7, 1, 15)):
        masked[image, :count] = True
    predictions = objective.decoder(objective.encoder.masked_tokens(x, masked)[:, 1:])
    errors = (predictions - objective.targets(x))[masked].square()
    whole = copy.deepcopy(objective)
    output = whole(x, masks=(masked,))
    assert output.loss.item() == pytest.approx(errors.mean().item(), rel=1e-12)
    output.loss.backward()
    chunked = ChunkedStep(objective, chunk=2)(x, masks=(masked,))
    assert chunked.loss.item() == pytest.approx(output.loss.item(), rel=1e-12)
    for ours, other in zip(objective.parameters(), whole.parameters(), strict=True):
        assert (ours.grad is None) == (other.grad is None)
        assert ours.grad is None or torch.allclose(ours.grad, other.grad, rtol=0, atol=1e-13)

    # On two ranks of equally many images the mean number is that of both.
    both = masked_shares(masked[:4])
    parts = []
    for rank in range(2):
        own = masked[2 * rank : 2 * rank + 2]
        with mock.patch("fastmoco.models.masks.mean", return_value=masked[:4].sum() / 4.0):
            parts.append(masked_shares(own))
    assert torch.equal(torch.cat(parts), both)
    assert float(masked_shares(torch.zeros(2, 4, dtype=torch.bool)).sum()) == 0


def test_masks_are_of_seed_step_and_row() -> None:
    def drawn(seed: int = 0, images: int = 40, step: int = 3) -> Tensor:
        return block_masks(seed, images, 14, 78, step=step, device=CPU)

    whole = drawn()
    assert torch.equal(whole, drawn())
    assert (whole.sum(dim=1) <= 78).all()
    assert len(whole.sum(dim=1).unique()) > 2
    assert len({tuple(row) for row in whole.tolist()}) == 40
    for other in (drawn(seed=1), drawn(step=4)):
        assert not torch.equal(whole, other)
    with mock.patch("fastmoco.models.token_drop.group_rank", return_value=1):
        assert torch.equal(drawn(images=20), whole[20:])


def test_masked_pixels_reach_no_token() -> None:
    """And positions do: they are added after the mask tokens."""
    encoder, x = small().encoder, views(2)
    masked = torch.zeros(2, 16, dtype=torch.bool)
    masked[:, 5] = True
    with torch.no_grad():
        before = encoder.masked_tokens(x, masked)
        x[:, :, 2:4, 2:4] += 1  # patch 5
        assert torch.equal(encoder.masked_tokens(x, masked), before)
        encoder.pos_embed[:, 6] += 1  # that of patch 5, behind the class token
        assert not torch.equal(encoder.masked_tokens(x, masked), before)
    encoder.mask_token = None
    with pytest.raises(ValueError, match="add_mask_token"):
        encoder.masked_tokens(x, masked)


def test_it_starts_as_published_and_the_final_norm_stays() -> None:
    config = get_recipe("maskfeat_digits")
    model = replace(config.model, architecture="vit_micro")
    own = MaskFeatConfig(cell=2)
    objective = build_objective(replace(config, model=model, objective=own), CPU)
    encoder = objective.encoder
    for name, parameter in encoder.named_parameters():
        if parameter.ndim > 1:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.3), name
        elif name.startswith("blocks."):
            assert float(parameter.detach().max()) == pytest.approx(
                0.02 if name.endswith("bias") else 1
            )
    assert float(small().encoder.pos_embed.detach().std()) == pytest.approx(0.4, rel=0.1)
    assert not any(p.requires_grad for p in encoder.norm.parameters())
    assert objective.decoder.pred.bias.detach().abs().max() == 0
    assert "mask_token" in encoder.state_dict()
    assert "mask_token" not in trunk_of(encoder.state_dict())


def test_recipes_carry_the_published_numbers_and_travel_through_json() -> None:
    config = get_recipe("maskfeat_vit_b16_e1600_b2048")
    optim, view = config.optim, config.data.view1
    assert (optim.betas, optim.weight_decay, optim.clip_norm) == ((0.9, 0.999), 0.05, 0.02)
    assert (view.crop_scale, view.interpolation) == ((0.5, 1.0), "bicubic")
    assert (view.jitter_probability, view.grayscale_probability, view.blur_probability) == (0, 0, 0)
    assert config.objective == MaskFeatConfig(mask_ratio=0.4, cell=8)
    names = [name for name in RECIPES if name.startswith("maskfeat")]
    assert len(names) == 4
    for name in names:
        assert from_json(to_json(get_recipe(name))) == get_recipe(name)


def test_what_it_cannot_do_is_refused() -> None:
    base = get_recipe("maskfeat_digits")
    for model, own, rule in (
        ({"mlp_norm": "batch"}, {}, "masked or left out"),
        (
            {"pooling": "class_attention"},
            {},
            r"pooling='class_attention': .*take --model\.pooling class",
        ),
        ({"positions": "none"}, {}, "would look alike"),
        ({}, {"cell": 3}, r"cell=3: must divide model\.patch_size=2.*--objective\.cell 2"),
        ({}, {"mask_ratio": 0.01}, r"mask_ratio=0\.01: masks none of the 16"),
        ({}, {"mask_ratio": 0.99}, r"mask_ratio=0\.99: masks all of the 16"),
    ):
        wrong = replace(
            base,
            model=replace(base.model, **model),
            objective=replace(base.objective, **own),  # type: ignore[arg-type]
        )
        with pytest.raises(ValueError, match=rule):
            build_objective(wrong, CPU)
    for fields in ({"mask_ratio": 1.0}, {"cell": 0}, {"initial_weights": "none"}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            MaskFeatConfig(**fields)  # type: ignore[arg-type]
    objective, x = small(), views(2)
    for mask in (torch.zeros(2, 15, dtype=torch.bool), torch.zeros(2, 16)):
        with pytest.raises(ValueError, match=r"must be one \[2, 16\] of bool"):
            objective(x, masks=(mask,))
    with pytest.raises(ValueError, match=r"must be \[B, 3, 8, 8\]"):
        objective(torch.zeros(2, 3, 4, 4, dtype=torch.float64))
