"""MAE and SupMAE against golden numbers: positions, targets, one step, three steps, schedules.

What every objective must do is in test_conformance.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmoco.config.serial import from_json, to_json
from fastmoco.distributed import World
from fastmoco.errors import RunError
from fastmoco.models import VisionTransformer
from fastmoco.models.masks import mask_of, shuffled
from fastmoco.models.positions import column_first_positions
from fastmoco.objectives.build import OBJECTIVES, build_objective, encoder_builder
from fastmoco.objectives.chunked import ChunkedStep
from fastmoco.objectives.interface import START, Inputs
from fastmoco.objectives.mae import MAE
from fastmoco.objectives.masked import normalised_patches, pixel_patches
from fastmoco.objectives.supervised import Supervised
from fastmoco.objectives.supmae import SupMAE
from fastmoco.optim import build_adamw, learning_rate
from fastmoco.optim.groups import split_groups
from fastmoco.recipes import RECIPES, get_recipe
from fastmoco.recipes.mae import MAEConfig
from fastmoco.recipes.supmae import SupMAEConfig
from fastmoco.run.folder import RunFolder
from fastmoco.training.initial_weights import start_from
from tests.command_line import main
from tests.golden_objective import Data, error, read_sibling_b

NAMES = {
    "mask_token": "decoder.mask_token",
    "decoder_embed.": "decoder.embed.",
    "decoder_blocks.": "decoder.blocks.",
    "decoder_norm.": "decoder.norm.",
    "decoder_pred.": "decoder.pred.",
    "cls_head.": "class_head.",
}
"""Beginnings of names in the files that are not those of the encoder."""


@dataclass(frozen=True)
class Gates:
    """Largest errors: of losses, features, gradients, and parameters after AdamW."""

    loss: float
    feature: float
    gradient: float
    parameter: float


GATES = {
    torch.float64: Gates(1e-9, 1e-9, 1.1e-7, 1.1e-7),
    torch.float32: Gates(2e-6, 1e-5, 6e-5, 1.4e-5),
}
"""In float32 twice what a second implementation had. Without a true gradient: 1e-9 and 4e-5."""
CPU = torch.device("cpu")
every_dtype = pytest.mark.parametrize("dtype", GATES, ids=str)


@pytest.fixture(scope="module")
def data() -> Data:
    return read_sibling_b("mae")


@pytest.fixture(scope="module")
def supervised() -> Data:
    return read_sibling_b("supmae")


def our_name(name: str) -> str:
    for theirs, ours in NAMES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return f"encoder.{name}"


def golden(data: Data, prefix: str, dtype: torch.dtype, **options: Any) -> MAE:
    """The objective of a file with its weights."""
    size, patch, width, depth, heads, own, decoder_depth, decoder_heads = data["cfg"].tolist()[:8]
    build = partial(
        VisionTransformer,
        image_size=size,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=float(data["mlp_ratio"]),
        positions="sincos_columns",
        freeze_patch_embed=False,
    )
    options |= {
        "mask_ratio": float(data["mask_ratio"]),
        "decoder_width": own,
        "decoder_depth": decoder_depth,
        "decoder_heads": decoder_heads,
    }
    objective: MAE
    if "temperature" in data:
        objective = SupMAE(
            build,
            classes=int(data["cfg"][9]),
            hidden_dim=int(data["cfg"][8]),
            class_weight=float(data["cls_weight"]),
            class_temperature=float(data["temperature"]),
            **options,
        )
    else:
        objective = MAE(build, **options)
    start = f"{prefix}init/"
    weights = {
        our_name(key.removeprefix(start)): torch.from_numpy(value)
        for key, value in data.items()
        if key.startswith(start)
    }
    missing, unexpected = objective.to(dtype).load_state_dict(weights, strict=False)
    assert unexpected == []
    assert missing == ["encoder.pos_embed", "decoder.pos_embed"]
    return objective


def inputs_of(objective: MAE, x: np.ndarray, noise: np.ndarray, dtype: torch.dtype) -> Inputs:
    return Inputs(
        (torch.from_numpy(x).to(dtype),), kept=(shuffled(torch.from_numpy(noise), objective.kept),)
    )


def require_near(
    objective: MAE, data: Data, prefix: str, found: dict[str, Tensor], gate: float
) -> None:
    """Every array of a file below a prefix; of `qkv.bias` the third of the keys has no gradient."""
    keys = [key for key in data if key.startswith(prefix)]
    assert {our_name(key.removeprefix(prefix)) for key in keys} == found.keys()
    for key in keys:
        ours, expected = found[our_name(key.removeprefix(prefix))], data[key]
        if key.endswith("qkv.bias"):
            parts = zip(ours.chunk(3), np.split(expected, 3), strict=True)
            (first, of_keys, last) = parts
            require_noise(*of_keys, prefix)
            ours, expected = torch.cat([first[0], last[0]]), np.concatenate([first[1], last[1]])
        if key.endswith("cls_head.0.bias"):
            require_noise(ours, expected, prefix)
        else:
            assert error(ours, expected) <= gate, key


def require_noise(ours: Tensor, expected: np.ndarray, prefix: str) -> None:
    """A true zero, or what AdamW has made of its noise, which is that of float64 alone."""
    exact = ours.dtype == torch.float64
    if prefix.endswith("grad/"):
        assert np.abs(ours.double().numpy() - expected).max() <= (1e-9 if exact else 4e-5)
    elif exact:
        assert error(ours, expected) <= 1e-8


def gradients(objective: MAE) -> dict[str, Tensor]:
    return {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}


def test_positions_have_columns_first(data: Data) -> None:
    assert np.array_equal(column_first_positions(4, 16).numpy(), data["pos_4x4_16"])
    assert np.array_equal(column_first_positions(4, 12).numpy(), data["pos_4x4_12"])
    rows = column_first_positions(14, 768).numpy()[data["pos_14x14_768_rows"]]
    assert error(torch.from_numpy(rows), data["pos_14x14_768"]) <= 1.1e-7


def test_targets_are_normalised_patches(data: Data) -> None:
    x = torch.from_numpy(data["norm/x"]).double()
    assert error(normalised_patches(pixel_patches(x, 4)), data["target"]) <= 1e-9


@every_dtype
@pytest.mark.parametrize("tag", ["norm", "raw"])
def test_one_step_matches_golden(data: Data, tag: str, dtype: torch.dtype) -> None:
    objective, gate = golden(data, f"{tag}/", dtype, normalise_pixels=tag == "norm"), GATES[dtype]
    inputs = inputs_of(objective, data[f"{tag}/x"], data[f"{tag}/noise"], dtype)
    (kept,) = inputs.kept
    assert np.array_equal(mask_of(kept, 16).numpy(), data[f"{tag}/mask"] == 1)
    whole = shuffled(torch.from_numpy(data[f"{tag}/noise"]), 16)
    assert np.array_equal(whole.argsort(dim=1).numpy(), data[f"{tag}/ids_restore"])

    latents = objective.encoder.latents(inputs.views[0], None, kept)
    assert error(latents.detach(), data[f"{tag}/latent"]) <= gate.feature
    assert error(objective.decoder(latents, kept).detach(), data[f"{tag}/pred"]) <= gate.feature
    loss = objective.compare(objective.features(inputs, START), START).loss
    assert error(loss.detach(), data[f"{tag}/loss"]) <= gate.loss
    loss.backward()
    require_near(objective, data, f"{tag}/grad/", gradients(objective), gate.gradient)


@every_dtype
def test_three_steps_match_golden(data: Data, dtype: torch.dtype) -> None:
    objective, gate = golden(data, "norm/", dtype), GATES[dtype]
    decay = float(data["trace/weight_decay"])
    optimizer = build_adamw(
        objective.named_parameters(), lr=0.0, weight_decay=decay, betas=(0.9, 0.95)
    )
    split_groups(optimizer, objective.named_parameters(), objective.parameter_group)
    named = {parameter: name for name, parameter in objective.named_parameters()}
    plain = next(group for group in optimizer.param_groups if group["weight_decay"] == 0)
    assert {named[p] for p in plain["params"]} == {our_name(n) for n in data["trace/no_decay"]}
    for step in range(3):
        rate = learning_rate(
            step + 1,
            peak=float(data["trace/lr_peak"]),
            epochs=float(data["trace/epochs"]),
            warmup_epochs=float(data["trace/warmup_epochs"]),
            steps_per_epoch=int(data["trace/iters_per_epoch"]),
        )
        assert rate == pytest.approx(data["trace/lr"][step], rel=1e-12)
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs = inputs_of(objective, data["trace/x"][step], data["trace/noise"][step], dtype)
        optimizer.zero_grad()
        loss = objective.compare(objective.features(inputs, START), START).loss
        loss.backward()
        optimizer.step()
        assert error(loss.detach(), data["trace/loss"][step]) <= gate.loss
    state = {n: p.detach() for n, p in objective.named_parameters() if p.requires_grad}
    require_near(objective, data, "trace/final/", state, gate.parameter)


@every_dtype
def test_supmae_matches_golden(supervised: Data, dtype: torch.dtype) -> None:
    data, gate = supervised, GATES[dtype]
    objective = golden(data, "", dtype)
    assert isinstance(objective, SupMAE)
    inputs = inputs_of(objective, data["x"], data["noise"], dtype)
    inputs = inputs._replace(labels=torch.from_numpy(data["labels"]).long())
    features = objective.features(inputs, START)
    logits: list[Tensor] = []
    objective.class_head.register_forward_hook(lambda *call: logits.append(call[2].detach()))
    output = objective.compare(features, START)
    assert error(logits[0], data["logits"]) <= gate.feature
    assert error(output.loss.detach(), data["loss"]) <= gate.loss
    assert error(output.watch["reconstruction_loss"], data["rec_loss"]) <= gate.loss
    of_classes = objective.class_weight * output.watch["class_loss"]
    assert error(of_classes, data["cls_loss"]) <= gate.loss
    output.loss.backward()
    require_near(objective, data, "grad/", gradients(objective), gate.gradient)
    after = dict(objective.named_buffers())
    require_near(objective, data, "after/", after, gate.feature)


def test_schedules_match_golden() -> None:
    data = read_sibling_b("schedules")
    epochs, warmup, peak, end = data["mae/args"].tolist()
    assert end == 0
    for epoch, expected in zip(data["mae/epoch"].tolist(), data["mae/lr"].tolist(), strict=True):
        rate = learning_rate(
            round(epoch * 10**6),
            peak=peak,
            epochs=epochs,
            warmup_epochs=warmup,
            steps_per_epoch=10**6,
        )
        assert rate == pytest.approx(expected, rel=1e-9)


def test_layer_decay_of_a_fine_tuning_matches_golden() -> None:
    data = read_sibling_b("schedules")
    depth, decay = data["layer_decay/args"].tolist()
    build = partial(
        VisionTransformer,
        image_size=8,
        patch_size=4,
        embed_dim=4,
        depth=int(depth),
        num_heads=1,
        freeze_patch_embed=False,
    )
    objective = Supervised(build, classes=3, layer_decay=decay)
    named = dict(objective.named_parameters())
    for i, name in enumerate(data["layer_decay/names"].tolist()):
        own = "encoder." + name.removeprefix("fc_")
        group = objective.parameter_group(own, named[own])
        assert group.lr_scale == pytest.approx(data["layer_decay/scale"][i], rel=1e-12)
        assert 0.05 * group.weight_decay_scale == data["layer_decay/wd"][i]


def test_a_step_in_chunks_keeps_the_masks_of_the_whole() -> None:
    objective = build_objective(replace(get_recipe("mae_digits"), precision="fp64"), CPU)
    view = torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (kept,) = objective.inputs((view,)).kept
    assert kept.shape == (6, 4)
    assert len({tuple(row) for row in kept.tolist()}) == 6
    seen = []
    latents = objective.encoder.latents
    objective.encoder.latents = lambda view, *rest: (seen.append(rest[-1]), latents(view, *rest))[1]
    ChunkedStep(objective, chunk=4)(view)
    assert torch.equal(torch.cat(seen), kept)


def test_recipes_carry_the_published_numbers_and_travel_through_json() -> None:
    base = get_recipe("mae_vit_b16_e800_b4096")
    assert (base.peak_lr, base.optim.weight_decay) == (pytest.approx(2.4e-3), 0.05)
    assert (base.optim.betas, base.optim.warmup_epochs) == ((0.9, 0.95), 40)
    view = base.data.view1
    assert (view.crop_scale, view.interpolation, view.jitter_probability) == (
        (0.2, 1.0),
        "bicubic",
        0,
    )
    with torch.device("meta"):
        objective = OBJECTIVES[MAEConfig](base, encoder_builder(base.model))
    trained = {n: p.numel() for n, p in objective.named_parameters() if p.requires_grad}
    assert sum(trained.values()) == 111_655_680
    assert sum(size for n, size in trained.items() if n.startswith("encoder.")) == 85_647_360
    supmae = get_recipe("supmae_vit_b16_e400_b2048")
    assert supmae.objective == SupMAEConfig(
        decoder_depth=1, class_weight=0.01, class_temperature=10.0
    )
    assert (supmae.model.hidden_dim, supmae.optim.warmup_epochs) == (3072, 20)
    names = [name for name in RECIPES if name.startswith(("mae", "supmae"))]
    assert len(names) == 7
    for name in names:
        assert from_json(to_json(get_recipe(name))) == get_recipe(name)


def test_it_starts_as_published() -> None:
    """Xavier-uniform of whole matrices, the projection's too with torch's bias; tokens normal."""
    base = get_recipe("mae_digits")
    base = replace(base, model=replace(base.model, architecture="vit_micro"))
    objective = build_objective(base, CPU)
    objective.requires_grad_(False)
    encoder, decoder = objective.encoder, objective.decoder
    for weight in (
        encoder.blocks[0].attn.qkv.weight,
        encoder.patch_embed.proj.weight.flatten(1),
        decoder.blocks[0].attn.qkv.weight,
        decoder.pred.weight,
    ):
        bound = (6 / sum(weight.shape)) ** 0.5
        assert 0.95 * bound < float(weight.abs().max()) <= bound
    bias = encoder.patch_embed.proj.bias
    assert 0.8 / 12**0.5 < float(bias.abs().max()) <= 1 / 12**0.5
    assert float(encoder.blocks[0].attn.qkv.bias.abs().max()) == 0
    assert float(encoder.cls_token.std()) == pytest.approx(0.02, rel=0.3)
    assert float(decoder.mask_token.std()) == pytest.approx(0.02, rel=0.4)


def test_what_it_cannot_do_is_refused() -> None:
    base = get_recipe("mae_digits")
    for name, value, rule in (
        ("pooling", "mean", "reads a class token"),
        ("mlp_norm", "batch", "left out"),
    ):
        wrong = replace(base, model=replace(base.model, **{name: value}))
        with pytest.raises(ValueError, match=rule):
            build_objective(wrong, CPU)
    for ratio, rule in ((0.99, "none of the 16"), (1e-17, "all of the 16")):
        wrong = replace(base, objective=replace(base.objective, mask_ratio=ratio))
        with pytest.raises(ValueError, match=f"mask_ratio={ratio}.*{rule}"):
            build_objective(wrong, CPU)
    with pytest.raises(ValueError, match=r"classes=0.*--objective\.classes"):
        build_objective(get_recipe("supmae_digits"), CPU)
    for fields in ({"mask_ratio": 1.0}, {"decoder_width": 30}, {"decoder_depth": 0}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            MAEConfig(**fields)  # type: ignore[arg-type]
    for fields in ({"classes": 1}, {"class_weight": -1.0}, {"class_temperature": 0.0}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            SupMAEConfig(**fields)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"decoder_depth.*at most 64"):
        replace(base, objective=replace(base.objective, decoder_depth=10**6))
    objective = build_objective(base, CPU)
    with pytest.raises(ValueError, match="with masks: 0"):
        objective.features(Inputs((torch.zeros(2, 3, 8, 8),)), START)
    for size in (4, 12):
        with pytest.raises(ValueError, match=r"must be \[B, 3, 8, 8\]"):
            objective(torch.zeros(2, 3, size, size))
    labelled = replace(base, objective=SupMAEConfig(classes=3, decoder_width=32))
    with pytest.raises(ValueError, match=r"labels=None"):
        build_objective(labelled, CPU)(torch.zeros(2, 3, 8, 8))


def test_a_published_file_starts_a_run(tmp_path: Path) -> None:
    """Names of the releases, decoder and class branch included; a table of MoCo v3 is refused."""
    config = get_recipe("mae_digits")
    theirs = build_objective(replace(config, seed=1), CPU)
    state = theirs.encoder.state_dict()
    for name, tensor in theirs.decoder.state_dict().items():
        state["mask_token" if name == "mask_token" else f"decoder_{name}"] = tensor
    labelled = SupMAEConfig(classes=3, decoder_width=32)
    branch = build_objective(replace(config, objective=labelled), CPU).class_head
    state |= {f"cls_head.{name}": tensor for name, tensor in branch.state_dict().items()}
    path = tmp_path / "mae_pretrain.pth"
    torch.save({"model": state}, path)
    config = replace(config, model=replace(config.model, init=str(path)))
    ours = build_objective(config, CPU)
    found = start_from(config, ours, World())
    assert found is not None
    assert found.fit.counts()["matched"] == len(theirs.encoder.state_dict())
    assert set(found.fit.unused.values()) == {"decoder", "class branch"}
    for name, tensor in theirs.encoder.state_dict().items():
        assert torch.equal(ours.encoder.state_dict()[name], tensor)

    wrong = replace(config, model=replace(config.model, positions="sincos"))
    with pytest.raises(RunError, match=r"--model\.positions sincos_columns"):
        start_from(wrong, build_objective(wrong, CPU), World())


@pytest.mark.parametrize("recipe", ["mae_digits", "supmae_digits"])
def test_the_command_line_trains(digits: tuple[str, str], tmp_path: Path, recipe: str) -> None:
    words = ["train", recipe, "--out", str(tmp_path / "run"), "--epochs", "2"]
    words += ["--data.shards", digits[0], "--knn.test-shards", digits[1], "--threads", "1"]
    assert main(words) == 0
    folder = RunFolder(tmp_path / "run")
    assert 0.5 < folder.read_metric("patch_mean_loss")[-1][1] < 1
    assert folder.read_metric("prediction_std")[-1][1] > 0
    assert folder.read_metric("feature_std")[-1][1] > 0
    if recipe == "supmae_digits":
        assert folder.read_metric("top1")
        assert folder.read_metric("train_top1")


def test_other_forms_of_the_blocks_give_the_same() -> None:
    """Of encoder and decoder."""
    base = replace(get_recipe("mae_digits"), precision="fp64")
    view = torch.randn(5, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def found(**form: str) -> tuple[list[Any], Tensor, dict[str, Tensor]]:
        config = replace(base, model=replace(base.model, **form))
        objective = build_objective(config, CPU)
        loss = objective(view).loss
        loss.backward()
        forms = [(b.fused, b.recompute) for b in objective.decoder.blocks]
        return forms, loss.detach(), gradients(objective)

    forms, loss, expected = found()
    assert forms == [(False, "none")]
    for form, decoder in (
        ({"checkpointing": "full"}, (False, "full")),
        ({"checkpointing": "selective"}, (False, "selective")),
        ({"blocks": "fused"}, (True, "none")),
    ):
        forms, ours, own = found(**form)
        assert forms == [decoder]
        assert float(ours) == pytest.approx(float(loss), rel=1e-12)
        for name, gradient in expected.items():
            assert float((own[name] - gradient).abs().max()) <= 1e-12, name
