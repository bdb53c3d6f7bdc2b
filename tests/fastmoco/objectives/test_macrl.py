"""MACRL: two masks, absolute errors, the pooled feature, the queue.

There are no golden numbers, because no code is known. What every objective must do is in
test_conformance.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from fastmoco.config import Config
from fastmoco.config.serial import from_json, to_json
from fastmoco.models.masks import mask_of
from fastmoco.objectives.build import build_objective
from fastmoco.objectives.interface import Progress
from fastmoco.objectives.macrl import MACRL
from fastmoco.objectives.masked import masked_loss, plain_masked_loss
from fastmoco.recipes import EXPECTED, get_recipe
from fastmoco.recipes.macrl import MACRLConfig
from tests.fastmoco.objectives.test_conformance import (
    check_chunks,
    check_features,
    check_reference,
    config_of,
    rough,
    views_of,
)

CPU = torch.device("cpu")
AT = Progress(3, 12, 4)


def without_class_token() -> Config:
    config = config_of(MACRLConfig)
    return replace(config, model=replace(config.model, pooling="norm_mean"))


def test_without_a_class_token_fast_is_the_reference_and_chunks_are_the_whole() -> None:
    config = without_class_token()
    check_reference(config)
    check_chunks(config)
    check_features(config)


def test_the_loss_is_that_of_its_definition() -> None:
    config = without_class_token()
    objective, views = rough(config), views_of(config)
    assert isinstance(objective, MACRL)
    inputs = objective.inputs(views, at=AT)
    seen, more = inputs.kept
    patches = objective.decoder.pos_embed.shape[1]
    assert (seen.shape[1], more.shape[1]) == (patches // 4, patches // 2)
    output = objective(*views, at=AT)

    tokens = objective.encoder.latents(views[0], None, seen)
    q = normalize(objective.predictor(objective.encoder.head(tokens.mean(1))), dim=1)
    tokens = objective.momentum_encoder.latents(views[1], None, more)
    k = normalize(objective.momentum_encoder.head(tokens.mean(1)), dim=1)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ objective.queue.T], dim=1) / 0.2
    of_keys = cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64))
    assert float(output.watch["contrast_loss"]) == pytest.approx(of_keys.item(), rel=1e-12)
    hidden = mask_of(seen, patches)
    latents = objective.encoder.latents(views[0], None, seen)
    gaps = (objective.decoder(latents, seen) - objective.targets(views[0]))[hidden].abs()
    assert output.loss.item() == pytest.approx((gaps.mean() + of_keys).item(), rel=1e-12)

    # The evaluated feature is what is compared here, on all patches.
    whole = objective.encoder.latents(views[0]).mean(1)
    assert (objective.encoder(views[0]) - whole).abs().max() <= 1e-12

    objective.after_step(None, AT)
    assert torch.allclose(objective.queue[: len(k)], k, rtol=0, atol=1e-12)
    assert objective.ema_momentum(Progress(11, 12, 4)) is None


def test_absolute_errors_are_their_reference() -> None:
    noise = torch.Generator().manual_seed(0)
    predictions, targets = torch.randn(2, 3, 8, 12, dtype=torch.float64, generator=noise)
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[:, :2] = False
    loss, figures = masked_loss(predictions, targets, mask, 6, absolute=True)
    plain, plain_figures = plain_masked_loss(predictions, targets, mask.double(), absolute=True)
    assert float(loss.mean()) == pytest.approx(float(plain), rel=1e-12)
    assert (figures - plain_figures).abs().max() <= 1e-12
    flat = targets.mean(dim=-1, keepdim=True).expand_as(targets)
    ours, _ = masked_loss(flat, targets, mask, 6, absolute=True)
    assert torch.allclose(ours, figures[:, 0], rtol=1e-12)


def test_recipes_say_whose_numbers_they_are_and_travel_through_json() -> None:
    config = get_recipe("macrl_vit_s16_e300_b1024")
    assert config.objective == MACRLConfig()
    assert (config.data.view2.jitter_probability, config.data.view2.blur_probability) == (0, 0)
    assert "fastmoco's own choice" in EXPECTED[config.recipe].brief
    for name in ("macrl_vit_s16_e300_b1024", "macrl_nano7_e12_b256", "macrl_digits"):
        assert from_json(to_json(get_recipe(name))) == get_recipe(name)


def test_what_it_cannot_do_is_refused() -> None:
    base = get_recipe("macrl_digits")
    for change, rule in (
        ({"queue": 300}, r"queue=300: must be a multiple of .*=256"),
        ({"key_mask_ratio": 0.99}, r"objective\.key_mask_ratio=0\.99: .*none of the 16 patches"),
    ):
        wrong = replace(base, objective=replace(base.objective, **change))
        with pytest.raises(ValueError, match=rule):
            build_objective(wrong, CPU)
    wrong = replace(base, model=replace(base.model, pooling="mean"))
    with pytest.raises(ValueError, match="pooling='mean': tokens need a norm"):
        build_objective(wrong, CPU)
    for change in (
        {"queue": 0},
        {"temperature": 0},
        {"contrast_weight": -1},
        {"key_mask_ratio": 1},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(change))}="):
            MACRLConfig(**change)  # type: ignore[arg-type]
