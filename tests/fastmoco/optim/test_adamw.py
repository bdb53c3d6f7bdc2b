"""The optimizer: what it holds, and its fused kernel against the plain one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastmoco.optim import build_adamw


def model() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    module[0].weight.requires_grad_(False)
    return module


def test_holds_every_trainable_parameter_once_in_one_decayed_group() -> None:
    optimizer = build_adamw(
        model().named_parameters(), lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-7
    )
    (group,) = optimizer.param_groups
    assert group["param_names"] == ["0.bias", "1.weight", "1.bias", "2.weight", "2.bias"]
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (
        1e-3,
        0.1,
        (0.9, 0.95),
        1e-7,
    )
    assert group["fused"]


def test_fused_kernel_equals_the_plain_one_in_float64() -> None:
    fused_model, plain_model = model(), model()
    fused = build_adamw(fused_model.named_parameters(), lr=0.0, weight_decay=0.1)
    plain = torch.optim.AdamW(
        plain_model.parameters(), lr=0.0, weight_decay=0.1, foreach=False, fused=False
    )
    for step in range(20):
        x = torch.randn(4, 7, dtype=torch.float64)
        for module, optimizer in ((fused_model, fused), (plain_model, plain)):
            optimizer.param_groups[0]["lr"] = 1e-2 * step / 20
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.step()
    for ours, other in zip(fused_model.parameters(), plain_model.parameters(), strict=True):
        assert (ours - other).abs().max() <= 1e-14


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one trainable parameter"):
        build_adamw(model().requires_grad_(False).named_parameters(), lr=1e-3, weight_decay=0.0)
