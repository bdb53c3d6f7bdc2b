"""How far a step moves the weights, and how far the momentum encoder is from the encoder, against
the formulas written out.

Sharded weights are in tests/distributed/run_sharded.py.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fastmoco.config import Config, OptimConfig
from fastmoco.distributed.mesh import World
from fastmoco.objectives.build import build_objective
from fastmoco.optim.build import build_optimizer
from fastmoco.recipes import get_recipe, quickstart_digits
from fastmoco.telemetry import stability_weights
from fastmoco.telemetry.stability_weights import UpdateRatios, batch_norm_drift, ema_distance
from fastmoco.training.profiling.counting import StepCounter

RULES = {
    "sweep": OptimConfig(name="adamw", fused_backend="fastmoco", weight_decay=0.1),
    "adamw": OptimConfig(name="adamw", fused_backend="torch", weight_decay=0.1),
    "lars": OptimConfig(name="lars", weight_decay=1e-4),
    "sgd": OptimConfig(name="sgd", weight_decay=1e-4),
}


def _norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))


@pytest.mark.parametrize("name", RULES)
def test_the_ratio_is_that_of_the_update_of_every_optimizer(name: str) -> None:
    config = replace(quickstart_digits(), optim=RULES[name])
    objective = build_objective(config, torch.device("cpu"))
    optimizer = build_optimizer(
        config,
        objective.named_parameters(),
        objective.averages(),
        objective.parameter_group,
    )
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    places = objective.places()
    ratios = UpdateRatios(trained, places)
    assert ratios.finish() == {}

    torch.manual_seed(0)
    for skipped in (0.0, 0.0, 1.0):
        for parameter in trained.values():
            parameter.grad = torch.randn_like(parameter)
        before = {name: p.detach().clone() for name, p in trained.items()}
        ratios.begin()
        optimizer.step(ema_momentum=0.9, skip=torch.tensor(skipped))
        found = ratios.finish()
        assert found.keys() == {f"update_ratio/{p}" for p in ("first_block", "last_block", "heads")}
        for place in ("first_block", "last_block", "heads"):
            of = [name for name in trained if place in places.get(name, ())]
            update = _norm([trained[name].detach() - before[name] for name in of])
            expected = update / _norm([before[name] for name in of])
            ratio = found[f"update_ratio/{place}"].item()
            assert ratio == pytest.approx(expected, rel=1e-5)
            assert (ratio == 0) == bool(skipped)


def test_weights_that_are_0_have_a_ratio_only_if_they_move() -> None:
    weight = nn.Parameter(torch.zeros(3))
    ratios = UpdateRatios({"weight": weight}, {"weight": ("heads",)})
    for to, expected in ((0.0, 0.0), (1.0, math.inf), (1.5, 0.5), (math.nan, math.nan)):
        ratios.begin()
        weight.data.fill_(to)
        assert ratios.finish()["update_ratio/heads"].item() == pytest.approx(expected, nan_ok=True)


def test_the_distance_is_a_share_of_the_weights_in_parts_of_any_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randn(size, generator=rng), torch.randn(size, generator=rng))
        for size in ((3, 4), (5,), (), (2, 2, 2))
    ]
    apart = _norm([own - average for own, average in pairs]) / _norm([own for own, _ in pairs])
    for limit in (1, 50, 10**6):
        monkeypatch.setattr(stability_weights, "CHUNK_BYTES", limit)
        distance = ema_distance(pairs)
        assert distance is not None
        assert distance.item() == pytest.approx(apart, rel=1e-6)
    same = ema_distance([(own, own) for own, _ in pairs])
    assert same is not None
    assert same.item() == 0
    assert ema_distance([]) is None


def test_the_drift_is_in_standard_deviations_and_logarithms_of_widths() -> None:
    own, other = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    for norm, means, deviations in ((own, (1.0, 0.0), (2.0, 1.0)), (other, (5.0, 0.0), (2.0, 3.0))):
        norm.running_mean.copy_(torch.tensor(means))  # type: ignore[union-attr]
        norm.running_var.copy_(torch.tensor(deviations) ** 2)  # type: ignore[union-attr]
    drift = batch_norm_drift([(own, other)])
    assert drift is not None
    assert drift.item() == pytest.approx(math.sqrt((2.0**2 + math.log(3) ** 2) / 2), rel=1e-4)
    equal = batch_norm_drift([(own, own)])
    assert equal is not None
    assert equal.item() == 0
    assert batch_norm_drift([]) is None


@pytest.mark.parametrize(
    ("recipe", "pairs"),
    [
        ("quickstart_digits", {("encoder.head", "momentum_encoder.head")}),
        ("dino_digits", {("encoder.head", "momentum_encoder.head")}),
        ("simsiam_digits", set()),
        ("swav_digits", set()),
        ("moby_digits", {("encoder.head", "momentum_encoder.head")}),
        ("moco_digits", {("encoder", "momentum_encoder")}),
        ("sdssl_digits", {("encoder", "momentum_encoder")}),
    ],
)
def test_batch_norms_are_paired_with_those_of_the_network_of_averages(
    recipe: str, pairs: set[tuple[str, str]]
) -> None:
    objective = build_objective(get_recipe(recipe), torch.device("cpu"))
    names = {module: name for name, module in objective.named_modules()}
    found = [(names[own], names[other]) for own, other in objective.averaged_norms()]
    assert bool(found) == bool(pairs)
    for own, other in found:
        assert any(
            own.startswith(one) and other == own.replace(one, two, 1) for one, two in pairs
        ), (own, other)
    with_statistics = {
        name
        for name, module in objective.named_modules()
        if isinstance(getattr(module, "running_mean", None), Tensor)
        and name.startswith("momentum_encoder")
    }
    assert {other for _, other in found} == with_statistics


def test_nothing_here_waits_for_the_device() -> None:
    config: Config = quickstart_digits()
    objective = build_objective(config, World().device)
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    ratios = UpdateRatios(trained, objective.places())
    with StepCounter() as counter:
        ratios.begin()
        ratios.finish()
        ema_distance(objective.averages().items())
        batch_norm_drift(objective.averaged_norms())
    assert counter.operators
    assert not counter.waits
