"""CMAE against golden numbers: masks, features, both losses, gradients, the average.

What every objective must do is in test_conformance.py.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastmoco.config.serial import from_json, to_json
from fastmoco.distributed import BatchNorm
from fastmoco.models import VisionTransformer
from fastmoco.models.masks import blocks2x2, mask_of
from fastmoco.models.positions import sincos_positions
from fastmoco.objectives.build import OBJECTIVES, build_objective, encoder_builder
from fastmoco.objectives.cmae import CMAE
from fastmoco.objectives.interface import START, Inputs, Progress
from fastmoco.recipes import EXPECTED, get_recipe, with_image_size
from fastmoco.recipes.cmae import CMAEConfig
from fastmoco_pipelines.spec import cmae_views
from tests.golden_objective import Data, error, read_sibling_b

NETWORKS = {
    "backbone": "encoder",
    "target_backbone": "momentum_encoder",
    "pixel_decoder": "decoder",
    "projector": "encoder.head",
    "target_projector": "momentum_encoder.head",
    "head.predictor": "predictor",
}
LAYERS = (
    (r"ffn\.layers\.0\.0", "mlp.fc1"),
    (r"ffn\.layers\.1", "mlp.fc2"),
    (r"(layers|decoder_blocks)\.(\d+)\.", r"blocks.\2."),
    (r"(blocks\.\d+)\.ln", r"\1.norm"),
    (r"\bln1\b", "norm"),
    ("projection", "proj"),
    ("decoder_", ""),
    ("fc0", "0"),
    ("bn0", "1"),
    (r"fc1\.weight$", "3.weight"),
)
"""Names of layers in the file, by pattern, and ours; MLPs have been renamed before heads."""
NOISE = (
    "feature_decoder.norm.bias",
    "feature_decoder.pred.bias",
    "head.0.bias",
    "predictor.0.bias",
)
"""Without a true gradient, because a batch norm follows."""
GATES = {torch.float64: (1e-9, 1.1e-7, 1e-9), torch.float32: (1e-5, 1.2e-4, 4e-5)}
"""Largest errors of values, of gradients, and of those that are zero in truth; in float32 twice
what a second implementation had."""


@pytest.fixture(scope="module")
def data() -> Data:
    return read_sibling_b("cmae")


def our_name(golden_name: str) -> str:
    network = next((n for n in NETWORKS if golden_name.startswith(f"{n}.")), None)
    if network in ("projector", "target_projector", "head.predictor"):
        rest = golden_name.removeprefix(f"{network}.")
        for theirs, ours in LAYERS[-3:]:
            rest = re.sub(theirs, ours, rest)
        return f"{NETWORKS[network]}.{rest}"
    side, _, rest = golden_name.partition(".")
    for theirs, ours in LAYERS[:-3]:
        rest = re.sub(theirs, ours, rest)
    return f"{NETWORKS.get(side, side)}.{rest}"


def golden(data: Data, dtype: torch.dtype) -> CMAE:
    """The objective of the file with its weights."""
    size, patch, width, depth, heads, own, own_heads, pixels, features, hidden, dim = data[
        "cfg"
    ].tolist()
    build = partial(
        VisionTransformer,
        image_size=size,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        freeze_patch_embed=False,
    )
    objective = CMAE(
        build,
        projection_dim=dim,
        hidden_dim=hidden,
        temperature=float(data["tau"]),
        ema_momentum=float(data["m"]),
        feature_decoder_depth=features,
        mask_ratio=float(data["mask_ratio"]),
        decoder_width=own,
        decoder_depth=pixels,
        decoder_heads=own_heads,
    ).to(dtype)
    weights = {
        our_name(name.removeprefix("init/")): torch.from_numpy(value)
        for name, value in data.items()
        if name.startswith("init/")
    }
    missing, unexpected = objective.load_state_dict(weights, strict=False)
    assert unexpected == []
    left = {name for name in missing if "pos_embed" not in name and "running" not in name}
    assert {name for name in left if "num_batches" not in name} == {
        "momentum_encoder.norm.weight",
        "momentum_encoder.norm.bias",
    }
    return objective


@pytest.mark.parametrize("dtype", GATES, ids=str)
def test_one_step_matches_golden(data: Data, dtype: torch.dtype) -> None:
    objective, (value_gate, gradient_gate, noise_gate) = golden(data, dtype), GATES[dtype]
    kept = blocks2x2(torch.from_numpy(data["noise"]), objective.kept // 4)
    assert np.array_equal(mask_of(kept, 64).numpy(), data["mask"] == 1)
    views = tuple(torch.from_numpy(data[name]).to(dtype) for name in ("x", "xt"))
    inputs = Inputs(views, kept=(kept,))

    latents = objective.encoder.latents(views[0], None, kept)
    assert error(objective.decoder(latents, kept).detach(), data["pred_pixel"]) <= value_gate
    features = objective.features(inputs, START)
    assert error(features.online[1].detach(), data["pooled_feature"]) <= value_gate
    output = objective.compare(features, START)
    for name, found in (
        ("q", output.watch["queries"][0]),
        ("k", output.watch["keys"][0]),
        ("loss_rc", output.watch["reconstruction_loss"]),
        ("loss_ct", output.watch["contrast_loss"]),
    ):
        assert error(found, data[name]) <= value_gate, name
    output.loss.backward()

    found = {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}
    keys = [key for key in data if key.startswith("grad/")]
    assert {our_name(key.removeprefix("grad/")) for key in keys} == found.keys()
    for key in keys:
        ours, expected = found[our_name(key.removeprefix("grad/"))], data[key]
        if key.endswith("qkv.bias"):
            require_noise(ours.chunk(3)[1], np.split(expected, 3)[1], noise_gate)
            first, _, last = ours.chunk(3)
            ours, expected = torch.cat([first, last]), np.delete(expected, slice(12, 24))
        if our_name(key.removeprefix("grad/")).endswith(NOISE):
            require_noise(ours, expected, noise_gate)
        else:
            assert error(ours, expected) <= gradient_gate, key

    at = Progress(5, 10, 2)
    assert objective.ema_momentum(at) == objective.schedules(at)["ema_momentum"] == data["m"]
    objective.update_momentum_encoder(objective.ema_momentum(at))
    state = objective.state_dict()
    for key in (key for key in data if key.startswith("after_ema/")):
        ours = state[our_name(key.removeprefix("after_ema/"))]
        assert error(ours, data[key]) <= value_gate, key


def require_noise(ours: Tensor, expected: np.ndarray, gate: float) -> None:
    assert np.abs(ours.double().numpy() - expected).max() <= gate


def test_positions_have_rows_first(data: Data) -> None:
    assert np.array_equal(sincos_positions(8, 12)[[0, 1, 2, 8, 9]].numpy(), data["pos_enc_rows"])
    objective = golden(data, torch.float32)
    for network in (objective.encoder, objective.decoder, objective.feature_decoder):
        assert torch.equal(network.pos_embed[0], sincos_positions(8, 12))


def test_keys_read_no_final_norm_and_heads_are_those_of_the_method(data: Data) -> None:
    objective = golden(data, torch.float64)
    views = tuple(torch.from_numpy(data[name]).double() for name in ("x", "xt"))
    before = objective(*views).watch["keys"]
    with torch.no_grad():
        objective.momentum_encoder.norm.weight.mul_(3)
    assert torch.equal(objective(*views).watch["keys"], before)
    for head in (objective.encoder.head, objective.momentum_encoder.head, objective.predictor):
        assert [type(m) for m in head] == [nn.Linear, BatchNorm, nn.ReLU, nn.Linear]
        assert (head[0].bias is None, head[3].bias is None) == (False, True)
        assert head[1].eps == 1e-6


def test_what_decays() -> None:
    objective = build_objective(get_recipe("cmae_digits"), torch.device("cpu"))
    named = {n: p for n, p in objective.named_parameters() if p.requires_grad}
    plain = {n for n, p in named.items() if not objective.parameter_group(n, p).weight_decay_scale}
    assert {n for n, p in named.items() if p.ndim <= 1} - plain == {
        "encoder.head.1.weight",
        "predictor.1.weight",
    }
    assert {n for n in plain if named[n].ndim > 1} == {
        "encoder.cls_token",
        "decoder.mask_token",
        "feature_decoder.mask_token",
    }


def test_recipes_carry_the_published_numbers_and_travel_through_json() -> None:
    base = get_recipe("cmae_vit_b16_e300_b4096")
    assert (base.peak_lr, base.optim.weight_decay) == (pytest.approx(2.4e-3), 0.05)
    assert (base.optim.betas, base.optim.warmup_epochs) == ((0.9, 0.95), 40)
    assert base.optim.warmup_lr == pytest.approx(1e-4 * base.peak_lr)
    assert base.objective == CMAEConfig()
    assert (base.data.view1, base.data.view2) == cmae_views()
    assert (base.data.view2.base_size, base.data.view2.shift) == (256, 31)
    assert (base.model.hidden_dim, base.model.projection_dim) == (1536, 256)
    with torch.device("meta"):
        objective = OBJECTIVES[CMAEConfig](base, encoder_builder(base.model))
    assert objective.kept == 68
    assert len(objective.decoder.blocks) == 8
    assert len(objective.feature_decoder.blocks) == 2
    assert objective.feature_decoder.pred.out_features == 768
    for epochs in (300, 800, 1600):
        recipe = f"cmae_vit_b16_e{epochs}_b4096"
        assert get_recipe(recipe) == replace(base, recipe=recipe, epochs=epochs)
        assert EXPECTED[recipe].linear is None
    for name in ("cmae_vit_b16_e300_b4096", "cmae_nano7_e12_b256", "cmae_digits"):
        assert from_json(to_json(get_recipe(name))) == get_recipe(name)


def test_what_it_cannot_do_is_refused() -> None:
    base = get_recipe("cmae_digits")
    odd = with_image_size(base, 6)
    with pytest.raises(ValueError, match="3 patches per side: must be an even number"):
        OBJECTIVES[CMAEConfig](odd, encoder_builder(odd.model))
    few = replace(base, objective=replace(base.objective, mask_ratio=0.8))
    with pytest.raises(ValueError, match=r"none of the 4 blocks of 2 x 2 patches; take a smaller"):
        build_objective(few, torch.device("cpu"))
    for change in ({"temperature": 0}, {"ema_momentum": 2}, {"feature_decoder_depth": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(change))}="):
            CMAEConfig(**change)  # type: ignore[arg-type]
    objective = build_objective(base, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"views: 1 .*compares 2"):
        objective(torch.zeros(2, 3, 8, 8))
