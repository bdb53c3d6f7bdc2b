"""Two groups of parameters in each optimizer, against a loop over tensors in plain torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmoco.checkpoint import flatten_optimizer, restore_optimizer
from fastmoco.config import Config, OptimConfig
from fastmoco.optim.averaged import AveragedOptimizer
from fastmoco.optim.build import build_optimizer
from fastmoco.optim.groups import ParameterGroup, set_learning_rates, whole_group
from fastmoco.recipes import quickstart_digits

OPTIMS = {
    "torch": OptimConfig(fused_backend="torch", weight_decay=0.3, betas=(0.8, 0.95), eps=1e-6),
    "sweep": OptimConfig(fused_backend="fastmoco", weight_decay=0.3, betas=(0.8, 0.95), eps=1e-6),
    "lars": OptimConfig(name="lars", weight_decay=0.3, sgd_momentum=0.7, trust_coefficient=0.5),
    "larc": OptimConfig(name="larc", weight_decay=0.3, sgd_momentum=0.7, trust_coefficient=0.5),
    "sgd": OptimConfig(name="sgd", weight_decay=0.3, sgd_momentum=0.7),
}
every_optimizer = pytest.mark.parametrize("optim", OPTIMS.values(), ids=OPTIMS)

PEAK, SCHEDULE, EMA = 0.08, (0.02, 0.05, 0.03), 0.75
OWN = ParameterGroup(lr_scale=0.5, constant_lr=True, weight_decay_scale=0.25)
NAMES = [["0.weight", "0.bias", "3.weight", "3.bias"], ["2.weight", "2.bias"]]


def group_of(name: str, parameter: nn.Parameter) -> ParameterGroup:
    assert parameter.requires_grad, f"{name} is frozen, so it is in no group"
    return OWN if name.startswith("2.") else ParameterGroup()


def config_of(optim: OptimConfig) -> Config:
    return replace(quickstart_digits(), optim=optim)


def model() -> nn.Sequential:
    """Layer 1 is frozen, layer 2 in a group of its own."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 2))
    layers[1].requires_grad_(False)
    return layers.double()


def averages_of(layers: nn.Module) -> dict[nn.Parameter, Tensor]:
    """An average in each group, and parameters without one."""
    named = dict(layers.named_parameters())
    return {named[name]: named[name].detach() + 1.0 for name in ("0.weight", "2.weight")}


def gradients(layers: nn.Module, step: int) -> None:
    """The second group has none in the first step."""
    layers.zero_grad()
    noise = torch.Generator().manual_seed(step)
    layers(torch.randn(6, 3, generator=noise, dtype=torch.float64)).square().mean().backward()
    if step == 0:
        for parameter in layers[2].parameters():  # type: ignore[index, union-attr]
            parameter.grad = None


def run(layers: nn.Module, optimizer: AveragedOptimizer, steps: range) -> None:
    for step in steps:
        gradients(layers, step)
        set_learning_rates(optimizer.param_groups, SCHEDULE[step], peak=PEAK)
        optimizer.step(ema_momentum=EMA, skip=torch.zeros(()))


def adamw(
    p: Tensor, g: Tensor, own: dict[str, Any], optim: OptimConfig, lr: float, decay: float
) -> None:
    (b1, b2), t = optim.betas, own.get("step", 0) + 1
    m = b1 * own.get("exp_avg", 0.0) + (1 - b1) * g
    v = b2 * own.get("exp_avg_sq", 0.0) + (1 - b2) * g * g
    own.update(step=t, exp_avg=m, exp_avg_sq=v)
    p.mul_(1 - lr * decay).sub_(lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + optim.eps))


def lars(
    p: Tensor, g: Tensor, own: dict[str, Any], optim: OptimConfig, lr: float, decay: float
) -> None:
    if p.ndim > 1:
        g = g + decay * p
        g = optim.trust_coefficient * p.norm() / g.norm() * g
    own["momentum_buffer"] = optim.sgd_momentum * own.get("momentum_buffer", 0.0) + g
    p.sub_(lr * own["momentum_buffer"])


def larc(
    p: Tensor, g: Tensor, own: dict[str, Any], optim: OptimConfig, lr: float, decay: float
) -> None:
    denominator = g.norm() + decay * p.norm() + 1e-8
    g = (g + decay * p) * (optim.trust_coefficient * p.norm() / denominator)
    own["momentum_buffer"] = optim.sgd_momentum * own.get("momentum_buffer", 0.0) + g
    p.sub_(lr * own["momentum_buffer"])


def sgd(
    p: Tensor, g: Tensor, own: dict[str, Any], optim: OptimConfig, lr: float, decay: float
) -> None:
    own["momentum_buffer"] = optim.sgd_momentum * own.get("momentum_buffer", 0.0) + g + decay * p
    p.sub_(lr * own["momentum_buffer"])


STEPS = {"adamw": adamw, "lars": lars, "larc": larc, "sgd": sgd}
"""Steps of one tensor by the optimizer's name."""


def plain_loop(optim: OptimConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and averages after three steps; every number of a group is written out."""
    layers, state = model(), {name: {} for names in NAMES for name in names}
    named = dict(layers.named_parameters())
    averages = averages_of(layers)
    for step, scheduled in enumerate(SCHEDULE):
        gradients(layers, step)
        for name, own in state.items():
            p, second = named[name], name.startswith("2.")
            lr, decay = (0.5 * PEAK, 0.25 * 0.3) if second else (scheduled, 0.3)
            with torch.no_grad():
                if p.grad is not None:
                    STEPS[optim.name](p, p.grad, own, optim, lr, decay)
                if p in averages:
                    averages[p].mul_(EMA).add_((1 - EMA) * p)
    return {n: p.detach() for n, p in named.items()}, {
        n: averages[p] for n, p in named.items() if p in averages
    }


def assert_near(ours: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert ours.keys() == other.keys()
    for name, tensor in ours.items():
        assert (tensor - other[name]).abs().max() <= 1e-14, name


@every_optimizer
def test_three_steps_equal_a_plain_loop(optim: OptimConfig) -> None:
    layers = model()
    averages = averages_of(layers)
    optimizer = build_optimizer(config_of(optim), layers.named_parameters(), averages, group_of)
    run(layers, optimizer, range(3))
    weights, moved = plain_loop(optim)
    assert_near({n: p.detach() for n, p in layers.named_parameters()}, weights)
    assert_near({n: averages[p] for n, p in layers.named_parameters() if p in averages}, moved)

    # The plain loop with one group ends elsewhere, so the comparison sees the groups.
    one = model()
    run(one, build_optimizer(config_of(optim), one.named_parameters(), {}), range(3))
    assert (one[2].weight - layers[2].weight).abs().max() > 1e-4


@every_optimizer
def test_a_resumed_run_ends_in_the_same_bits(optim: OptimConfig) -> None:
    def build(layers: nn.Module, averages: dict[nn.Parameter, Tensor]) -> AveragedOptimizer:
        return build_optimizer(config_of(optim), layers.named_parameters(), averages, group_of)

    whole, cut = model(), model()
    kept, stopped = averages_of(whole), averages_of(cut)
    run(whole, build(whole, kept), range(3))

    first = build(cut, stopped)
    run(cut, first, range(2))
    saved = {
        n: t.clone() for n, t in flatten_optimizer(first.inner, cut.named_parameters()).items()
    }
    second = build(cut, stopped)
    restore_optimizer(second.inner, cut.named_parameters(), saved)
    run(cut, second, range(2, 3))
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(kept.values(), stopped.values(), strict=True))

    # Checkpoints have the state by the names of parameters, whatever the groups.
    one = model()
    optimizer = build_optimizer(config_of(optim), one.named_parameters(), {})
    run(one, optimizer, range(2))
    assert flatten_optimizer(optimizer.inner, one.named_parameters()).keys() == saved.keys()


@every_optimizer
def test_a_skipped_step_leaves_both_groups(optim: OptimConfig) -> None:
    layers = model()
    optimizer = build_optimizer(
        config_of(optim), layers.named_parameters(), averages_of(layers), group_of
    )
    run(layers, optimizer, range(2))

    def everything() -> dict[str, Tensor]:
        state = flatten_optimizer(optimizer.inner, layers.named_parameters())
        return {n: t.detach().clone() for n, t in (*layers.named_parameters(), *state.items())}

    before = everything()
    optimizer.step(ema_momentum=EMA, skip=torch.ones(()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in everything().items())


@every_optimizer
def test_groups_are_in_the_order_of_their_first_parameters(optim: OptimConfig) -> None:
    layers = model()
    optimizer = build_optimizer(config_of(optim), layers.named_parameters(), {}, group_of)
    assert [group["param_names"] for group in optimizer.param_groups] == NAMES
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.3 * 0.25]
    keys = {"lr", "weight_decay", "weight_decay_scale", "lr_scale", "constant_lr"}
    first, second = (
        {k: v for k, v in group.items() if k not in keys} for group in optimizer.param_groups
    )
    assert {**first, "params": 0, "param_names": 0} == {**second, "params": 0, "param_names": 0}


@every_optimizer
def test_one_group_is_as_torch_makes_it(optim: OptimConfig) -> None:
    layers = model()
    (default,) = build_optimizer(config_of(optim), layers.named_parameters(), {}).param_groups
    (asked,) = build_optimizer(
        config_of(optim), layers.named_parameters(), {}, whole_group
    ).param_groups
    assert (
        default["param_names"]
        == asked["param_names"]
        == sorted(NAMES[0] + NAMES[1], key=lambda name: name[0])
    )
    assert default.keys() == asked.keys()
    assert not {"weight_decay_scale", "lr_scale", "constant_lr"} & default.keys()


def test_one_group_of_other_numbers() -> None:
    layers = model()
    config = config_of(OPTIMS["torch"])
    optimizer = build_optimizer(config, layers.named_parameters(), {}, lambda name, parameter: OWN)
    (group,) = optimizer.param_groups
    set_learning_rates(optimizer.param_groups, 0.0, peak=0.4)
    assert (group["lr"], group["weight_decay"]) == (0.2, 0.3 * 0.25)


def test_learning_rates_of_a_step() -> None:
    groups: list[dict[str, Any]] = [
        {},
        {"lr_scale": 0.5, "constant_lr": False},
        {"lr_scale": 2.0, "constant_lr": True},
    ]
    set_learning_rates(groups, 0.3, peak=0.7)
    assert [group["lr"] for group in groups] == [0.3, 0.15, 1.4]


@pytest.mark.parametrize("field", ["lr_scale", "weight_decay_scale"])
@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf])
def test_wrong_factors_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"ParameterGroup: {field}={value}"):
        ParameterGroup(**{field: value})
