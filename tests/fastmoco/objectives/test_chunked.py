"""A step in chunks is the step on the whole batch: loss, every gradient, buffers and keys, whatever
is kept."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from fastmoco.objectives import MoCoV3
from fastmoco.objectives.chunked import ChunkedStep
from fastmoco.objectives.interface import Coupling, Features, Inputs, Output
from tests.golden_objective import random_views, rough_objective

BATCH = 13


def case(
    dtype: torch.dtype = torch.float64, **options: object
) -> tuple[MoCoV3, tuple[Tensor, Tensor]]:
    torch.manual_seed(30)
    objective = rough_objective(depth=3, **options)  # type: ignore[arg-type]
    view1, view2 = random_views(objective, BATCH)
    return objective.to(dtype), (view1.to(dtype), view2.to(dtype))


def whole(objective: MoCoV3, views: tuple[Tensor, Tensor]) -> tuple[MoCoV3, Output]:
    objective = copy.deepcopy(objective)
    output = objective(*views, accuracy=True)
    output.loss.backward()
    return objective, output


def chunked(
    objective: MoCoV3, views: tuple[Tensor, Tensor], chunk: int, kept: int
) -> tuple[MoCoV3, Output]:
    objective = copy.deepcopy(objective)
    return objective, ChunkedStep(objective, chunk=chunk, kept=kept)(*views, accuracy=True)


def largest_difference(ours: MoCoV3, other: MoCoV3) -> float:
    """Of any gradient; a missing one is as bad as can be."""
    pairs = [
        (p.grad, q.grad)
        for p, q in zip(ours.parameters(), other.parameters(), strict=True)
        if p.requires_grad
    ]
    return max(
        (a - b).abs().max().item() if a is not None and b is not None else torch.inf
        for a, b in pairs
    )


# 5 and 4: the last chunk is smaller, once by much; 13 and 99: one chunk. Kept: none, some, all,
# more than there are.
@pytest.mark.parametrize("chunk", [1, 4, 5, 13, 99])
@pytest.mark.parametrize("kept", [0, 1, 2, 99])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_step_in_chunks_is_the_step_on_the_whole(
    dtype: torch.dtype, tolerance: float, chunk: int, kept: int
) -> None:
    objective, views = case(dtype)
    expected, output = whole(objective, views)
    ours, ours_output = chunked(objective, views, chunk, kept)
    assert (ours_output.loss - output.loss).abs() <= tolerance
    assert ours_output.watch.keys() == output.watch.keys() == {"queries", "keys", "accuracy"}
    for name, expected_rows in output.watch.items():
        assert (ours_output.watch[name] - expected_rows).abs().max() <= tolerance, name
    assert largest_difference(ours, expected) <= tolerance
    for (name, a), b in zip(ours.named_buffers(), expected.buffers(), strict=True):
        assert (a - b).abs().max() <= tolerance, name
    assert all(p.grad is None for p in ours.parameters() if not p.requires_grad)


def test_how_many_graphs_are_kept_changes_no_bit() -> None:
    objective, views = case(torch.float32)
    runs = [chunked(objective, views, 4, kept)[0] for kept in (0, 1, 3, 4)]
    for other in runs[1:]:
        assert largest_difference(runs[0], other) == 0


# Of 13 images in chunks of 4: none, less than a chunk, a chunk, a chunk and a half, all but one,
# all, more.
@pytest.mark.parametrize("kept_images", [0, 3, 4, 6, 12, 13, 99])
def test_images_kept_need_not_be_whole_chunks(kept_images: int) -> None:
    objective, views = case()
    expected, output = whole(objective, views)
    ours = copy.deepcopy(objective)
    graphs: list[int] = []
    features = ours.features

    def seen(inputs: Inputs, *arguments: Any, **options: Any) -> Features:
        graphs.extend([len(inputs.views[0])] if torch.is_grad_enabled() else [])
        return features(inputs, *arguments, **options)

    with mock.patch.object(ours, "features", seen):
        ours_output = ChunkedStep(ours, chunk=4, kept_images=kept_images)(*views)
    assert (ours_output.loss - output.loss).abs() <= 1e-12
    assert largest_difference(ours, expected) <= 1e-12
    first = [min(4, kept_images - i) for i in range(0, min(kept_images, BATCH), 4)]
    first = [min(size, BATCH - 4 * i) for i, size in enumerate(first)]
    assert graphs[: len(first)] == first
    assert sum(graphs) == BATCH
    assert max(graphs) <= 4


def test_which_images_are_kept_changes_no_bit_between_the_same_borders() -> None:
    objective, views = case(torch.float32)
    for kept in (0, 1, 3):
        other, _ = chunked(objective, views, 4, kept)
        ours = copy.deepcopy(objective)
        ChunkedStep(ours, chunk=4, kept_images=4 * kept)(*views)
        assert largest_difference(ours, other) == 0
    ours, other = copy.deepcopy(objective), copy.deepcopy(objective)
    ChunkedStep(ours, chunk=4, kept_images=6)(*views)
    step = ChunkedStep(other, chunk=4, kept_images=0)
    with mock.patch.object(step, "_sizes", return_value=([], [4, 2, 4, 3])):
        step(*views)
    assert largest_difference(ours, other) == 0


@pytest.mark.parametrize("options", [{"freeze": False}, {"apart": True}])
def test_where_the_encoders_share_no_tokens_it_holds_too(options: dict[str, bool]) -> None:
    objective, views = case(freeze=options.get("freeze", True))
    if "apart" in options:
        with torch.no_grad():
            objective.momentum_encoder.patch_embed.proj.weight.mul_(1.5)
    assert not objective.momentum.shares_tokens()
    expected, output = whole(objective, views)
    ours, ours_output = chunked(objective, views, 4, 1)
    assert largest_difference(ours, expected) <= 1e-12
    assert (ours_output.watch["keys"] - output.watch["keys"]).abs().max() <= 1e-12


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_with_activation_checkpointing_it_holds_too(recompute: str) -> None:
    objective, views = case()
    expected, _ = whole(objective, views)
    objective.encoder.recompute(recompute)
    for kept in (0, 2):
        assert largest_difference(chunked(objective, views, 5, kept)[0], expected) <= 1e-12


def test_gradients_are_added_to_those_that_are_there() -> None:
    objective, views = case()
    expected, _ = whole(objective, views)
    step = ChunkedStep(objective, chunk=5, kept=1)
    step(*views)
    step(*views)
    for ours, other in zip(objective.parameters(), expected.parameters(), strict=True):
        if ours.grad is not None and other.grad is not None:
            assert (ours.grad - 2 * other.grad).abs().max() <= 1e-12


def test_bf16_is_as_near_to_the_truth_as_on_the_whole_batch() -> None:
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    objective, views = case(torch.float32)
    truth, _ = whole(objective, views)

    def error(ours: MoCoV3) -> float:
        pairs = [
            (p.grad, q.grad)
            for p, q in zip(ours.parameters(), truth.parameters(), strict=True)
            if p.requires_grad
        ]
        off = sum((a - b).square().sum().item() for a, b in pairs)
        return (off / sum(b.square().sum().item() for _, b in pairs)) ** 0.5

    at_once = copy.deepcopy(objective)
    with autocast():
        loss = at_once(*views).loss
    loss.backward()
    runs = []
    for kept in (0, 1, 9):
        runs.append(copy.deepcopy(objective))
        output = ChunkedStep(runs[-1], chunk=4, kept=kept, autocast=autocast)(*views)
        assert abs(output.loss.item() - loss.item()) <= 1e-3
        assert error(runs[-1]) <= 1.2 * error(at_once)
        assert largest_difference(runs[0], runs[-1]) == 0
    with pytest.raises(ValueError, match="autocast is on around the chunked step"), autocast():
        ChunkedStep(objective, chunk=4)(*views)


class _Noise(nn.Module):
    """Something random in a trunk, drawn for each row as dropped paths are."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.drawn: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.rand(x.shape[0], 1, 1, dtype=x.dtype)
        self.drawn.append(mask)
        out: Tensor = self.inner(x) * mask
        return out


def test_what_is_random_is_drawn_again_as_it_was_and_later_draws_go_on() -> None:
    objective, views = case()
    objective.encoder.blocks[0].mlp = _Noise(objective.encoder.blocks[0].mlp)
    torch.manual_seed(5)
    kept = copy.deepcopy(objective)
    ChunkedStep(kept, chunk=5, kept=3)(*views)
    after = torch.rand(3)
    torch.manual_seed(5)
    step = ChunkedStep(objective, chunk=5, kept=0)
    step(*views)
    assert torch.equal(torch.rand(3), after)
    drawn = objective.encoder.blocks[0].mlp.drawn
    assert len(drawn) == 6
    assert all(torch.equal(a, b) for a, b in zip(drawn[:3], drawn[3:], strict=True))
    assert largest_difference(objective, kept) == 0
    mutant = copy.deepcopy(objective)
    mutant.zero_grad()
    torch.manual_seed(5)
    with mock.patch("fastmoco.objectives.chunked._replay", return_value=contextlib.nullcontext()):
        ChunkedStep(mutant, chunk=5, kept=0)(*views)
    assert largest_difference(mutant, kept) > 1e-3


def test_a_trunk_that_couples_samples_is_refused_with_the_alternatives() -> None:
    objective, _ = case(stem="conv")
    assert objective.coupling is Coupling.TRUNK
    assert "batch norm" in objective.coupling_reason
    with pytest.raises(
        ValueError,
        match=r"batch.chunk=4: this trunk cannot go in chunks, because .*--model.checkpointing",
    ):
        ChunkedStep(objective, chunk=4)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"chunk": 0}, "chunk=0"),
        ({"chunk": 1, "kept": -1}, "kept=-1"),
        ({"chunk": 4, "kept_images": -1}, "kept_images=-1"),
        ({"chunk": 4, "kept": 1, "kept_images": 6}, "kept_images=6, kept=1: one of the two"),
    ],
)
def test_wrong_numbers_are_named(arguments: dict[str, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ChunkedStep(case()[0], **arguments)


def test_views_of_different_shape_are_refused() -> None:
    objective, (view1, view2) = case()
    with pytest.raises(ValueError, match="view1 shape"):
        ChunkedStep(objective, chunk=4)(view1, view2[:5])


MUTANTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "scaled by the number of chunks": lambda gradient, index: gradient / 3,
    "last chunk missing": lambda gradient, index: gradient * (index < 2),
    "views exchanged": lambda gradient, index: gradient.flip(1),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_of_the_second_pass_are_far_off(mutant: str) -> None:
    objective, views = case()
    expected, _ = whole(objective, views)
    ours = copy.deepcopy(objective)
    backward, pushed = torch.autograd.backward, 0

    def push(tensors: Any, gradients: Any = None, *arguments: Any, **options: Any) -> None:
        nonlocal pushed
        if isinstance(gradients, tuple):  # the loss has none
            gradients = tuple(MUTANTS[mutant](gradient, pushed) for gradient in gradients)
            pushed += 1
        backward(tensors, gradients, *arguments, **options)

    with mock.patch.object(torch.autograd, "backward", push):
        ChunkedStep(ours, chunk=5)(*views)
    assert pushed == 3
    assert largest_difference(ours, expected) > 1e-3


def test_gradient_accumulation_over_small_batches_is_another_gradient() -> None:
    """Statistics and keys of a chunk alone: what this step exists to avoid."""
    objective, views = case()
    expected, output = whole(objective, views)
    ours = copy.deepcopy(objective)
    losses = []
    for view1, view2 in zip(views[0].split(5), views[1].split(5), strict=True):
        part = ours(view1, view2)
        (part.loss * len(view1) / BATCH).backward()
        losses.append(part.loss.item())
    assert abs(sum(losses) / 3 - output.loss.item()) > 1e-3
    assert largest_difference(ours, expected) > 1e-3
