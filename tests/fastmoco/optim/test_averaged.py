"""One signature for every optimizer: weights and averages move together, and a skipped step is
decided on by the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from fastmoco.objectives.build import build_model
from fastmoco.optim import (
    averaged,
    build_adamw,
    build_adamw_ema,
    build_larc,
    build_lars,
    build_sgd,
)
from fastmoco.optim.averaged import (
    AveragedLARS,
    AveragedOptimizer,
    AveragedSGD,
    FusedAdamW,
    HostSkipped,
    SweptAdamW,
)
from fastmoco.optim.build import build_optimizer
from fastmoco.recipes import quickstart_digits

Build = Callable[[nn.Module, dict[nn.Parameter, Tensor]], AveragedOptimizer]

BUILDS: dict[str, Build] = {
    "torch": lambda m, a: FusedAdamW(
        build_adamw(m.named_parameters(), lr=0.1, weight_decay=0.1), a
    ),
    "sweep": lambda m, a: SweptAdamW(
        build_adamw_ema(m.named_parameters(), a, lr=0.1, weight_decay=0.1), a
    ),
    "lars": lambda m, a: AveragedLARS(
        build_lars(m.named_parameters(), lr=0.1, weight_decay=0.1), a
    ),
    "sgd": lambda m, a: AveragedSGD(build_sgd(m.named_parameters(), lr=0.1, weight_decay=0.1), a),
    "larc": lambda m, a: AveragedSGD(
        build_larc(
            m.named_parameters(), lr=0.1, weight_decay=0.1, sgd_momentum=0.5, trust_coefficient=0.5
        ),
        a,
    ),
    "other": lambda m, a: HostSkipped(
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1), a
    ),
}
every_optimizer = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)


def model() -> tuple[nn.Sequential, dict[nn.Parameter, Tensor]]:
    """Gradients on two layers but one bias; a frozen layer that its averages equal; averages of
    those three only."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(2, 2))
    layers[1].requires_grad_(False)
    layers(torch.randn(6, 3)).square().mean().backward()
    layers[2].bias.grad = None
    averages = {p: p.detach().clone() for layer in layers[:3] for p in layer.parameters()}
    for parameter, average in averages.items():
        if parameter.requires_grad:
            average.add_(1.0)
    return layers, averages


@every_optimizer
@pytest.mark.parametrize("skip", [None, torch.zeros(())], ids=["unasked", "not skipped"])
def test_averages_move_towards_the_weights_of_after_the_step(
    build: Build, skip: Tensor | None
) -> None:
    layers, averages = model()
    before = {p: average.clone() for p, average in averages.items()}
    weights = {p: p.detach().clone() for p in layers.parameters()}
    build(layers, averages).step(ema_momentum=0.75, skip=skip)
    moved = {p for p in weights if not torch.equal(p, weights[p])}
    assert moved == {p for p in layers.parameters() if p.grad is not None}
    for parameter, average in averages.items():
        expected = before[parameter] + 0.25 * (parameter.detach() - before[parameter])
        torch.testing.assert_close(average, expected, rtol=0, atol=1e-7)


@every_optimizer
def test_without_a_momentum_averages_stay(build: Build) -> None:
    layers, averages = model()
    before = {p: average.clone() for p, average in averages.items()}
    build(layers, averages).step()
    assert all(torch.equal(before[p], average) for p, average in averages.items())


@every_optimizer
def test_a_skipped_step_changes_nothing(build: Build) -> None:
    layers, averages = model()
    optimizer = build(layers, averages)
    optimizer.step(ema_momentum=0.5, skip=torch.zeros(()))

    def everything() -> list[Tensor]:
        state = [
            tensor
            for entries in optimizer.inner.state.values()
            for tensor in entries.values()
            if tensor is not None
        ]
        return [
            tensor.detach().clone() for tensor in (*layers.parameters(), *averages.values(), *state)
        ]

    before = everything()
    optimizer.step(ema_momentum=0.5, skip=torch.ones(()))
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))


@every_optimizer
def test_frozen_parameters_that_equal_their_averages_are_not_touched(
    build: Build, monkeypatch: Any
) -> None:
    """Their comparison reads the device: it runs again only after something has written one of
    them."""
    layers, averages = model()
    optimizer = build(layers, averages)
    compared: list[Tensor] = []
    equal = torch.equal
    monkeypatch.setattr(averaged.torch, "equal", lambda a, b: compared.append(b) or equal(a, b))
    versions = [averages[p]._version for p in layers[1].parameters()]
    for _ in range(3):
        optimizer.step(ema_momentum=0.5)
    assert [averages[p]._version for p in layers[1].parameters()] == versions
    assert len(compared) == 2
    with torch.no_grad():
        layers[1].bias.add_(1.0)
    optimizer.step(ema_momentum=0.5)
    torch.testing.assert_close(averages[layers[1].bias], layers[1].bias.detach() - 0.5)
    assert averages[layers[1].weight]._version == versions[0]


@every_optimizer
def test_averages_can_move_alone(build: Build) -> None:
    layers, averages = model()
    weights = [p.detach().clone() for p in layers.parameters()]
    build(layers, averages).move_averages(0.0)
    assert all(torch.equal(a, b) for a, b in zip(layers.parameters(), weights, strict=True))
    assert all(torch.equal(average, p) for p, average in averages.items())


@pytest.mark.parametrize(
    "optim", [{"fused_backend": "torch"}, {"name": "lars"}, {"name": "larc"}, {"name": "sgd"}]
)
def test_the_host_does_not_wait_for_the_flag(optim: dict[str, str]) -> None:
    """Fake tensors have no numbers: asking for one on the host fails. (Plans of the sweep bypass
    them: test_step_guard.py.)"""
    config = replace(quickstart_digits(), precision="fp32")
    config = replace(config, optim=replace(config.optim, **optim))  # type: ignore[arg-type]
    with FakeTensorMode():
        objective = build_model(config)
        trainable = {p: average for p, average in objective.averages().items() if p.requires_grad}
        optimizer = build_optimizer(config, objective.named_parameters(), trainable)
        for parameter in objective.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        optimizer.step(ema_momentum=0.5, skip=torch.zeros(()))
        waits = HostSkipped(torch.optim.AdamW(objective.parameters(), foreach=True), trainable)
        with pytest.raises(DataDependentOutputException):
            waits.step(skip=torch.zeros(()))
