"""LARS by its builders: golden steps of MoCo v3 and SimCLR, and the choices of a config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fastmoco.config import OptimConfig
from fastmoco.optim import build_lars, unless_named
from fastmoco.optim.averaged import AveragedLARS
from fastmoco.optim.build import build_optimizer
from fastmoco.optim.groups import ParameterGroup, set_learning_rates
from fastmoco.recipes import quickstart_digits

Golden = Callable[[str], dict[str, np.ndarray]]


class Tensors(nn.Module):
    """Parameters under names with dots."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            owner: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = getattr(owner, part)
            owner.register_parameter(last, nn.Parameter(tensor))


def run(data: dict[str, np.ndarray], names: list[str], **options: object) -> float:
    """The largest error of four steps, relative to the largest entry of a tensor."""
    start = {name: torch.from_numpy(data[f"lars/init/{name}"]).double() for name in names}
    tensors = Tensors(start)
    optimizer = build_lars(
        tensors.named_parameters(),
        lr=0.0,
        weight_decay=float(data["lars/weight_decay"]),
        sgd_momentum=float(data["lars/momentum"]),
        trust_coefficient=float(data["lars/trust_coefficient"]),
        **options,  # type: ignore[arg-type]
    )
    worst = 0.0
    for step, lr in enumerate(data["lars/lr"].tolist()):
        set_learning_rates(optimizer.param_groups, lr, peak=0.0)
        for name, parameter in tensors.named_parameters():
            parameter.grad = torch.from_numpy(data[f"lars/grads/{name}"][step]).double()
        optimizer.step()
        for name, parameter in tensors.named_parameters():
            expected = data[f"lars/params/{name}"][step]
            gap = np.abs(parameter.detach().numpy() - expected).max()
            worst = max(worst, float(gap / np.abs(expected).max()))
    return worst


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_the_steps_of_a_configured_lars_match_golden(
    golden: Golden, dtype: torch.dtype, tolerance: float
) -> None:
    data = golden("lars")
    base = quickstart_digits()
    optim = replace(
        base.optim,
        name="lars",
        weight_decay=float(data["weight_decay"]),
        sgd_momentum=float(data["momentum"]),
        trust_coefficient=float(data["trust_coefficient"]),
    )
    parameters = {
        name: nn.Parameter(torch.from_numpy(data[f"init/{name}"]).to(dtype))
        for name in data["names"].tolist()
    }
    config = replace(base, optim=optim)
    optimizer = build_optimizer(config, parameters.items(), {})
    assert isinstance(optimizer, AveragedLARS)
    key = "params_f64" if dtype == torch.float64 else "params_f32"
    for step, lr in enumerate(data["lr"].tolist()):
        optimizer.param_groups[0]["lr"] = lr
        for name, parameter in parameters.items():
            parameter.grad = torch.from_numpy(data[f"grads/{name}"][step]).to(dtype)
        optimizer.step(skip=torch.zeros(()))
        for name, parameter in parameters.items():
            expected = torch.from_numpy(data[f"{key}/{name}"][step]).double()
            error = (parameter.detach().double() - expected).abs().max()
            assert error <= tolerance * expected.abs().max().clamp_min(1), name


def test_four_steps_match_simclr(golden: Golden) -> None:
    data = golden("siblings/simclr")
    names = [key.removeprefix("lars/init/") for key in data if key.startswith("lars/init/")]
    by_name = unless_named("batch_normalization", "bias")
    assert run(data, names, lr_in_buffer=True, adapt=by_name) <= 1e-12
    assert run(data, names, lr_in_buffer=True) <= 1e-12  # here the number of dimensions agrees
    assert run(data, names, adapt=by_name) > 1e-3
    assert run(data, names, lr_in_buffer=True, adapt=unless_named("w2")) > 1e-3


@pytest.mark.parametrize("in_buffer", [False, True])
def test_a_config_and_a_group_choose(in_buffer: bool) -> None:
    config = replace(
        quickstart_digits(),
        optim=OptimConfig(
            name="lars", lr_in_buffer=in_buffer, weight_decay=0.5, sgd_momentum=0.5, lr=1.0
        ),
    )
    layer = nn.Linear(3, 2, dtype=torch.float64)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    optimizer = build_optimizer(
        config, layer.named_parameters(), {}, lambda name, _: ParameterGroup(adapt=name == "bias")
    )
    buffers = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for lr in (0.5, 2.0):
        set_learning_rates(optimizer.param_groups, lr, peak=0.0)
        layer.zero_grad()
        layer(torch.ones(1, 3, dtype=torch.float64)).square().sum().backward()
        assert layer.weight.grad is not None
        assert layer.bias.grad is not None
        updates = [layer.weight.grad.clone(), layer.bias.grad + 0.5 * bias]
        updates[1] *= 0.001 * bias.norm() / updates[1].norm()
        optimizer.step(ema_momentum=None)
        factor = lr if in_buffer else 1.0
        buffers = [0.5 * b + factor * u for b, u in zip(buffers, updates, strict=True)]
        weight -= buffers[0] * lr / factor
        bias -= buffers[1] * lr / factor
        assert (layer.weight - weight).abs().max() <= 1e-14
        assert (layer.bias - bias).abs().max() <= 1e-14
