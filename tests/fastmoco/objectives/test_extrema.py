"""ExtreMA against golden numbers: one forward with its gradients, the average before the targets,
schedules; and the weights that it hands on.

What every objective must do is in test_conformance.py.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmoco.checkpoint import CheckpointError
from fastmoco.config.serial import from_json, to_json
from fastmoco.models import VisionTransformer
from fastmoco.models.encoder_file import EncoderDescription, describe_run
from fastmoco.models.masks import disjoint
from fastmoco.models.weights.building import load_foreign
from fastmoco.models.weights.fitting import fit_encoder
from fastmoco.models.weights.writing import traced
from fastmoco.objectives.build import build_objective
from fastmoco.objectives.extrema import ExtreMA
from fastmoco.objectives.interface import START, Inputs, Progress
from fastmoco.optim import learning_rate
from fastmoco.recipes import EXPECTED, get_recipe
from fastmoco.recipes.extrema import ExtreMAConfig
from fastmoco.recipes.supervised import FineTuning, fine_tuning
from fastmoco_pipelines.spec import extrema_views
from tests.golden_objective import Data, error, read_sibling_b

GATES = {
    torch.float64: {"loss": 1e-9, "feature": 1e-9, "gradient": 1.1e-7, "zero": 1e-9},
    torch.float32: {"loss": 2e-6, "feature": 1e-5, "gradient": 6e-5, "zero": 4e-5},
}
"""In float32 twice what a second implementation had."""
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data() -> Data:
    return read_sibling_b("extrema")


def ours(arrays: Data, prefix: str) -> Data:
    """Arrays of a file below a prefix by our names: q, k and v of class attention are one matrix."""
    found: Data = {}
    for key in (key for key in arrays if key.startswith(prefix)):
        name = key.removeprefix(prefix).removeprefix("base_")
        if ".attn.q." in name:
            parts = [arrays[key.replace(".attn.q.", f".attn.{part}.")] for part in "qkv"]
            found[name.replace(".attn.q.", ".attn.qkv.")] = np.concatenate(parts)
        elif ".attn.k." not in name and ".attn.v." not in name:
            found[name] = arrays[key]
    return found


def golden(data: Data, dtype: torch.dtype) -> ExtreMA:
    """The objective of the file with its weights."""
    size, patch, width, depth, heads, hidden, dim = data["cfg"].tolist()
    build = partial(
        VisionTransformer,
        image_size=size,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=float(data["mlp_ratio"]),
        pooling="class_attention",
        positions="sincos_columns",
        freeze_patch_embed=False,
    )
    objective = ExtreMA(
        build,
        mask_ratio=float(data["mask_ratio"]),
        masks=int(data["num_masks"]),
        projection_dim=dim,
        hidden_dim=hidden,
    ).to(dtype)
    weights = {name: torch.from_numpy(value) for name, value in ours(data, "init/").items()}
    missing, unexpected = objective.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["encoder.pos_embed", "momentum_encoder.pos_embed"], [])
    return objective


@pytest.mark.parametrize("dtype", GATES, ids=str)
def test_a_step_matches_golden(data: Data, dtype: torch.dtype) -> None:
    objective, gates = golden(data, dtype), GATES[dtype]
    positions = objective.encoder.pos_embed[0, :20].detach()
    assert error(positions, data["pos_rows"]) <= 1.1e-7

    # The average moves first, with the weights from before the step.
    objective.update_momentum_encoder(float(data["m"]))
    state = objective.state_dict()
    for name, expected in ours(data, "after/").items():
        assert error(state[name], expected) <= gates["feature"], name

    masks = disjoint(torch.from_numpy(data["noise"]), objective.shown(28)[1], objective.masks)
    assert np.array_equal(masks.numpy(), data["masks"])
    views = tuple(torch.from_numpy(data[name]).to(dtype) for name in ("x1", "x2"))
    output = objective.compare(objective.features(Inputs(views, kept=masks.unbind()), START), START)
    assert error(output.watch["queries"].flatten(0, 1), data["q"]) <= gates["feature"]
    assert error(output.watch["keys"][0], data["k"]) <= gates["feature"]
    assert error(output.loss.detach(), data["loss"]) <= gates["loss"]

    # The bias of all keys has no gradient in truth.
    output.loss.backward()
    found = {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}
    expected = ours(data, "grad/")
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        wanted, own = expected[name], gradient
        if name.endswith("qkv.bias"):
            keys = slice(len(own) // 3, 2 * len(own) // 3)
            gap = own[keys].double() - torch.from_numpy(wanted[keys])
            assert gap.abs().max() <= gates["zero"], name
            wanted, own = np.delete(wanted, keys), torch.from_numpy(np.delete(own.numpy(), keys))
        assert error(own, wanted) <= gates["gradient"], name


def test_schedules_match_golden(data: Data) -> None:
    stored = read_sibling_b("schedules")
    epochs, warmup, peak, _, momentum = stored["extrema/args"].tolist()
    objective = golden(data, torch.float64)
    assert momentum == ExtreMAConfig().ema_momentum
    for i, epoch in enumerate(stored["extrema/epoch"].tolist()):
        step, steps = round(epoch * 10**4), {"steps_per_epoch": 10**4}
        rate = learning_rate(step, peak=peak, epochs=epochs, warmup_epochs=warmup, **steps)
        assert rate == pytest.approx(stored["extrema/lr"][i], rel=1e-9)
        at = Progress(step, round(epochs * 10**4), **steps)
        expected = pytest.approx(stored["extrema/m"][i], rel=1e-12)
        assert objective.schedules(at) == {"ema_momentum": expected}
        if step:  # the step before moves the average by it
            assert objective.ema_momentum(replace(at, step=step - 1)) == expected


def test_recipes_have_the_published_numbers() -> None:
    base = get_recipe("extrema_vit_b16_e300_b2048")
    optim, model, own = base.optim, base.model, base.objective
    assert (base.epochs, base.global_batch_size, base.peak_lr) == (300, 2048, pytest.approx(1.2e-3))
    assert (optim.betas, optim.weight_decay, optim.warmup_epochs) == ((0.9, 0.95), 0.1, 40)
    assert (optim.clip_norm, model.drop_path, model.positions) == (0, 0.1, "sincos_columns")
    assert (model.hidden_dim, model.projection_dim) == (4096, 256)
    assert isinstance(own, ExtreMAConfig)
    assert (own.mask_ratio, own.masks, own.layer_scale) == (0.8, 5, 0.1)
    assert (own.ema_momentum, own.ema_schedule) == (0.996, "cosine")
    assert (base.data.view1, base.data.view2) == extrema_views()
    assert EXPECTED["extrema_vit_b16_e300_b2048"].linear == 73.3
    assert EXPECTED["extrema_vit_b16_e300_b2048_m90"].linear == 68.4
    objective = build_objective(
        replace(base, model=replace(base.model, architecture="vit_nano", image_size=224)), CPU
    )
    assert isinstance(objective, ExtreMA)
    assert objective.shown(224) == (196, 39)  # 195 of 196 patches are seen
    larger = get_recipe("extrema_vit_b16_e300_b2048_m90").objective
    assert isinstance(larger, ExtreMAConfig)
    assert (larger.mask_ratio, larger.masks) == (0.9, 8)
    assert objective.evaluation_encoder is objective.momentum_encoder
    decays = {
        name.removeprefix("encoder."): objective.parameter_group(name, p).weight_decay_scale
        for name, p in objective.named_parameters()
        if p.requires_grad
    }
    assert {name for name, p in objective.encoder.named_parameters() if p.ndim > 1} - {
        name for name, scale in decays.items() if scale
    } == {"cls_token", "pos_embed"}
    assert decays["blocks_token.0.gamma_1"] == decays["blocks_token.1.attn.qkv.bias"] == 0
    assert from_json(to_json(base)) == base


@pytest.mark.parametrize(
    ("model", "objective", "message"),
    [
        ({"pooling": "class"}, {}, r"model\.pooling='class'.*--model\.pooling class_attention"),
        ({}, {"masks": 3}, r"masks=3: .* need 24, and a view of 8 pixels has 16; take at most 2"),
        ({}, {"mask_ratio": 0.99}, r"mask_ratio=0\.99: shows the encoder none of the 16"),
        ({"architecture": "resnet_nano"}, {}, "must be a ViT"),
        ({"mlp_norm": "batch"}, {}, "masked or left out would change"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    model: dict[str, object], objective: dict[str, object], message: str
) -> None:
    base = get_recipe("extrema_digits")
    if "architecture" in model:
        model |= {"pooling": "class", "positions": "sincos", "patch_size": 16}
        model |= {"freeze_patch_embed": True}
    config = replace(
        base,
        model=replace(base.model, **model),  # type: ignore[arg-type]
        objective=replace(base.objective, **objective),  # type: ignore[arg-type]
    )
    with pytest.raises(ValueError, match=message):
        build_objective(config, CPU)


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [("mask_ratio", 1.0, "below 1"), ("masks", 0, "at least 1"), ("layer_scale", 0.0, "positive")],
)
def test_invalid_numbers_are_refused(field: str, value: float, rule: str) -> None:
    with pytest.raises(ValueError, match=f"{field}={value}: .*{rule}"):
        ExtreMAConfig(**{field: value})  # type: ignore[arg-type]


def test_a_pass_is_of_one_mask_and_draws_of_its_own() -> None:
    """Stochastic depth differs between the masks of an image, and masks share no patch."""
    base = get_recipe("extrema_digits")
    objective = build_objective(replace(base, model=replace(base.model, drop_path=0.5)), CPU)
    views = tuple(torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    inputs = objective.inputs(views)
    assert inputs.paths[0].shape == (4, 2, 2, 2)
    assert not torch.equal(inputs.paths[0][:, 0], inputs.paths[0][:, 1])
    seen = torch.cat(inputs.kept, dim=1)
    assert all(len(set(row)) == 16 for row in seen.tolist())
    later = objective.inputs(views, at=Progress(1, 2))
    assert not torch.equal(torch.cat(later.kept, dim=1), seen)


@pytest.mark.parametrize("official", [False, True])
def test_fine_tuning_takes_the_momentum_encoder_without_class_blocks(
    data: Data, tmp_path: Path, official: bool
) -> None:
    """Positions train and the feature is the mean of the patch tokens, whether the weights are those
    of a run or by the names of the official code."""
    base = get_recipe("extrema_digits")
    objective = golden(data, torch.float32)
    trunk = objective.momentum_encoder
    weights = {n: t for n, t in trunk.state_dict().items() if not n.startswith("head.")}
    if official:
        arrays = {key: value for key, value in data.items() if key.startswith("init/")}
        weights = {key[5:]: torch.from_numpy(value) for key, value in arrays.items()}
        for network in ("base_encoder", "momentum_encoder"):
            weights[f"{network}.pos_embed"] = trunk.pos_embed.detach()
    path = tmp_path / "w.pth"
    torch.save({"model": weights}, path)
    found = load_foreign(path, "momentum" if official else None, heads=4)
    assert isinstance(found.description, EncoderDescription)
    assert (found.description.pooling, found.description.positions) == (
        "class_attention",
        "sincos_columns",
    )
    images = torch.from_numpy(data["x2"])
    assert torch.equal(found.encoder(images), trunk.eval()(images))

    options = FineTuning(warmup_epochs=0, drop_path=0.0)
    config = fine_tuning(
        base.model, base.eval_spec(), options, train="a", test="b", images=64, before=None
    )
    assert (config.model.pooling, config.model.positions) == ("norm_mean", "learned")
    target = VisionTransformer(
        image_size=28,
        patch_size=2,
        embed_dim=16,
        depth=2,
        num_heads=4,
        mlp_ratio=2.0,
        pooling="norm_mean",
        positions="learned",
    )
    fit = fit_encoder(target.state_dict(), found.weights, positions="learned", heads=4)
    assert fit.tensors.keys() == target.state_dict().keys()
    assert {"class token", "class attention"} <= set(fit.unused.values())
    with_class = VisionTransformer(
        image_size=28, patch_size=2, embed_dim=16, depth=2, num_heads=4, mlp_ratio=2.0
    )
    with pytest.raises(CheckpointError, match=r"give --model\.pooling class_attention"):
        fit_encoder(with_class.state_dict(), found.weights, positions="learned", heads=4)


def test_a_traced_encoder_takes_other_batches() -> None:
    description = describe_run(get_recipe("extrema_digits"))
    assert isinstance(description, EncoderDescription)
    encoder = description.build().eval()
    images = torch.randn(3, 3, 8, 8)
    program = traced(encoder, description).module()
    torch.testing.assert_close(program(images), encoder(images))
