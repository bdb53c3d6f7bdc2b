"""SimSiam against golden numbers: loss, schedules, three steps on a conv trunk and on a ViT.

Two ranks: tests/distributed/test_siblings_ranks.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from fastmoco.config.serial import from_json, may_change, to_json
from fastmoco.distributed import World, parallelize
from fastmoco.objectives.build import build_objective
from fastmoco.objectives.interface import ParameterGroup
from fastmoco.objectives.simsiam import SimSiam, negative_cosine
from fastmoco.objectives.watched import feature_deviation
from fastmoco.optim import build_adamw, learning_rate
from fastmoco.optim.groups import WHOLE, set_learning_rates, split_groups
from fastmoco.optim.sgd import build_sgd
from fastmoco.recipes import EXPECTED, RECIPES, get_recipe
from fastmoco.recipes.simsiam import SimSiamConfig
from fastmoco.telemetry.stability import feature_std
from fastmoco.training.load_run import load_run
from fastmoco_pipelines.spec import Resume
from tests.command_line import main
from tests.golden_objective import (
    FLOAT64,
    ConvTrunk,
    Data,
    Gates,
    error,
    read_sibling,
    same_trace,
    sibling_vit,
)

FLOAT32 = {
    "tr/": Gates(loss=2.1e-4, parameter=6e-5, gradient=6e-5),
    "vit/": Gates(loss=1.5e-3, parameter=None, gradient=6e-5, adamw_noise=True),
}
"""The parameters of `vit/` have none: one gradient of 8e-9 makes them noise."""


@pytest.fixture(scope="module")
def data() -> Data:
    return read()


def read() -> Data:
    return read_sibling("simsiam")


def our_name(golden_name: str) -> str:
    """The file calls the projector of the conv trunk fc."""
    return golden_name.replace("encoder.fc.", "encoder.head.")


def load(objective: SimSiam, data: Data, prefix: str) -> None:
    """The objective in float64 with the golden start."""
    start = f"{prefix}init/"
    names = [key for key in data if key.startswith(start)]
    weights = {our_name(key[len(start) :]): torch.from_numpy(data[key]) for key in names}
    missing, unexpected = objective.double().load_state_dict(weights, strict=False)
    assert unexpected == []
    assert all(name.endswith(("pos_embed", "num_batches_tracked")) for name in missing), missing


def conv_case(data: Data, **options: Any) -> tuple[SimSiam, torch.optim.Optimizer]:
    """The objective and the optimizer of `tr/`."""
    _, _, width1, width2, dim, hidden = data["tr/cfg"].tolist()
    objective = SimSiam(
        partial(ConvTrunk, width1, width2),
        projection_dim=dim,
        hidden_dim=width2,
        predictor_hidden_dim=hidden,
        **options,
    )
    load(objective, data, "tr/")
    assert not objective.encoder.head[6].bias.requires_grad
    named = list(objective.named_parameters())
    return objective, build_sgd(
        named, lr=0.0, weight_decay=float(data["tr/wd"]), sgd_momentum=float(data["tr/mu"])
    )


def vit_case(data: Data, **options: Any) -> tuple[SimSiam, torch.optim.Optimizer]:
    """The objective and the optimizer of `vit/`."""
    hidden, out = data["vit/cfg"].tolist()[-2:]
    objective = SimSiam(
        sibling_vit(data),
        projection_dim=out,
        hidden_dim=hidden,
        predictor_hidden_dim=hidden // 2,
        **options,
    )
    load(objective, data, "vit/")
    assert np.array_equal(objective.encoder.pos_embed.numpy(), data["vit/pos"])
    named = objective.named_parameters()
    return objective, build_adamw(named, lr=0.0, weight_decay=float(data["vit/wd"]))


CASES: dict[str, Callable[..., tuple[SimSiam, torch.optim.Optimizer]]] = {
    "tr/": conv_case,
    "vit/": vit_case,
}


def rates(data: Data, prefix: str) -> tuple[list[float], float]:
    """The scheduled rate of each step, and the one that the predictor keeps."""
    if prefix == "vit/":
        own = data["vit/lr"].tolist()
        return own, own[0]
    peak, epochs = data["tr/schedule_cfg"].tolist()
    steps = [
        learning_rate(
            epoch,
            peak=peak,
            epochs=epochs,
            warmup_epochs=0,
            steps_per_epoch=1,
            schedule="cosine_per_epoch",
        )
        for epoch in data["tr/epoch"].tolist()
    ]
    assert error(torch.tensor(steps, dtype=torch.float64), data["tr/lr"][:, 0]) <= 1e-14
    assert (data["tr/lr"][:, 1] == peak).all()
    return steps, peak


def run(
    data: Data, prefix: str, world: World, dtype: torch.dtype = torch.float64, **options: Any
) -> dict[str, Any]:
    """Three steps on this rank's part of the batch: losses, rows and gradients of the first one,
    and the state after each."""
    objective, optimizer = CASES[prefix](data, **options)
    objective.to(dtype)
    split_groups(optimizer, objective.named_parameters(), objective.parameter_group)
    forward = parallelize(objective, world)
    scheduled, peak = rates(data, prefix)
    found: dict[str, Any] = {"losses": [], "states": []}
    for step in range(3):
        views = [torch.from_numpy(data[f"{prefix}{name}"][step]).to(dtype) for name in ("x1", "x2")]
        objective.zero_grad(set_to_none=True)
        output = forward(*(view.chunk(world.world_size)[world.rank] for view in views))
        output.loss.backward()
        if step == 0:
            named = objective.named_parameters()
            found["gradients"] = {n: p.grad.clone() for n, p in named if p.grad is not None}
            found["p1"], found["p2"] = output.watch["queries"]
            found["z1"], found["z2"] = output.watch["keys"]
        set_learning_rates(optimizer.param_groups, scheduled[step], peak=peak)
        optimizer.step()
        found["losses"].append(output.loss.detach())
        found["states"].append({n: t.detach().clone() for n, t in objective.state_dict().items()})
    return found


def check_trace(found: dict[str, Any], data: Data, prefix: str, gates: Gates = FLOAT64) -> None:
    """Everything that the file has of three steps."""
    same_trace(found, data, prefix, our_name, gates)


def test_loss_and_gradient_match_golden(data: Data) -> None:
    for i in range(int(data["num_cases"])):
        for dtype, gate in ((torch.float64, 1e-10), (torch.float32, 1.5e-6)):
            p1, p2, z1, z2 = (
                torch.from_numpy(data[f"c{i}_{name}"]).to(dtype)
                for name in ("p1", "p2", "z1", "z2")
            )
            predictions = torch.stack([p1, p2]).requires_grad_()
            loss = negative_cosine(predictions, torch.stack([z2, z1]))
            loss.backward()
            assert abs(loss.item() - data[f"c{i}_loss"]) <= gate
            assert predictions.grad is not None
            for ours, name in zip(predictions.grad, ("dp1", "dp2"), strict=True):
                assert error(ours, data[f"c{i}_{name}"]) <= gate, (i, name)


def test_schedules_match_golden(data: Data) -> None:
    for i in range(int(data["num_schedules"])):
        base, batch, epochs = data[f"s{i}_cfg"].tolist()
        peak = base * batch / 256
        # In all steps of an epoch, of which there are three.
        for step in range(3 * int(epochs)):
            ours = learning_rate(
                step,
                peak=peak,
                epochs=epochs,
                warmup_epochs=0,
                steps_per_epoch=3,
                schedule="cosine_per_epoch",
            )
            groups: list[dict[str, Any]] = [{"constant_lr": False}, {"constant_lr": True}]
            set_learning_rates(groups, ours, peak=peak)
            expected = [data[f"s{i}_{name}"][step // 3] for name in ("lr", "lr_fixed")]
            assert [group["lr"] for group in groups] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("prefix", CASES)
def test_three_steps_match_golden(data: Data, prefix: str) -> None:
    check_trace(run(data, prefix, World()), data, prefix)
    check_trace(run(data, prefix, World(), torch.float32), data, prefix, FLOAT32[prefix])


def test_a_predictor_whose_rate_decays_is_far_from_golden(data: Data) -> None:
    found = run(data, "tr/", World(), fix_predictor_lr=False)
    assert error(torch.stack(found["losses"]), data["tr/loss"]) > 0.1


def test_collapse_is_seen_in_the_deviation_alone() -> None:
    torch.manual_seed(0)
    rows = torch.randn(2, 4096, 64)
    even, collapsed = feature_deviation(rows), feature_deviation(rows[:, :1].expand_as(rows))
    assert float(even) == pytest.approx(1 / 8, rel=0.01)
    assert float(collapsed) <= 1e-6
    assert float(even) == pytest.approx(float(feature_std(rows.flatten(0, 1))), rel=1e-3)
    assert feature_deviation(rows.bfloat16()).dtype == torch.float32

    low = normalize(rows, dim=-1).bfloat16()
    assert negative_cosine(low, low).dtype == torch.float32
    assert float(negative_cosine(low, low)) == pytest.approx(-1, abs=1e-6)


def test_recipes_carry_the_numbers_and_travel_through_json() -> None:
    resnet = get_recipe("simsiam_r50_e100_b512")
    optim = resnet.optim
    assert (optim.name, resnet.peak_lr, optim.schedule) == ("sgd", 0.1, "cosine_per_epoch")
    assert (optim.weight_decay, optim.sgd_momentum, optim.warmup_epochs) == (1e-4, 0.9, 0)
    assert (resnet.model.hidden_dim, resnet.model.projection_dim) == (2048, 2048)
    assert resnet.objective == SimSiamConfig(predictor_hidden_dim=512, fix_predictor_lr=True)
    assert resnet.data.view1 == resnet.data.view2
    assert (resnet.data.view1.crop_scale, resnet.data.view1.saturation) == ((0.2, 1.0), 0.4)
    assert EXPECTED[resnet.recipe].linear == 68.1
    names = [name for name in RECIPES if name.startswith("simsiam")]
    assert len(names) == 5
    for name in names:
        assert from_json(to_json(get_recipe(name))) == get_recipe(name)
    fields = ("fix_predictor_lr", "predictor_hidden_dim")
    allowed = [may_change(resnet, f"objective.{name}", Resume.WITH_ALLOW) for name in fields]
    assert allowed == [True, False]
    with pytest.raises(ValueError, match="predictor_hidden_dim=-1"):
        SimSiamConfig(predictor_hidden_dim=-1)
    with pytest.raises(ValueError, match="predictor_lr_scale=inf"):
        SimSiamConfig(predictor_lr_scale=float("inf"))


def test_a_config_makes_heads_and_groups() -> None:
    """On a ResNet the bias before the last norm is in the state and does not train; a ViT has
    none."""
    base = get_recipe("simsiam_digits")
    tiny = {"resnet_nano": {"patch_size": 16}, "vit_nano": {}}
    for architecture, options in tiny.items():
        own = SimSiamConfig(predictor_hidden_dim=0 if options else 6, predictor_lr_scale=3)
        model = replace(base.model, architecture=architecture, **options)  # type: ignore[arg-type]
        objective = build_objective(replace(base, model=model, objective=own), torch.device("cpu"))
        assert isinstance(objective, SimSiam)
        head = objective.encoder.head
        assert [type(layer) for layer in head].count(nn.Linear) == 3
        assert head[-1].weight is None
        assert (head[6].bias is not None) == bool(options)
        assert all(head[i].bias is None for i in (0, 3))
        assert objective.predictor[0].out_features == (
            base.model.projection_dim // 4 if options else 6
        )
        assert (objective.predictor[-1].out_features, objective.predictor[-1].bias is None) == (
            base.model.projection_dim,
            False,
        )
        groups = {
            name.split(".")[0]: objective.parameter_group(name, parameter)
            for name, parameter in objective.named_parameters()
        }
        own_group = ParameterGroup(lr_scale=3, constant_lr=True)
        assert groups == {"encoder": WHOLE, "predictor": own_group}
        if options:
            bias = head[6].bias
            assert not bias.requires_grad
            assert bias.abs().max() > 0
            assert "encoder.head.6.bias" in objective.state_dict()


def test_the_command_line_trains(digits: tuple[str, str], tmp_path: Path) -> None:
    words = ["train", "simsiam_digits", "--out", str(tmp_path / "run"), "--epochs", "2"]
    words += ["--data.shards", digits[0], "--objective.predictor-hidden-dim", "12"]
    words += ["--threads", "1", "--knn.every-epochs", "0"]
    assert main(words) == 0
    objective, config, _ = load_run(tmp_path / "run")
    assert isinstance(objective, SimSiam)
    assert config.objective == SimSiamConfig(predictor_hidden_dim=12)
    logged = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < logged["projection_std"] <= 1 / 8
