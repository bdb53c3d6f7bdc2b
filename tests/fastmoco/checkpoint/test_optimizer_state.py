from pathlib import Path

import pytest
import torch
from torch import nn

from fastmoco.checkpoint import (
    CheckpointError,
    flatten_optimizer,
    load_latest,
    restore_optimizer,
    save_checkpoint,
)
from tests.checkpoint_content import assert_same


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        data = torch.randn(16, 5, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(data).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("cut", [0, 1, 7])
def test_adamw_continues_bit_identically(tmp_path: Path, fused: bool, cut: int) -> None:
    def build() -> tuple[nn.Sequential, torch.optim.AdamW]:
        model = small_model()
        return model, torch.optim.AdamW(
            model.parameters(), weight_decay=0.1, betas=(0.9, 0.98), fused=fused
        )

    whole, optimizer = build()
    train(whole, optimizer, range(12))

    before, optimizer = build()
    train(before, optimizer, range(cut))
    tensors = {f"model.{k}": v for k, v in before.state_dict().items()}
    tensors |= flatten_optimizer(optimizer, before.named_parameters())
    save_checkpoint(tmp_path, step=cut, tensors=tensors, state={}, keep=1)

    loaded = load_latest(tmp_path)
    assert loaded is not None
    after, optimizer = build()
    after.load_state_dict(
        {k.removeprefix("model."): v for k, v in loaded.tensors.items() if k.startswith("model.")}
    )
    restore_optimizer(optimizer, after.named_parameters(), loaded.tensors)
    train(after, optimizer, range(cut, 12))
    assert_same(after.state_dict(), whole.state_dict())
    if cut:
        assert "optimizer.0.weight.exp_avg" in loaded.tensors
        assert all(not key.startswith("optimizer.1.running") for key in loaded.tensors)


def test_without_its_moments_the_run_would_differ() -> None:
    whole, cut = small_model(), small_model()
    kept = torch.optim.AdamW(whole.parameters())
    train(whole, kept, range(12))
    train(cut, torch.optim.AdamW(cut.parameters()), range(7))
    train(cut, torch.optim.AdamW(cut.parameters()), range(7, 12))
    assert not torch.equal(whole.state_dict()["0.weight"], cut.state_dict()["0.weight"])


def test_optimizer_state_that_does_not_fit_is_named() -> None:
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, range(1))
    named = list(model.named_parameters())
    flat = flatten_optimizer(optimizer, named)
    with pytest.raises(CheckpointError, match="has no name"):
        flatten_optimizer(optimizer, named[1:])
    missing = {k: v for k, v in flat.items() if not k.startswith("optimizer.2.bias")}
    restore_optimizer(optimizer, named, missing)  # as of a parameter that was frozen up to the save
    assert set(flatten_optimizer(optimizer, named)) == set(missing)
    with pytest.raises(CheckpointError, match=r"without parameter \['9.bias'\]"):
        restore_optimizer(optimizer, named, {**flat, "optimizer.9.bias.step": torch.ones(())})
    with pytest.raises(
        CheckpointError, match=r"0.weight.exp_avg has shape \(2, 2\), the parameter has \(8, 5\)"
    ):
        restore_optimizer(
            optimizer, named, {**flat, "optimizer.0.weight.exp_avg": torch.ones(2, 2)}
        )


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("exp_avg", torch.ones(8, 5, dtype=torch.int32), "exp_avg is torch.int32"),
        ("exp_avg", torch.ones(8, 5, dtype=torch.bool), "exp_avg is torch.bool"),
        ("exp_avg", None, r"0.weight lacks \['exp_avg'\]"),
        ("step", None, r"0.weight lacks \['step'\]"),
        ("step", torch.ones(3), r"step of shape \(3,\) is no number of steps"),
        ("step", torch.ones(0), "is no number of steps"),
        ("step", torch.tensor(-1.0), "is no number of steps"),
        ("step", torch.tensor(float("nan")), "is no number of steps"),
        ("step", torch.tensor(float("inf")), "is no number of steps"),
        ("step", torch.tensor(1e30), "is no number of steps"),
        ("step", torch.tensor(0.5), "is no number of steps"),
        ("step", torch.tensor(1j), "is no number of steps"),
    ],
)
def test_a_forged_state_is_refused_by_name(
    key: str, value: torch.Tensor | None, words: str
) -> None:
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, range(1))
    flat = flatten_optimizer(optimizer, model.named_parameters())
    before = {name: tensor.clone() for name, tensor in flat.items()}
    forged = dict(flat)
    forged.pop(f"optimizer.0.weight.{key}")
    if value is not None:
        forged[f"optimizer.0.weight.{key}"] = value
    with pytest.raises(CheckpointError, match=words):
        restore_optimizer(optimizer, model.named_parameters(), forged)
    assert_same(flatten_optimizer(optimizer, model.named_parameters()), before)


def test_restored_state_is_a_copy() -> None:
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, range(1))
    flat = {k: v.clone() for k, v in flatten_optimizer(optimizer, model.named_parameters()).items()}
    before = {k: v.clone() for k, v in flat.items()}
    restore_optimizer(optimizer, model.named_parameters(), flat)
    train(model, optimizer, range(1, 3))
    assert_same(flat, before)
