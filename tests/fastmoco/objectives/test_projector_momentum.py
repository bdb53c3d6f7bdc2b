"""MoCo v3 with an average of the projector alone, against its golden trace; FLOPs of a step.

Two ranks: tests/distributed/test_siblings_ranks.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fastmoco.config.serial import from_json, to_json
from fastmoco.distributed import World, parallelize
from fastmoco.objectives.build import build_objective
from fastmoco.objectives.interface import Progress
from fastmoco.objectives.moco_v3 import MoCoV3
from fastmoco.objectives.projector_momentum import ProjectorMomentum
from fastmoco.optim import build_adamw
from fastmoco.optim.averaged import FusedAdamW
from fastmoco.planning.costs import measure_costs
from fastmoco.recipes import RECIPES, get_recipe
from fastmoco.recipes.projector_momentum import ProjectorMomentumConfig
from tests.golden_objective import (
    FLOAT64,
    Data,
    Gates,
    error,
    read_sibling,
    same_trace,
    sibling_vit,
)

FLOAT32 = Gates(loss=2.1e-5, parameter=9e-5, gradient=6e-5, adamw_noise=True)


@pytest.fixture(scope="module")
def data() -> Data:
    return read()


def read() -> Data:
    """The arrays with the prefix that the ViT of other files has."""
    return {f"vit/{name}": array for name, array in read_sibling("projector_momentum").items()}


def our_name(golden_name: str) -> str:
    """The file calls the average of the projector twin."""
    return golden_name.replace("twin.", "momentum_projector.")


def golden_objective(data: Data) -> ProjectorMomentum:
    """The objective in float64 with the golden start."""
    hidden, out = data["vit/cfg"].tolist()[-2:]
    objective = ProjectorMomentum(
        sibling_vit(data),
        projection_dim=out,
        hidden_dim=hidden,
        temperature=float(data["vit/T"]),
    ).double()
    start = "vit/init/"
    names = [key for key in data if key.startswith(start)]
    weights = {our_name(key[len(start) :]): torch.from_numpy(data[key]) for key in names}
    missing, unexpected = objective.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["encoder.pos_embed"], [])
    assert np.array_equal(objective.encoder.pos_embed.numpy(), data["vit/pos"])
    return objective


def run(
    data: Data, world: World, dtype: torch.dtype = torch.float64, *, ring: bool = False
) -> dict[str, Any]:
    """Three steps on this rank's part of the batch: losses, the first gradients, and the state
    after each step. The average moves before a forward."""
    objective = golden_objective(data).to(dtype)
    objective.ring = ring
    adamw = build_adamw(objective.named_parameters(), lr=0.0, weight_decay=float(data["vit/wd"]))
    optimizer = FusedAdamW(adamw, objective.averages())
    forward = parallelize(objective, world)
    found: dict[str, Any] = {"losses": [], "states": []}
    for step in range(3):
        optimizer.move_averages(float(data["vit/m"][step]))
        views = [torch.from_numpy(data[f"vit/{name}"][step]).to(dtype) for name in ("x1", "x2")]
        objective.zero_grad(set_to_none=True)
        loss = forward(*(view.chunk(world.world_size)[world.rank] for view in views)).loss
        loss.backward()
        if step == 0:
            named = objective.named_parameters()
            found["gradients"] = {n: p.grad.clone() for n, p in named if p.grad is not None}
        optimizer.param_groups[0]["lr"] = float(data["vit/lr"][step])
        optimizer.step()
        found["losses"].append(loss.detach())
        found["states"].append({n: t.detach().clone() for n, t in objective.state_dict().items()})
    return found


def check_trace(found: dict[str, Any], data: Data, gates: Gates = FLOAT64) -> None:
    """Everything that the file has of three steps, buffers included."""
    same_trace(found, data, "vit/", our_name, gates)


def test_three_steps_match_golden(data: Data) -> None:
    check_trace(run(data, World()), data)
    check_trace(run(data, World(), torch.float32), data, FLOAT32)


def test_an_average_that_moves_late_is_far_from_golden(data: Data) -> None:
    found = run(data | {"vit/m": np.roll(data["vit/m"], 1)}, World())
    assert error(torch.stack(found["losses"]), data["vit/loss"]) > 1e-5


def test_the_projector_alone_is_averaged_and_has_its_own_statistics(data: Data) -> None:
    objective = golden_objective(data)
    names = dict(objective.named_parameters())
    averages = objective.averages()
    assert len(averages) == len(list(objective.encoder.head.parameters()))
    for own, average in averages.items():
        (name,) = [n for n, p in names.items() if p is own]
        assert average is names[name.replace("encoder.head.", "momentum_projector.")]
        assert not average.requires_grad

    # A fresh one is a copy of the projector; the momentum is that of MoCo v3.
    fresh = ProjectorMomentum(sibling_vit(data), projection_dim=6, hidden_dim=8)
    assert all(torch.equal(own, average) for own, average in fresh.averages().items())
    moco = MoCoV3(sibling_vit(data), projection_dim=6, hidden_dim=8)
    for at in (Progress(0, 12, 4), Progress(7, 12, 4), Progress(11, 12, 4)):
        assert fresh.ema_momentum(at) == moco.ema_momentum(at)
        assert fresh.schedules(at) == moco.schedules(at)
    assert fresh.ema_momentum(Progress(11, 12, 4)) is None

    # Keys are constants: the trunk has its gradient through the queries alone.
    views = torch.randn(2, 6, 3, 8, 8)
    before = {n: b.clone() for n, b in fresh.named_buffers() if "running" in n}
    fresh(*views).loss.backward()
    assert all(p.grad is None for p in fresh.momentum_projector.parameters())
    moved = {n for n, b in fresh.named_buffers() if n in before and not torch.equal(b, before[n])}
    assert moved == before.keys()


def test_a_step_takes_6_units_of_a_forward_where_moco_v3_takes_8() -> None:
    """A unit is the forward of one view through the trunk; a backward takes two. The second trunk
    is in neither the FLOPs, nor the memory, nor the state."""
    config = get_recipe("projector_momentum_digits")
    config = replace(config, model=replace(config.model, freeze_patch_embed=False, hidden_dim=32))
    moco = replace(config, objective=get_recipe("quickstart_digits").objective)
    ours, theirs = (measure_costs(one, "fp32") for one in (config, moco))
    assert ours.query_flops == theirs.query_flops
    assert theirs.step_flops - ours.step_flops == pytest.approx(ours.query_flops, rel=0.01)
    assert ours.step_flops / theirs.step_flops == pytest.approx(6 / 8, abs=0.02)
    assert not ours.averaged
    assert theirs.averaged
    trunk = theirs.parameters - ours.parameters
    objective = build_objective(config, torch.device("cpu"))
    head = sum(p.numel() for p in objective.encoder.head.parameters())
    assert trunk == sum(p.numel() for p in objective.encoder.parameters()) - head


def test_recipes_and_config() -> None:
    names = [name for name in RECIPES if name.startswith("projector_momentum")]
    assert len(names) == 4
    for name in names:
        config = get_recipe(name)
        assert from_json(to_json(config)) == config
    config = get_recipe("projector_momentum_vit_s16_e300_b4096")
    assert config.optim == get_recipe("vit_s16_e300_b4096").optim
    assert config.objective == ProjectorMomentumConfig(temperature=0.2, ema_momentum=0.99)
    for change in ({"temperature": 0.0}, {"ema_momentum": 1.5}, {"keys": "all"}):
        ((name, value),) = change.items()
        with pytest.raises(ValueError, match=f"{name}={value!r}"):
            ProjectorMomentumConfig(**change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="temperature=0"):
        ProjectorMomentum(lambda: None, temperature=0)
