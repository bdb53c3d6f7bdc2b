"""MoCo v3 against itself by the book, and the rules about what moves when."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastmoco.distributed import BatchNorm
from fastmoco.models import VisionTransformer
from fastmoco.objectives import MoCoV3
from fastmoco.objectives.reference import plain_forward
from fastmoco.optim import build_adamw
from tests.golden_objective import random_views, rough_objective, train_step

Golden = Callable[[str], dict[str, np.ndarray]]


@pytest.mark.parametrize(
    ("stem", "freeze", "shared"),
    [("patch", True, True), ("patch", False, False), ("conv", True, False)],
)
def test_fast_path_equals_the_book_in_value_every_gradient_and_buffer(
    stem: str, freeze: bool, shared: bool
) -> None:
    torch.manual_seed(1)
    fast = rough_objective(stem=stem, freeze=freeze)
    plain = copy.deepcopy(fast)
    assert fast.momentum.shares_tokens() is shared
    pair = random_views(fast)
    outputs = fast(*pair, accuracy=True), plain_forward(plain, *pair, accuracy=True)
    assert (outputs[0].loss - outputs[1].loss).abs() <= 1e-12
    assert outputs[0].watch.keys() == outputs[1].watch.keys() == {"queries", "keys", "accuracy"}
    for name, ours in outputs[0].watch.items():
        book = outputs[1].watch[name]
        assert (ours - book).abs().max() <= 1e-12, name
        assert not ours.requires_grad, name
        assert not book.requires_grad, name
    for output in outputs:
        output.loss.backward()
    for (name, ours), book in zip(fast.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (book.grad is None) == (not ours.requires_grad), name
        if book.grad is not None and ours.grad is not None:
            assert (ours.grad - book.grad).abs().max() <= 1e-12, name
    for (name, ours), book in zip(fast.named_buffers(), plain.buffers(), strict=True):
        assert (ours - book).abs().max() <= 1e-12, name


def test_tokens_are_embedded_once_where_stems_agree_and_again_where_they_do_not() -> None:
    torch.manual_seed(2)
    objective = rough_objective()
    calls: list[int] = []
    for encoder in (objective.encoder, objective.momentum_encoder):
        encoder.patch_embed.register_forward_hook(
            lambda module, args, output: calls.append(args[0].shape[0])
        )
    pair = random_views(objective)
    objective(*pair)
    assert calls == [12]
    with torch.no_grad():
        objective.momentum_encoder.patch_embed.proj.weight[0, 0, 0, 0] += 1.0
    calls.clear()
    output = objective(*pair)
    assert calls == [12, 12]
    assert (
        output.watch["keys"] - plain_forward(objective, *pair).watch["keys"]
    ).abs().max() <= 1e-12
    objective.load_state_dict(
        {
            name.replace("encoder.", "momentum_encoder.", 1): p
            for name, p in objective.encoder.named_parameters(prefix="encoder")
        },
        strict=False,
    )
    calls.clear()
    objective(*pair)
    assert calls == [12]


def test_frozen_projection_and_positions_never_change_in_either_encoder() -> None:
    torch.manual_seed(3)
    objective = rough_objective().float()
    frozen = {
        name: p.detach().clone()
        for name, p in objective.named_parameters()
        if "patch_embed" in name or "pos_embed" in name
    }
    assert len(frozen) == 6
    optimizer = build_adamw(objective.named_parameters(), lr=1e-2, weight_decay=0.1)
    names = optimizer.param_groups[0]["param_names"]
    assert not [
        name
        for name in names
        if "patch_embed" in name or "pos_embed" in name or "momentum_encoder" in name
    ]
    before = {name: p.detach().clone() for name, p in objective.named_parameters()}
    for step in range(50):
        pair = tuple(view.float() for view in random_views(objective))
        train_step(objective, optimizer, pair, lr=1e-2, ema_momentum=0.9 + 0.002 * step)
    after = dict(objective.named_parameters())
    for name, start in frozen.items():
        assert torch.equal(after[name], start), name
    moved = [
        name for name in before if name not in frozen and not torch.equal(after[name], before[name])
    ]
    assert len(moved) == len(before) - len(frozen)


def test_a_trainable_projection_is_averaged_too() -> None:
    torch.manual_seed(4)
    objective = rough_objective(freeze=False)
    own, twin = (
        objective.encoder.patch_embed.proj.weight,
        objective.momentum_encoder.patch_embed.proj.weight,
    )
    with torch.no_grad():
        own.add_(1.0)
    expected = 0.75 * twin + 0.25 * own
    objective.update_momentum_encoder(0.75)
    assert (twin - expected).abs().max() <= 1e-15


def test_order_of_average_and_query_forward_changes_no_bit() -> None:
    torch.manual_seed(5)
    first = rough_objective()
    second = copy.deepcopy(first)
    pair = random_views(first)
    first.update_momentum_encoder(0.9)
    expected = first(*pair)
    queries = [second.predictor(second.encoder.head(second.encoder(view))) for view in pair]
    second.update_momentum_encoder(0.9)
    keys = [second.momentum_encoder.head(second.momentum_encoder(view)) for view in pair]
    rows = [*expected.watch["queries"], *expected.watch["keys"]]
    for ours, row in zip(rows, [*queries, *keys], strict=True):
        assert (ours - row).abs().max() <= 1e-13
    for ours, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, other)


def test_the_twin_keeps_the_statistics_of_its_own_activations() -> None:
    torch.manual_seed(6)
    objective = rough_objective()
    norm = objective.momentum_encoder.head[1]
    assert isinstance(norm, BatchNorm)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    own_before = objective.encoder.head[1].running_mean.clone()

    def follow(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal mean, var
        for view in args[0].unbind():
            mean = 0.9 * mean + 0.1 * view.mean(0)
            var = 0.9 * var + 0.1 * view.var(0)

    norm.register_forward_pre_hook(follow)
    optimizer = build_adamw(objective.named_parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        train_step(objective, optimizer, random_views(objective), lr=1e-2, ema_momentum=0.9)
    assert norm.num_batches_tracked.item() == 6
    assert (norm.running_mean - mean).abs().max() <= 1e-12
    assert (norm.running_var - var).abs().max() <= 1e-12
    assert (norm.running_mean - objective.encoder.head[1].running_mean).abs().max() > 1e-3
    assert (objective.encoder.head[1].running_mean - own_before).abs().max() > 1e-3


def test_twin_starts_equal_without_gradient_and_in_training_mode() -> None:
    build = partial(
        VisionTransformer, image_size=8, patch_size=2, embed_dim=64, depth=2, num_heads=4
    )
    objective = MoCoV3(build, projection_dim=32, hidden_dim=64)
    for own, twin in zip(
        objective.encoder.parameters(), objective.momentum_encoder.parameters(), strict=True
    ):
        assert torch.equal(own, twin)
        assert own.data_ptr() != twin.data_ptr()
        assert not twin.requires_grad
    assert objective.momentum_encoder.training


def test_bf16_autocast_trains_float32_parameters() -> None:
    torch.manual_seed(7)
    objective = rough_objective().float()
    exact = copy.deepcopy(objective)
    pair = tuple(view.float() for view in random_views(objective, batch=16))
    with torch.autocast("cpu", torch.bfloat16):
        output = objective(*pair)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    expected = exact(*pair)
    expected.loss.backward()
    assert abs(output.loss.item() - expected.loss.item()) < 0.05
    assert (
        normalize(output.watch["keys"][0].float(), dim=1)
        * normalize(expected.watch["keys"][0], dim=1)
    ).sum(1).min() > 0.99
    dot = norms = others = 0.0
    for ours, other in zip(objective.parameters(), exact.parameters(), strict=True):
        if ours.grad is not None and other.grad is not None:
            assert ours.dtype == ours.grad.dtype == torch.float32
            dot += (ours.grad * other.grad).sum().item()
            norms += ours.grad.square().sum().item()
            others += other.grad.square().sum().item()
    assert dot / (norms * others) ** 0.5 > 0.98
    assert {buffer.dtype for buffer in objective.buffers()} == {torch.float32, torch.int64}


def test_wrong_arguments_are_named() -> None:
    objective = rough_objective()
    view1, view2 = random_views(objective)
    with pytest.raises(ValueError, match="view1 shape"):
        objective(view1, view2[:3])
    with pytest.raises(ValueError, match="momentum"):
        objective.update_momentum_encoder(1.1)
    with pytest.raises(ValueError, match=r"temperature=0.0: must be positive"):
        MoCoV3(lambda: objective.encoder, temperature=0.0)


def test_stems_that_differ_before_the_first_forward_are_not_shared():
    """Writes through `.data` leave no version behind, so the first question compares."""
    objective = rough_objective()
    objective.momentum_encoder.patch_embed.proj.weight.data.mul_(2)
    assert not objective.momentum.shares_tokens()
