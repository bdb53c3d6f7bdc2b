"""Activation checkpointing: the same bits, and what is kept is less."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden_objective import random_views, rough_objective


def kept_bytes(run: object) -> int:
    """Bytes of all storages that a forward saves for its backward, parameters among them."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()  # type: ignore[operator]
    return sum(saved.values())


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("half", [False, True])
def test_gradients_are_equal_to_the_bit(recompute: str, half: bool) -> None:
    torch.manual_seed(40)
    plain = rough_objective(depth=3).float()
    ours = copy.deepcopy(plain)
    ours.encoder.recompute(recompute)
    views = [view.float() for view in random_views(plain)]
    for objective in (plain, ours):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = objective(*views).loss
        loss.backward()
    compared = 0
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        if b.grad is not None and a.grad is not None:
            assert torch.equal(a.grad, b.grad), name
            compared += 1
    assert compared == sum(p.requires_grad for p in plain.parameters())


def test_what_is_kept_is_less() -> None:
    torch.manual_seed(41)
    encoder = rough_objective(depth=3).float().encoder
    images = torch.randn(64, 3, 16, 16)
    sizes = {}
    for recompute in ("none", "selective", "full"):
        encoder.recompute(recompute)
        sizes[recompute] = kept_bytes(partial(encoder, images))
    assert sizes["selective"] < 0.75 * sizes["none"]
    assert sizes["full"] < 0.5 * sizes["selective"]


def _noted(norm: Callable[..., Any], calls: list[str], name: str, *inputs: torch.Tensor) -> Any:
    calls.append(name)
    return norm(*inputs)


def test_selective_repeats_no_product_of_a_whole_block() -> None:
    encoder = rough_objective(depth=2).encoder
    encoder.recompute("selective")
    calls: list[str] = []
    for name, module in encoder.blocks[0].named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.add = partial(_noted, module.add, calls, name)
    output = encoder(torch.randn(4, 3, 16, 16, dtype=torch.float64))
    assert calls == ["norm1", "norm2"]
    with torch.profiler.profile() as profile:
        output.sum().backward()
    assert calls == ["norm1", "norm2", "norm2", "norm1"]
    forward_products = [e.count for e in profile.key_averages() if e.key == "aten::gelu"]
    assert forward_products == [2]  # of the block, and of the class row


def test_without_gradient_nothing_is_checkpointed() -> None:
    encoder = rough_objective(depth=2).encoder
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        expected = encoder(images)
        encoder.recompute("full")
        assert torch.equal(encoder(images), expected)
