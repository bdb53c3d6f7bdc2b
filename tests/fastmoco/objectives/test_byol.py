"""BYOL against golden numbers: loss, schedules, three steps on a conv trunk and on a ViT.

Two ranks: tests/distributed/test_siblings_ranks.py.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastmoco.config.serial import from_json, may_change, to_json
from fastmoco.distributed import World, parallelize
from fastmoco.models.heads import FORMS, build_head
from fastmoco.objectives.build import build_objective
from fastmoco.objectives.byol import BYOL, regression_loss
from fastmoco.objectives.interface import Progress
from fastmoco.optim import build_adamw, build_lars, learning_rate
from fastmoco.optim.averaged import AveragedLARS, AveragedOptimizer, FusedAdamW
from fastmoco.recipes import EXPECTED, get_recipe
from fastmoco.recipes.byol import BYOLConfig, byol_digits, byol_vit_s16_e300_b4096
from fastmoco.training.load_run import load_run
from fastmoco_pipelines.spec import Resume
from tests.command_line import main
from tests.golden_objective import (
    FLOAT64,
    ConvTrunk,
    Gates,
    error,
    read_sibling,
    same_trace,
    sibling_vit,
)

FLOAT32 = Gates(loss=6e-6, parameter=6e-6, gradient=6e-5, adamw_noise=True)


@pytest.fixture(scope="module")
def data() -> dict[str, np.ndarray]:
    return read()


def read() -> dict[str, np.ndarray]:
    return read_sibling("byol")


def our_name(golden_name: str) -> str:
    """The file calls the momentum encoder twin, and a projector is beside its trunk where ours
    is its head."""
    side, rest = (
        ("momentum_encoder.", golden_name[5:])
        if golden_name.startswith("twin.")
        else ("", golden_name)
    )
    if rest.startswith("projector."):
        return f"{side or 'encoder.'}head.{rest[10:]}"
    return side + (rest.removeprefix("encoder.") if side else rest)


def load(objective: BYOL, data: dict[str, np.ndarray], prefix: str) -> BYOL:
    """The objective in float64 with the golden start; a predictor of the momentum encoder has no
    place in it (`add_its_predictor`)."""
    start = f"{prefix}init/"
    weights = {
        our_name(k[len(start) :]): torch.from_numpy(v)
        for k, v in data.items()
        if k.startswith(start)
    }
    weights = {
        name: tensor
        for name, tensor in weights.items()
        if not name.startswith("momentum_encoder.predictor")
    }
    missing, unexpected = objective.double().load_state_dict(weights, strict=False)
    assert unexpected == []
    buffers = ("running_mean", "running_var", "num_batches_tracked", "pos_embed")
    assert all(name.endswith(buffers) for name in missing), missing
    return objective


def conv_case(data: dict[str, np.ndarray]) -> tuple[BYOL, AveragedOptimizer]:
    """The objective and the optimizer of `tr/`."""
    _, _, width1, width2, hidden, out, predictor_hidden = data["tr/cfg"].tolist()
    objective = BYOL(partial(ConvTrunk, width1, width2), projection_dim=out, hidden_dim=hidden)
    objective.predictor = build_head(out, predictor_hidden, out, FORMS["byol"])
    load(objective, data, "tr/")
    lars = build_lars(
        objective.named_parameters(),
        lr=0.0,
        weight_decay=float(data["tr/wd"]),
        sgd_momentum=float(data["tr/mu"]),
        trust_coefficient=float(data["tr/eta"]),
    )
    return objective, AveragedLARS(lars, objective.averages() | add_its_predictor(objective, data))


def add_its_predictor(
    objective: BYOL, data: dict[str, np.ndarray]
) -> dict[nn.Parameter, nn.Parameter]:
    """The average of the predictor, which `tr/` has and nothing uses: in the state, and moved."""
    copy = build_head(
        objective.predictor[-1].out_features,
        objective.predictor[0].out_features,
        objective.predictor[-1].out_features,
        FORMS["byol"],
    ).double()
    start = "tr/init/twin.predictor."
    names = [key for key in data if key.startswith(start)]
    weights = {key[len(start) :]: torch.from_numpy(data[key]) for key in names}
    copy.load_state_dict(weights, strict=False)
    objective.momentum_encoder.predictor = copy.requires_grad_(False)
    return dict(zip(objective.predictor.parameters(), copy.parameters(), strict=True))


def vit_case(data: dict[str, np.ndarray]) -> tuple[BYOL, AveragedOptimizer]:
    """The objective and the optimizer of `vit/`."""
    hidden, out = data["vit/cfg"].tolist()[-2:]
    build = sibling_vit(data)
    objective = load(BYOL(build, projection_dim=out, hidden_dim=hidden), data, "vit/")
    assert np.array_equal(objective.encoder.pos_embed.numpy(), data["vit/pos"])
    adamw = build_adamw(objective.named_parameters(), lr=0.0, weight_decay=float(data["vit/wd"]))
    return objective, FusedAdamW(adamw, objective.averages())


CASES = {"tr/": conv_case, "vit/": vit_case}


def run(
    data: dict[str, np.ndarray], prefix: str, world: World, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """Three steps on this rank's part of the batch: losses, the first gradients, and the state
    after each step."""
    objective, optimizer = CASES[prefix](data)
    objective.to(dtype)
    forward = parallelize(objective, world)
    found: dict[str, Any] = {"losses": [], "states": []}
    for step in range(3):
        views = [torch.from_numpy(data[f"{prefix}{name}"][step]).to(dtype) for name in ("x1", "x2")]
        objective.zero_grad(set_to_none=True)
        loss = forward(*(view.chunk(world.world_size)[world.rank] for view in views)).loss
        loss.backward()
        optimizer.param_groups[0]["lr"] = float(data[f"{prefix}lr"][step])
        if step == 0:
            named = objective.named_parameters()
            found["gradients"] = {n: p.grad.clone() for n, p in named if p.grad is not None}
        optimizer.step(ema_momentum=float(data[f"{prefix}m"][step]))
        found["losses"].append(loss.detach())
        found["states"].append({n: t.detach().clone() for n, t in objective.state_dict().items()})
    return found


def check_trace(
    found: dict[str, Any], data: dict[str, np.ndarray], prefix: str, gates: Gates = FLOAT64
) -> None:
    """Everything that the file holds of three steps."""
    same_trace(found, data, prefix, our_name, gates)


def test_loss_and_gradient_match_golden(data: dict[str, np.ndarray]) -> None:
    for i in range(int(data["num_cases"])):
        p1, p2, z1, z2 = (
            torch.from_numpy(data[f"c{i}_{n}"]).double() for n in ("p1", "p2", "z1", "z2")
        )
        predictions = torch.stack([p1, p2]).requires_grad_()
        loss = regression_loss(predictions, torch.stack([z2, z1]))
        loss.backward()
        assert abs(loss.item() - data[f"c{i}_loss"]) <= 1e-12 * max(1.0, data[f"c{i}_loss"])
        for ours, name in zip(predictions.grad, ("dp1", "dp2"), strict=True):
            assert error(ours, data[f"c{i}_{name}"]) <= 1e-9, (i, name)


def test_gradient_is_the_formula_and_a_row_below_the_floor_has_a_plain_one() -> None:
    """d loss / d p = -2 / (N |p|) (u(z) - u(p) (u(p) . u(z))); where |p|^2 < 1e-12 the length is no
    variable."""
    torch.manual_seed(1)
    p, z = torch.randn(2, 1, 7, 5, dtype=torch.float64).unbind()
    p[0, 3] *= 1e-8
    p.requires_grad_()
    regression_loss(p, z).backward()
    assert p.grad is not None
    rows, target = p.detach()[0], nn.functional.normalize(z[0], dim=1)
    u = nn.functional.normalize(rows, dim=1, eps=0.0)
    cosine = (u * target).sum(1, keepdim=True)
    expected = -2 / (7 * rows.norm(dim=1, keepdim=True)) * (target - u * cosine)
    expected[3] = 2 / 7 * (rows[3] / 1e-6 - target[3]) / 1e-6
    assert (p.grad[0] - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_low_precision_is_widened() -> None:
    p, z = torch.randn(2, 2, 64, 32).bfloat16().unbind()
    loss = regression_loss(p, z)
    assert loss.dtype == torch.float32
    assert abs(loss - regression_loss(p.double(), z.double())) <= 1e-5


def test_schedules_match_golden(data: dict[str, np.ndarray]) -> None:
    for i in range(int(data["num_schedules"])):
        base, batch, warmup, total, start = data[f"s{i}_cfg"].tolist()
        objective = BYOL(
            partial(ConvTrunk, 2, 2), projection_dim=2, hidden_dim=2, ema_momentum=start
        )
        for step, lr, m in zip(
            data[f"s{i}_steps"].tolist(), data[f"s{i}_lr"], data[f"s{i}_m"], strict=True
        ):
            at = Progress(step, int(total))
            ours = learning_rate(
                step, peak=base * batch / 256, epochs=total, warmup_epochs=warmup, steps_per_epoch=1
            )
            assert abs(ours - lr) <= 1e-6 * base * batch / 256
            assert abs(objective.ema_momentum(at) - m) <= 1e-6
            assert objective.schedules(at) == {"ema_momentum": objective.ema_momentum(at)}


def test_the_trace_follows_its_schedules(data: dict[str, np.ndarray]) -> None:
    base, batch, warmup, total, start = data["tr/schedule_cfg"].tolist()
    objective = BYOL(partial(ConvTrunk, 2, 2), projection_dim=2, hidden_dim=2, ema_momentum=start)
    peak = base * batch / 256
    for step, lr, m in zip(data["tr/steps"].tolist(), data["tr/lr"], data["tr/m"], strict=True):
        ours = learning_rate(step, peak=peak, epochs=total, warmup_epochs=warmup, steps_per_epoch=1)
        assert abs(ours - lr) <= 1e-6 * peak
        assert abs(objective.ema_momentum(Progress(step, int(total))) - m) <= 1e-6


@pytest.mark.parametrize("prefix", CASES)
def test_three_steps_match_golden(data: dict[str, np.ndarray], prefix: str) -> None:
    check_trace(run(data, prefix, World()), data, prefix)
    check_trace(run(data, prefix, World(), torch.float32), data, prefix, FLOAT32)


def test_a_late_or_an_early_average_is_far_from_golden(data: dict[str, np.ndarray]) -> None:
    """The trace shows the order of optimizer and average, and the index of the momentum."""
    moved = data | {"tr/m": np.roll(data["tr/m"], 1)}
    found = run(moved, "tr/", World())
    assert error(torch.stack(found["losses"]), data["tr/loss"]) > 1e-5


def test_recipes_carry_the_numbers_and_travel_through_json() -> None:
    resnet = get_recipe("byol_r50_e1000_b4096")
    assert isinstance(resnet.objective, BYOLConfig)
    assert (resnet.optim.name, resnet.peak_lr, resnet.optim.weight_decay) == ("lars", 3.2, 1.5e-6)
    assert (resnet.objective.ema_momentum, resnet.data.view1.crop_scale) == (0.996, (0.08, 1.0))
    base = get_recipe("byol_vit_b16_e300_b4096")
    assert (base.model.architecture, base.optim.lr) == ("vit_base", 1e-4)
    expected = [EXPECTED[f"byol_{name}_b4096"].linear for name in ("vit_s16_e300", "vit_b16_e300")]
    assert (expected, EXPECTED[resnet.recipe].linear) == ([71.0, 73.9], 74.3)
    config = byol_vit_s16_e300_b4096()
    assert (config.optim.lr, config.optim.weight_decay, config.optim.warmup_epochs) == (
        1e-4,
        0.03,
        40,
    )
    assert to_json(config)["objective"] == {
        "kind": "byol",
        "ema_momentum": 0.99,
        "ema_schedule": "cosine",
        "last_norm": True,
    }
    assert from_json(to_json(config)) == config
    bare = build_objective(
        replace(byol_digits(), objective=BYOLConfig(last_norm=False)), torch.device("cpu")
    )
    assert isinstance(bare, BYOL)
    assert [type(head[-1]) for head in (bare.encoder.head, bare.predictor)] == [
        nn.Linear,
        nn.Linear,
    ]
    allowed = [
        may_change(config, f"objective.{name}", Resume.WITH_ALLOW)
        for name in ("ema_momentum", "last_norm")
    ]
    assert allowed == [True, False]
    with pytest.raises(ValueError, match=r"ema_momentum=1.5"):
        BYOLConfig(ema_momentum=1.5)


def test_the_command_line_trains_evaluates_and_narrows_to_the_numbers_of_byol(
    digits: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "byol_digits", "--out", str(tmp_path / "run"), "--data.shards", digits[0]]
    words += [
        "--objective.ema-momentum",
        "0.5",
        "--epochs",
        "2",
        "--threads",
        "1",
        "--knn.every-epochs",
        "0",
    ]
    assert main(words) == 0
    objective, config, _ = load_run(tmp_path / "run")
    assert isinstance(objective, BYOL)
    assert config.objective == BYOLConfig(ema_momentum=0.5)
    capsys.readouterr()
    words = ["--train", digits[0], "--test", digits[1], "--json"]
    assert main(["eval", "knn", str(tmp_path / "run"), *words]) == 0
    assert 0 < json.loads(capsys.readouterr().out.splitlines()[-1])["knn"] <= 1
    assert (
        main(
            [
                "train",
                "byol_digits",
                "--out",
                str(tmp_path / "no"),
                "--objective.temperature",
                "0.2",
            ]
        )
        == 2
    )
