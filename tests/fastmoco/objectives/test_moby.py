"""MoBY: what enters its queues, heads, and what its recipes say."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from fastmoco.config.serial import from_json, may_change, to_json
from fastmoco.distributed import BatchNorm
from fastmoco.models.encoder import Coupling
from fastmoco.objectives.build import build_objective
from fastmoco.objectives.interface import Progress
from fastmoco.objectives.moby import MoBY
from fastmoco.recipes import EXPECTED, get_recipe
from fastmoco.recipes.moby import MoBYConfig
from fastmoco_pipelines.spec import Resume, moco_v3_views
from tests.fastmoco.objectives.test_conformance import config_of, rough, views_of

CPU = torch.device("cpu")


def test_a_skipped_step_and_a_forward_without_a_step_write_nothing() -> None:
    config = config_of(MoBYConfig)
    objective = rough(replace(config, objective=MoBYConfig(queue=48)))
    assert isinstance(objective, MoBY)
    views, at = views_of(config, 16), Progress(3, 12, 4)
    before = {name: t.clone() for name, t in objective.state_dict().items() if "queue" in name}
    objective(*views)
    objective.after_step(torch.ones(()), at)
    objective(*views)
    objective.before_step(at)
    objective.after_step(None, at)
    assert all(torch.equal(objective.state_dict()[name], t) for name, t in before.items())

    # Keys of either view are in their own queue; the fill is that of the step's forward.
    output = objective(*views)
    objective.after_step(None, at)
    keys = nn.functional.normalize(output.watch["keys"], dim=-1)
    assert torch.equal(objective.queue[:, :16], keys)
    assert torch.equal(objective.queue[:, 16:], before["queue"][:, 16:])
    assert (objective.queue_ptr.item(), objective.queue_keys.item()) == (16, 16)
    assert output.watch["queue_fill"] == 0
    assert objective(*views).watch["queue_fill"] == pytest.approx(1 / 3)


def test_heads_queues_and_what_does_not_fit() -> None:
    config = config_of(MoBYConfig)
    objective = build_objective(replace(config, precision="fp32"), CPU)
    assert isinstance(objective, MoBY)
    assert objective.coupling is Coupling.HEADS
    for head in (objective.encoder.head, objective.momentum_encoder.head, objective.predictor):
        assert [type(m) for m in head] == [nn.Linear, BatchNorm, nn.ReLU, nn.Linear]
        assert head[0].bias is not None
        assert head[3].bias is not None
    again = build_objective(replace(config, precision="fp32"), CPU)
    before = objective.queue.clone()
    assert torch.equal(before, again.queue)
    assert (before.norm(dim=-1) - 1).abs().max() <= 1e-6
    assert (before[0] != before[1]).any()
    assert torch.equal(objective.bfloat16().queue, before)
    with pytest.raises(ValueError, match=r"queue=40: must be a multiple of .*=16.*take 32"):
        build_objective(replace(config, objective=MoBYConfig(queue=40)), CPU)
    for change in ({"queue": 0}, {"temperature": 0}, {"ema_momentum": 2}):
        with pytest.raises(ValueError, match=f"{next(iter(change))}="):
            MoBYConfig(**change)  # type: ignore[arg-type]


def test_recipes_carry_the_numbers_and_travel_through_json() -> None:
    config = get_recipe("moby_deit_s16_e300_b512")
    model, optim, own = config.model, config.optim, config.objective
    assert own == MoBYConfig()
    assert (own.queue, own.temperature, own.ema_momentum) == (4096, 0.2, 0.99)
    assert (model.architecture, model.positions, model.drop_path) == ("deit_small", "learned", 0.2)
    assert (model.hidden_dim, model.projection_dim, model.freeze_patch_embed) == (4096, 256, False)
    assert (config.peak_lr, optim.warmup_lr, optim.final_lr) == (1e-3, 5e-7, 5e-6)
    assert (optim.warmup_epochs, optim.weight_decay, optim.clip_norm) == (5, 0.05, 5.0)
    assert (config.data.view1, config.data.view2) == moco_v3_views()
    assert EXPECTED[config.recipe].linear == 72.8
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    allowed: dict[str, Any] = {
        name: may_change(config, f"objective.{name}", Resume.WITH_ALLOW)
        for name in ("temperature", "ema_momentum", "ema_schedule", "queue")
    }
    assert allowed == {
        "temperature": True,
        "ema_momentum": True,
        "ema_schedule": True,
        "queue": False,
    }
