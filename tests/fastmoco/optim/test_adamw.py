"""The optimizer: what it holds, and its fused kernel against the plain one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastmoco.optim import build_adamw
from fastmoco.optim.adamw import trainable_parameters


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


@pytest.mark.parametrize("groups", [1, 2])
def test_equals_torchs_optimizer_bit_for_bit_and_exchanges_its_state(groups: int) -> None:
    ours_model, torchs_model = model(), model()
    ours = build_adamw(ours_model.named_parameters(), lr=0.01, weight_decay=0.1)
    torchs = torch.optim.AdamW(
        trainable_parameters(torchs_model.named_parameters()),
        lr=0.01,
        weight_decay=0.1,
        fused=True,
    )
    assert isinstance(ours, torch.optim.AdamW)
    extra = [nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)]
    if groups == 2:
        ours.add_param_group({"params": [("extra", extra[0])], "lr": 0.02})
        torchs.add_param_group({"params": [("extra", extra[1])], "lr": 0.02})
    for step in range(6):
        x = torch.randn(4, 7, dtype=torch.float64)
        for module, own, optimizer in (
            (ours_model, extra[0], ours),
            (torchs_model, extra[1], torchs),
        ):
            optimizer.zero_grad()
            loss = (module(x) * own).square().sum()
            loss.backward()
            optimizer.step(lambda loss=loss: loss)
        if step == 3:  # each goes on with the state of the other
            states = ours.state_dict(), torchs.state_dict()
            torchs.load_state_dict(states[0])
            ours.load_state_dict(states[1])
    for one, two in zip(ours_model.parameters(), torchs_model.parameters(), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(*extra)
    assert ours.state_dict()["param_groups"] == torchs.state_dict()["param_groups"]


def test_the_closure_runs_with_gradients_and_its_loss_is_returned() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = build_adamw([("weight", weight)], lr=0.1, weight_decay=0.0)

    def closure() -> torch.Tensor:
        loss = weight.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 2
    torch.testing.assert_close(weight.detach(), torch.full((2,), 0.9))
