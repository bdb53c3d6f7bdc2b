"""LARC against golden numbers and its own equation, and SGD against torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastmoco.optim.larc import LARC, larc_step_reference_
from fastmoco.optim.sgd import SGD

Golden = Callable[[str], dict[str, np.ndarray]]
KEYS = ("momentum", "weight_decay", "trust_coefficient")
WITHOUT = {("bn", 0)}
"""Parameter and step that have no gradient in the golden file."""


def _reference(params: dict[str, Tensor]) -> Callable[..., None]:
    buffers = [torch.zeros_like(p) for p in params.values()]

    def step(grads: list[Tensor | None], **numbers: float) -> None:
        larc_step_reference_(list(params.values()), grads, buffers, **numbers)

    return step


def _optimizer(params: dict[str, Tensor]) -> Callable[..., None]:
    named = {name: nn.Parameter(p) for name, p in params.items()}
    found: list[LARC] = []

    def step(grads: list[Tensor | None], **numbers: float) -> None:
        if not found:
            found.append(LARC(named.items(), **numbers))
        for p, grad in zip(named.values(), grads, strict=True):
            p.grad = grad
        found[0].param_groups[0]["lr"] = numbers["lr"]
        found[0].step(found_inf=torch.zeros(()))

    return step


@pytest.mark.parametrize("build", [_reference, _optimizer])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_golden_steps(golden: Golden, build: Any, dtype: torch.dtype, tolerance: float) -> None:
    """One tensor starts at zero, one has no gradient in the first step, one a zero gradient in the
    second."""
    data = golden("siblings/swav")
    names = [key.removeprefix("larc/init/") for key in data if key.startswith("larc/init/")]
    params = {name: torch.from_numpy(data[f"larc/init/{name}"]).to(dtype) for name in names}
    numbers = {key: float(data[f"larc/{key}"]) for key in KEYS}
    step_of = build(params)
    for step, lr in enumerate(data["larc/lr"].tolist()):
        grads = [
            None
            if (name, step) in WITHOUT
            else torch.from_numpy(data[f"larc/grads/{name}"][step]).to(dtype)
            for name in names
        ]
        step_of(grads, lr=lr, **numbers)
        for name, param in params.items():
            expected = torch.from_numpy(data[f"larc/params/{name}"][step])
            error = (param.double() - expected).abs().max()
            assert error <= tolerance * expected.abs().max(), (step, name)


def test_what_is_not_adapted_is_not_decayed_either() -> None:
    """A zero gradient leaves its tensor; a zero tensor takes its gradient as it is."""
    still, zero = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
    still.grad, zero.grad = torch.zeros(3), torch.ones(3)
    LARC([still, zero], lr=0.5, weight_decay=10.0).step()
    assert torch.equal(still, torch.ones(3))
    assert torch.equal(zero, torch.full((3,), -0.5))


def _layers() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).double()
    return layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _train(layers: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Four steps; without a gradient of one bias in the second."""
    for step in range(4):
        _gradients(layers, step)
        if step == 1:
            layers[0].bias.grad = None  # type: ignore[index, union-attr]
        optimizer.step()


def _gradients(layers: nn.Module, step: int) -> None:
    layers.zero_grad()
    noise = torch.Generator().manual_seed(step)
    images = torch.randn(5, 3, 4, 4, generator=noise, dtype=torch.float64)
    layers(images).square().mean().backward()


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, False), (0.0, False), (0.9, True)])
def test_sgd_is_torchs(momentum: float, nesterov: bool) -> None:
    """On weights in channels_last, whose gradients have another layout."""
    ours, other = _layers(), _layers()
    numbers = {"lr": 0.1, "momentum": momentum, "weight_decay": 0.01}
    _train(ours, SGD(ours.named_parameters(), nesterov=nesterov, **numbers))
    plain = torch.optim.SGD(other.parameters(), foreach=False, nesterov=nesterov, **numbers)
    _train(other, plain)
    for mine, theirs in zip(ours.parameters(), other.parameters(), strict=True):
        assert (mine - theirs).abs().max() <= 1e-15


@pytest.mark.parametrize("kind", [SGD, LARC])
def test_a_first_step_that_is_skipped_leaves_no_trace(kind: type[SGD] | type[LARC]) -> None:
    ours, never = _layers(), _layers()
    skipping, plain = (kind(m.named_parameters(), lr=0.1, momentum=0.9) for m in (ours, never))
    _gradients(ours, 9)
    ours[0].weight.grad.fill_(float("nan"))  # type: ignore[index, union-attr]
    skipping.step(found_inf=torch.ones(()))
    _train(ours, skipping)
    _train(never, plain)
    assert all(
        torch.equal(mine, theirs)
        for mine, theirs in zip(ours.parameters(), never.parameters(), strict=True)
    )


@pytest.mark.parametrize("kind", [SGD, LARC])
def test_memory_with_gaps_is_refused(kind: type[SGD] | type[LARC]) -> None:
    gaps = nn.Parameter(torch.ones(4, 6)[:, ::2])
    gaps.grad = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"shape \(4, 3\) has strides \(6, 2\), with gaps"):
        kind([gaps], lr=0.1).step()


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ({"momentum": 1.0}, r"momentum=1.0 is outside \[0, 1\)"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 is below 0"),
        ({"trust_coefficient": 0.0}, "trust_coefficient=0.0 is not above 0"),
    ],
)
def test_wrong_numbers_are_named(numbers: dict[str, float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        LARC([nn.Parameter(torch.ones(2))], lr=1.0, **numbers)
