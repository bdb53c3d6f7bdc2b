"""MoBY against golden numbers: four steps on a small Swin, with queues, clipping and schedule."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastmoco.config.serial import from_json, may_change, to_json
from fastmoco.distributed import BatchNorm
from fastmoco.models.encoder import Coupling
from fastmoco.models.swin import SwinTransformer
from fastmoco.objectives.build import build_objective
from fastmoco.objectives.interface import Objective, Progress
from fastmoco.objectives.moby import MoBY
from fastmoco.optim import build_adamw, learning_rate
from fastmoco.optim.averaged import FusedAdamW
from fastmoco.optim.clipping import clip_together_
from fastmoco.optim.groups import set_learning_rates, split_groups
from fastmoco.recipes import EXPECTED, get_recipe
from fastmoco.recipes.moby import MoBYConfig
from fastmoco_kernels.tensors import norms_of
from fastmoco_pipelines.spec import Resume, moco_v3_views
from tests.fastmoco.objectives.test_conformance import config_of, rough, views_of
from tests.golden_objective import Data, read_sibling_b

CPU = torch.device("cpu")
LAYERS = {"linear_hidden.1": "0", "linear_hidden.2": "1", "linear_out": "3"}
NOISE = (
    "qkv.bias",
    "encoder.norm.bias",
    "encoder_k.norm.bias",
    "linear_hidden.1.bias",
    "projector.linear_hidden.2.bias",
    "projector_k.linear_hidden.2.bias",
    "projector.linear_out.bias",
    "projector_k.linear_out.bias",
)
"""Biases without a true gradient, in parts at least: AdamW makes steps of its rounding."""


@pytest.fixture(scope="module")
def data() -> Data:
    return read_sibling_b("moby")


def our_name(golden_name: str) -> str:
    side, _, rest = golden_name.partition(".")
    network = {"encoder_k": "momentum_encoder", "projector": "encoder.head"}.get(side, side)
    if side == "projector_k":
        network = "momentum_encoder.head"
    for theirs, ours in LAYERS.items():
        rest = rest.replace(theirs, ours)
    return f"{network}.{rest}"


def require_close(ours: Tensor, expected: np.ndarray, name: str) -> None:
    """The tolerance of float32 storage or of float64, relative to the largest number; of true zeros
    and of what AdamW makes of them an absolute one."""
    most = float(np.abs(expected).max())
    tolerance = most * (1.1e-7 if expected.dtype == np.float32 else 1e-9)
    if name.startswith("final/") and name.endswith(NOISE):
        tolerance = max(tolerance, 1e-8)
    elif most < 1e-6:
        tolerance = 1e-9
    gap = (ours.detach().double() - torch.from_numpy(expected).double()).abs().max()
    assert gap <= tolerance, name


def golden_objective(data: Data) -> MoBY:
    """The objective of the file, at its start; what the twin does not have is the encoder's."""
    size, patch, width, window, hidden, dim = data["cfg"].tolist()
    build = partial(
        SwinTransformer,
        image_size=size,
        patch_size=patch,
        width=width,
        depths=tuple(data["depths"].tolist()),
        heads=tuple(data["heads"].tolist()),
        window=window,
    )
    objective = MoBY(
        build,
        projection_dim=dim,
        hidden_dim=hidden,
        temperature=float(data["T"]),
        ema_momentum=float(data["m0"]),
        queue=int(data["queue_size"]),
    ).double()
    own = {
        our_name(name[5:]): torch.from_numpy(value)
        for name, value in data.items()
        if name.startswith("init/") and "queue" not in name
    }
    twin = {f"momentum_{name}": value for name, value in own.items() if name.startswith("encoder.")}
    queues = np.stack([data["init/queue1"].T, data["init/queue2"].T])
    weights = {**twin, **own, "queue": torch.from_numpy(queues)}
    missing, unexpected = objective.load_state_dict(weights, strict=False)
    assert (sorted(missing), unexpected) == (["queue_keys", "queue_ptr"], [])
    return objective


def scheduled(data: Data, step: int) -> float:
    """The learning rate of a step of the file."""
    return learning_rate(
        step,
        peak=float(data["lr_peak"]),
        epochs=int(data["epochs"]),
        warmup_epochs=int(data["warmup_epochs"]),
        steps_per_epoch=int(data["iters_per_epoch"]),
        schedule="cosine_unshifted",
        warmup_lr=float(data["lr_start"]),
        final_lr=float(data["lr_min"]),
    )


def test_four_steps_match_golden(data: Data) -> None:
    objective = golden_objective(data)
    named = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    assert set(named) == {our_name(name) for name in data["trainable"].tolist()}
    decays = {n: objective.parameter_group(n, p).weight_decay_scale for n, p in named.items()}
    plain = {our_name(name) for name in data["no_decay"].tolist()}
    assert decays == {name: 0.0 if name in plain else 1.0 for name in named}
    adamw = build_adamw(
        objective.named_parameters(), lr=0.0, weight_decay=float(data["weight_decay"])
    )
    split_groups(adamw, objective.named_parameters(), objective.parameter_group)
    optimizer = FusedAdamW(adamw, objective.averages())

    # The encoders of the file start apart, so the first step averages too. In a run they are equal.
    steps, total = len(data["loss"]), int(data["ema_total"])
    objective.update_momentum_encoder(float(data["m"][0]))
    for step in range(steps):
        at = Progress(step, total, int(data["iters_per_epoch"]))
        views = [torch.from_numpy(data[name][step]).double() for name in ("x1", "x2")]
        objective.zero_grad(set_to_none=True)
        objective.before_step(at)
        output = objective(*views, at=at)
        output.loss.backward()
        require_close(output.loss, data["loss"][step : step + 1], f"loss {step}")
        assert objective.schedules(at)["ema_momentum"] == pytest.approx(data["m"][step], rel=1e-12)
        gradients = [p.grad for p in named.values() if p.grad is not None]
        norm = torch.linalg.vector_norm(norms_of(gradients))
        require_close(norm, data["grad_norm"][step : step + 1], f"norm {step}")
        if step == 0:
            for name, rows in zip(
                ("q1", "q2", "k1", "k2"),
                [*output.watch["queries"], *output.watch["keys"]],
                strict=True,
            ):
                require_close(rows, data[f"step0/{name}"], name)
            require_gradients(objective, data)
            require_state(objective, data, "step0/param/", side="momentum_encoder")
        clip_together_(gradients, norm, float(data["clip"]))
        rate = scheduled(data, step)
        assert rate == pytest.approx(data["lr"][step], rel=1e-12)
        set_learning_rates(optimizer.param_groups, rate, peak=float(data["lr_peak"]))
        last = step + 1 == steps  # the file ends before the momentum update of its next step
        optimizer.step(ema_momentum=None if last else objective.ema_momentum(at))
        objective.after_step(torch.zeros(()), at)
        if step == 0:
            require_state(objective, data, "step0/param/", side="encoder")
            require_state(objective, data, "step0/param/", side="predictor")
        for number, queue in enumerate(objective.queue, start=1):
            require_close(queue.T, data[f"queue{number}/{step}"], f"queue{number}/{step}")
        assert objective.queue_ptr.item() == data["queue_ptr"][step]
    assert objective.queue_keys.item() == int(data["queue_size"])
    for start, count in (("final/param/", 114), ("final/buf/", 9)):
        assert require_state(objective, data, start) == count


def require_gradients(objective: Objective, data: Data) -> None:
    """All gradients of the first step, before they are clipped."""
    start = "step0/grad/"
    found = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    assert len(found) == sum(name.startswith(start) for name in data)
    for name in (name for name in data if name.startswith(start)):
        require_close(found[our_name(name[len(start) :])], data[name], name)


def require_state(objective: Objective, data: Data, start: str, *, side: str = "") -> int:
    """How many tensors of a part of the file, or of one network of it, have been compared."""
    state, compared = objective.state_dict(), 0
    for name in (name for name in data if name.startswith(start)):
        ours = our_name(name[len(start) :])
        if not side or ours.startswith(f"{side}."):
            require_close(state[ours], data[name], name)
            compared += 1
    assert compared
    return compared


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
    swin = get_recipe("moby_swin_t4_e300_b512")
    assert (swin.model.architecture, swin.model.window, swin.model.drop_path) == (
        "swin_tiny",
        7,
        0.2,
    )
    assert (swin.objective, swin.optim, swin.data) == (own, optim, config.data)
    assert [EXPECTED[each.recipe].linear for each in (config, swin)] == [72.8, 75.3]
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
