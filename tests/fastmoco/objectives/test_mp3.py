"""MP3: logits follow their patches and nothing else tells a place; its context; what is refused.

There are no golden numbers, because there is no code of the authors. `test_conformance.py` compares
value and gradient with the reference, an image at a time with attention written out, in float64.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmoco.config.serial import from_json, to_json
from fastmoco.models.blocks import Block
from fastmoco.models.masks import kept_count
from fastmoco.objectives.build import build_objective
from fastmoco.objectives.interface import START, Inputs
from fastmoco.objectives.mp3 import MP3
from fastmoco.recipes import RECIPES, get_recipe
from fastmoco.recipes.mp3 import MP3Config
from tests.fastmoco.objectives.test_conformance import rough

CPU = torch.device("cpu")


def small(**model: Any) -> MP3:
    """On 16 patches of 2 pixels, in float64."""
    base = get_recipe("mp3_digits")
    objective = rough(replace(base, model=replace(base.model, **model)))
    assert isinstance(objective, MP3)
    return objective


def views(images: int) -> Tensor:
    drawn = torch.Generator().manual_seed(0)
    return torch.randn(images, 3, 8, 8, dtype=torch.float64, generator=drawn)


def moved(images: Tensor, order: Tensor) -> Tensor:
    """The images with patch `order[i]` at place i."""
    patches = images.view(-1, 3, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(-1, 16, 3, 2, 2)
    grid = patches[:, order].view(-1, 4, 4, 3, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(images.shape)


def logits_of(objective: MP3, images: Tensor, context: Tensor) -> Tensor:
    return objective.decoder(objective.encoder.context_tokens(images, None, context))


@torch.no_grad()
def test_patches_that_change_places_take_their_logits_along() -> None:
    """With the same context; nothing else changes."""
    objective, x = small(), views(3)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    context = objective.inputs((x,)).kept[0]
    places = order.argsort()  # the new number of each patch
    logits = logits_of(objective, x, context)
    ours = logits_of(objective, moved(x, order), places[context])
    assert float((ours - logits[:, order]).abs().max()) <= 1e-13
    # Another context is another result.
    assert not torch.allclose(logits, logits_of(objective, x, (context + 1) % 16))


@torch.no_grad()
def test_a_place_shows_in_nothing_but_the_patches() -> None:
    """All patches alike have one result, and the loss is at least that of knowing nothing."""
    objective = small()
    x = views(2)[:, :, :2, :2].repeat(1, 1, 4, 4)
    context = objective.inputs((x,)).kept[0]
    logits = logits_of(objective, x, context)
    assert float((logits - logits[:, :1]).abs().max()) <= 1e-13
    loss = float(objective(x).loss)
    assert loss >= math.log(16)
    assert objective.uninformed_loss(256) == math.log(16)


def test_patches_outside_of_the_context_reach_no_other_patch() -> None:
    """Those of the context reach all, by their state in each block."""
    objective, x = small(), views(1).requires_grad_()
    context = torch.tensor([[5, 0, 11, 2]])

    def reach(patch: int) -> list[int]:
        """Patches whose pixels change the logits of one."""
        (gradient,) = torch.autograd.grad(logits_of(objective, x, context)[0, patch].sum(), x)
        seen = gradient.abs().view(3, 4, 2, 4, 2).sum(dim=(0, 2, 4)).flatten()
        return seen.nonzero().flatten().tolist()

    assert reach(7) == [0, 2, 5, 7, 11]
    assert reach(5) == [0, 2, 5, 11]

    # The context of the last block is not the input's: all blocks before it have changed it.
    seen: list[Tensor] = []
    for block in objective.encoder.blocks:
        assert isinstance(block, Block)
        keys = block.attn.keys_values
        block.attn.keys_values = lambda rows, keys=keys: (seen.append(rows), keys(rows))[1]
    logits_of(objective, x, context)
    assert len(seen) == len(objective.encoder.blocks)
    assert {rows.shape[1] for rows in seen} == {4}
    assert not torch.allclose(seen[0], seen[1], atol=0.1)


def test_what_the_backward_recomputes_changes_nothing() -> None:
    x = views(4)

    def found(checkpointing: str) -> tuple[float, dict[str, Tensor]]:
        objective = small(checkpointing=checkpointing)
        loss = objective(x).loss
        loss.backward()
        named = objective.named_parameters()
        return loss.item(), {n: p.grad for n, p in named if p.grad is not None}

    loss, gradients = found("none")
    for checkpointing in ("full", "selective"):
        ours, own = found(checkpointing)
        assert ours == pytest.approx(loss, rel=1e-14)
        assert own.keys() == gradients.keys()
        assert all(float((own[n] - gradients[n]).abs().max()) <= 1e-14 for n in own)


def test_recipes_travel_through_json() -> None:
    names = [name for name in RECIPES if name.startswith("mp3")]
    assert len(names) == 3
    for name in names:
        config = get_recipe(name)
        assert from_json(to_json(config)) == config
        assert (config.model.positions, config.model.pooling) == ("none", "norm_mean")
    assert kept_count(196, MP3Config().mask_ratio) == 49


def test_what_it_cannot_do_is_refused() -> None:
    base = get_recipe("mp3_digits")
    for name, value, rule in (
        ("positions", "learned", "would tell where"),
        ("pooling", "class", "no class token"),
        ("pooling", "class_attention", "no class token"),
        ("blocks", "fused", r"model\.blocks='fused'.*--model\.blocks modules"),
        ("mlp_norm", "batch", "masked or left out"),
    ):
        with pytest.raises(ValueError, match=rule):
            build_objective(replace(base, model=replace(base.model, **{name: value})), CPU)
    with pytest.raises(ValueError, match="none of the 16"):
        build_objective(replace(base, objective=MP3Config(mask_ratio=0.99)), CPU)
    with pytest.raises(ValueError, match="mask_ratio"):
        MP3Config(mask_ratio=1.0)
    objective = small()
    with pytest.raises(ValueError, match="with masks: 0"):
        objective.features(Inputs((views(2),)), START)
    with pytest.raises(ValueError, match=r"must be \[B, 3, 8, 8\]"):
        objective(torch.zeros(2, 3, 4, 4, dtype=torch.float64))
    block = objective.encoder.blocks[0]
    assert isinstance(block, Block)
    block.fused = True
    with pytest.raises(ValueError, match="nor a context"):
        block(torch.zeros(1, 4, 64), None, None, torch.zeros(1, 1, dtype=torch.int64))
