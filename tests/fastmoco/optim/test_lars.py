"""LARS as a run builds it, against golden numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fastmoco.optim.averaged import AveragedLARS
from fastmoco.optim.build import build_optimizer
from fastmoco.recipes import quickstart_digits


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_the_steps_of_a_configured_lars_match_golden(
    golden: Callable[[str], dict[str, np.ndarray]], dtype: torch.dtype, tolerance: float
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
