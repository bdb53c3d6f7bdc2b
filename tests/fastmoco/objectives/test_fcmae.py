"""FCMAE: golden numbers of both scopes, what it refuses, its groups, and its recipes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmoco.models.convnextv2 import ConvNeXtV2, convnextv2_micro
from fastmoco.models.grn import Scope
from fastmoco.models.masks import kept_count, shuffled
from fastmoco.models.vit import vit_nano
from fastmoco.objectives.build import build_objective
from fastmoco.objectives.chunked import ChunkedStep
from fastmoco.objectives.fcmae import FCMAE
from fastmoco.objectives.interface import Coupling, Inputs, Progress
from fastmoco.recipes import get_recipe
from fastmoco.recipes.fcmae import FCMAEConfig
from tests.fastmoco.models.test_convnextv2 import require_close, wide
from tests.fastmoco.objectives.test_conformance import config_of
from tests.golden_objective import read_sibling_b

AT = Progress(0, 3, 1)


def golden(data: dict[str, np.ndarray], scope: Scope) -> FCMAE:
    """The objective with golden weights in float64; the norm after the encoder is not among them."""
    size, _, width = data["fcmae/cfg"].tolist()
    depths, widths = (tuple(data[f"fcmae/{name}"].tolist()) for name in ("depths", "dims"))
    objective = FCMAE(
        lambda: ConvNeXtV2(depths=depths, widths=widths, image_size=size),
        mask_ratio=float(data["fcmae/mask_ratio"]),
        decoder_width=width,
        scope=scope,
    ).double()
    state = objective.state_dict()
    for name in [name for name in data if name.startswith("fcmae/sd/")]:
        own = name.removeprefix("fcmae/sd/")
        place = own if own.startswith("encoder.") else f"decoder.{own}"
        state.pop(place).copy_(wide(data, name))
    assert set(state) == {"encoder.norm.weight", "encoder.norm.bias"}
    return objective


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("scope", ["image", "batch"])
def test_predictions_loss_and_gradients_match_golden(scope: Scope, plain: bool) -> None:
    data = read_sibling_b("convnextv2")
    objective, images = golden(data, scope), wide(data, "fcmae/x")
    kept = shuffled(wide(data, "fcmae/noise"), objective.kept)
    inputs = Inputs((images,), kept=(kept,))
    mask = torch.from_numpy(data["fcmae/mask"]) == 1
    assert not mask.gather(1, kept).any()
    assert bool((mask.sum(1) == mask.shape[1] - objective.kept).all())

    fast = objective.compare(objective.features(inputs, AT), AT)
    output = objective.reference(inputs, AT) if plain else fast
    output.loss.backward()
    require_close(output.loss, data, f"fcmae/{scope}/loss")
    stored = {name for name in data if name.startswith(f"fcmae/{scope}/grad/")}
    for name, parameter in objective.named_parameters():
        own = f"fcmae/{scope}/grad/{name.removeprefix('decoder.')}"
        if own in stored:
            require_close(parameter.grad, data, own)
            stored.remove(own)
    assert not stored

    latents = objective.encoder.masked(images, ~mask, scope)
    rows: Tensor = objective.decoder(latents, mask).transpose(1, 2).unflatten(2, latents.shape[2:])
    require_close(rows[:, :32], data, f"fcmae/{scope}/pred_first")
    require_close(rows.sum(1), data, f"fcmae/{scope}/pred_sum")


def test_the_published_grid_keeps_19_of_49_patches_and_the_official_norms_refuse_chunks() -> None:
    with torch.device("meta"):
        objective = FCMAE(lambda: convnextv2_micro(image_size=112))
    assert objective.kept == kept_count(49, 0.6) == 19
    assert objective.coupling is Coupling.NONE
    config = config_of(FCMAEConfig)
    official = replace(config.objective, response_norms="batch")  # type: ignore[type-var]
    coupled = build_objective(replace(config, objective=official), torch.device("cpu"))
    assert coupled.coupling is Coupling.TRUNK
    with pytest.raises(ValueError, match="response_norms=batch takes norms over the whole batch"):
        ChunkedStep(coupled, chunk=4)


def test_what_is_decayed_and_what_stays() -> None:
    objective = build_objective(config_of(FCMAEConfig), torch.device("cpu"))
    decays = {
        name: objective.parameter_group(name, parameter).weight_decay_scale == 1
        for name, parameter in objective.named_parameters()
    }
    assert decays["decoder.mask_token"]
    assert decays["encoder.stages.0.0.grn.gamma"]
    assert decays["decoder.pred.weight"]
    assert not decays["decoder.pred.bias"]
    assert not decays["encoder.stages.0.0.norm.weight"]
    frozen = {n for n, p in objective.named_parameters() if not p.requires_grad}
    assert frozen == {"encoder.norm.weight", "encoder.norm.bias"}


def test_what_it_cannot_take_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="must be a ConvNeXt V2"):
        FCMAE(vit_nano)
    with pytest.raises(ValueError, match="image_size=40: must be a multiple of 16"):
        FCMAE(lambda: convnextv2_micro(image_size=40))
    with pytest.raises(ValueError, match="shows the encoder none of the 1 patches"):
        FCMAE(lambda: convnextv2_micro(image_size=16))
    for fields, text in (
        ({"mask_ratio": 1.0}, "mask_ratio=1.0"),
        ({"decoder_depth": 0}, "decoder_depth=0"),
        ({"response_norms": "rank"}, "response_norms='rank'"),
    ):
        with pytest.raises(ValueError, match=text):
            FCMAEConfig(**fields)  # type: ignore[arg-type]


def test_recipes_have_the_numbers_of_the_official_code() -> None:
    config = get_recipe("fcmae_convnextv2_tiny_e800_b4096")
    optim, view = config.optim, config.data.view1
    assert (config.epochs, config.global_batch_size, config.precision) == (800, 4096, "fp32")
    assert (config.peak_lr, optim.weight_decay, optim.betas) == (2.4e-3, 0.05, (0.9, 0.95))
    assert (optim.warmup_epochs, view.crop_scale, view.interpolation) == (40, (0.2, 1), "bicubic")
    assert config.objective == FCMAEConfig(mask_ratio=0.6, decoder_width=512, decoder_depth=1)
    large = get_recipe("fcmae_convnextv2_base_e800_b4096")
    assert replace(large.model, architecture="convnextv2_tiny") == config.model
