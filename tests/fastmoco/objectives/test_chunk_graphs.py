"""Passes over a chunk at fixed addresses: equal to those from Python bit for bit, and what a replay
repeats is all there is.

A CPU captures nothing. Here a pass runs as plain code over its static tensors, and as a `Tape`: the
operations of one run, done again on the tensors of that run, which is what a CUDA graph does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastmoco.objectives import MoCoV3
from fastmoco.objectives.chunk_graphs import ChunkGraphs, Replayable
from fastmoco.objectives.chunked import ChunkedStep
from fastmoco.objectives.interface import Inputs, Progress
from tests.golden_objective import random_views, rough_objective

BATCH = 13
autocast = partial(torch.autocast, "cpu", torch.bfloat16)


def case(**options: Any) -> tuple[MoCoV3, list[tuple[Tensor, Tensor]]]:
    """An objective in float32 and the views of some steps."""
    torch.manual_seed(60)
    objective = rough_objective(depth=3, **options)
    batches = [random_views(objective, BATCH) for _ in range(3)]
    return objective.float(), [(view1.float(), view2.float()) for view1, view2 in batches]


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator and changes none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Tape(Replayable):
    """The operations of one run of a function, done again on the same tensors by every call."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__(function)
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        tape = self.calls

        class Record(TorchDispatchMode):  # type: ignore[no-untyped-call]
            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                made = func(*args, **(kwargs or {}))
                tape.append((func, args, kwargs or {}, made))
                return made

        with Record():
            self._result = function()

    @torch.no_grad()
    def __call__(self) -> Any:
        for func, args, kwargs, made in self.calls:
            for old, new in zip(tree_leaves(made), tree_leaves(func(*args, **kwargs)), strict=True):
                # Views and what is written in place are where they were.
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        return self._result


def taped_(graphs: ChunkGraphs, views: tuple[Tensor, Tensor]) -> ChunkGraphs:
    """The same with its passes as tapes."""
    graphs.begin(Inputs(views), Progress())
    for name in ("_features", "_backward"):
        setattr(graphs, name, Tape(getattr(graphs, name)))
    return graphs


def train(step: ChunkedStep, batches: list[tuple[Tensor, Tensor]]) -> list[list[Tensor]]:
    """Losses, keys, gradients and weights of some steps with weights that move, gradients set to
    None between them."""
    objective, history = step.objective, []
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for views in batches:
        objective.zero_grad(set_to_none=True)
        output = step(*views)
        gradients = [p.grad.clone() for p in trained if p.grad is not None]
        assert len(gradients) == len(trained)
        optimizer.step()
        objective.update_momentum_encoder(0.9)
        history.append(
            [
                output.loss.detach(),
                *output.watch["keys"],
                *gradients,
                *(p.detach().clone() for p in trained),
            ]
        )
    return history


def equal(ours: list[list[Tensor]], other: list[list[Tensor]]) -> bool:
    pairs = [pair for rows in zip(ours, other, strict=True) for pair in zip(*rows, strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)


# 13 images in chunks of 4: the last is smaller and runs from Python; kept chunks too, whole ones
# and a half.
@pytest.mark.parametrize("how", [{}, {"kept": 1}, {"kept_images": 6}, {"kept": 9}])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("taped", [False, True])
def test_steps_over_static_tensors_are_those_from_python_to_the_bit(
    how: dict[str, int], half: bool, taped: bool
) -> None:
    objective, batches = case()
    context = partial(autocast, enabled=half)
    # A tape records operators, and where they are watched some have other bits in bf16.
    with Watch() if taped else nullcontext():
        expected = train(
            ChunkedStep(copy.deepcopy(objective), chunk=4, autocast=context, **how), batches
        )
    graphs = ChunkGraphs(objective, 4, context, capture=False)
    if taped:
        taped_(graphs, batches[0])
    with (
        Watch() if taped else nullcontext(),
        mock.patch.object(graphs, "backward", wraps=graphs.backward) as replayed,
    ):
        ours = train(
            ChunkedStep(objective, chunk=4, autocast=context, graphs=graphs, **how), batches
        )
    assert equal(ours, expected)
    other = BATCH - 4 * how.get("kept", 0) - how.get("kept_images", 0)
    assert replayed.call_count == 3 * max(0, other // 4)


@pytest.mark.parametrize("options", [{"freeze": False}, {"apart": True}])
def test_where_the_encoders_share_no_tokens_too(options: dict[str, bool]) -> None:
    objective, batches = case(freeze=options.get("freeze", True))
    if "apart" in options:
        with torch.no_grad():
            objective.momentum_encoder.patch_embed.proj.weight.mul_(1.5)
    expected = train(ChunkedStep(copy.deepcopy(objective), chunk=4), batches)
    graphs = taped_(ChunkGraphs(objective, 4, capture=False), batches[0])
    assert equal(train(ChunkedStep(objective, chunk=4, graphs=graphs), batches), expected)


def test_a_replay_that_relies_on_new_gradients_would_be_seen() -> None:
    """The tape is a judge: where autograd puts a new tensor into ``grad``, repeating its kernels
    changes nothing there."""
    objective, batches = case()
    graphs = ChunkGraphs(objective, 4, capture=False)
    graphs.begin(Inputs(batches[0]), Progress())
    objective.zero_grad(set_to_none=True)
    graphs._backward = Tape(graphs._backward)
    graphs._inputs.views[0].copy_(batches[0][0][:4])
    graphs._gradient[0].fill_(1.0)
    objective.zero_grad(set_to_none=True)
    graphs._backward()
    assert all(p.grad is None for p in objective.parameters())


def test_gradients_stay_where_they_are_and_are_added_to_what_is_there() -> None:
    objective, batches = case()
    expected = train(ChunkedStep(copy.deepcopy(objective), chunk=4), batches[:1])[0]
    trained = [p for p in objective.parameters() if p.requires_grad]
    expected = expected[3 : 3 + len(trained)]
    step = ChunkedStep(objective, chunk=4, graphs=ChunkGraphs(objective, 4, capture=False))
    mine = [
        p
        for n, p in objective.encoder.named_parameters()
        if p.requires_grad and not n.startswith("head.")
    ]
    # Somebody's own tensors in ``grad``, before the passes exist: they are kept.
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    step(*batches[0])
    addresses = [p.grad.data_ptr() for p in mine if p.grad is not None]
    for parameter, gradient in zip(trained, expected, strict=True):
        assert parameter.grad is not None
        assert (parameter.grad - gradient - 1).abs().max() <= 1e-5
    step(*batches[0])
    for parameter, gradient in zip(trained, expected, strict=True):
        assert parameter.grad is not None
        assert (parameter.grad - 2 * gradient - 1).abs().max() <= 1e-5
    objective.zero_grad(set_to_none=True)
    step(*batches[0])
    assert [p.grad.data_ptr() for p in mine if p.grad is not None] == addresses
    for parameter, gradient in zip(trained, expected, strict=True):
        assert parameter.grad is not None
        assert (parameter.grad - gradient).abs().max() <= 1e-6


def test_a_step_that_was_not_finite_leaves_nothing_behind() -> None:
    objective, batches = case()
    step = ChunkedStep(
        objective, chunk=4, graphs=taped_(ChunkGraphs(objective, 4, capture=False), batches[0])
    )
    expected = train(ChunkedStep(copy.deepcopy(objective), chunk=4), batches[:1])
    buffers = [buffer.clone() for buffer in objective.buffers()]
    bad = batches[1][0].clone()
    bad[2, 0, 0, 0] = torch.nan
    step(bad, batches[1][1])
    assert any(
        p.grad is not None and p.grad.isnan().any() for p in objective.encoder.blocks.parameters()
    )
    for buffer, before in zip(objective.buffers(), buffers, strict=True):
        buffer.copy_(before)  # as the guard of a step puts them back
    assert equal(train(step, batches[:1]), expected)


def test_passes_are_made_once_and_anew_where_a_weight_has_moved() -> None:
    objective, batches = case()
    graphs = ChunkGraphs(objective, 4, capture=False)
    step = ChunkedStep(objective, chunk=4, graphs=graphs)
    with mock.patch.object(graphs, "_build", wraps=graphs._build) as built:
        train(step, batches)
        assert built.call_count == 1
        weight = objective.encoder.blocks[0].mlp.fc1.weight
        weight.data = weight.data.clone()
        train(step, batches)
        assert built.call_count == 2
        with torch.no_grad():
            objective.momentum_encoder.patch_embed.proj.weight.mul_(
                1.5
            )  # patch tokens are no longer shared
        train(step, batches)
        assert built.call_count == 3
        graphs.close()
        graphs.close()
        train(step, batches)
        assert built.call_count == 4
        # Nothing to replay: all kept, or a batch smaller than a chunk.
        small = ChunkedStep(objective, chunk=4, kept=9, graphs=graphs)
        graphs.close()
        train(small, batches)
        small.kept_images = 0
        train(small, [(view1[:3], view2[:3]) for view1, view2 in batches])
        assert built.call_count == 4


class _Noise(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x) * torch.rand(x.shape[0], 1, 1)
        return out


def test_what_no_graph_can_serve_is_refused() -> None:
    objective, batches = case()
    with pytest.raises(
        ValueError, match=r"batch.cuda_graphs=True: device 'cpu' has no CUDA graphs"
    ):
        ChunkGraphs(objective, 4)
    objective.encoder.recompute("selective")
    with pytest.raises(
        ValueError, match=r"with model.checkpointing=selective .* take batch.cuda_graphs False"
    ):
        ChunkGraphs(objective, 4, capture=False)
    objective.encoder.recompute("none")
    with (
        mock.patch("fastmoco.objectives.chunk_graphs.is_sharded", return_value=True),
        pytest.raises(ValueError, match=r"under fsdp and hsdp .* or parallel.strategy ddp"),
    ):
        ChunkGraphs(objective, 4, capture=False)
    objective.encoder.blocks[0].mlp = _Noise(objective.encoder.blocks[0].mlp)
    with pytest.raises(ValueError, match="the trunk draws random numbers"):
        ChunkGraphs(objective, 4, capture=False).begin(Inputs(batches[0]), Progress())
    assert all(p.grad is None for p in objective.parameters())
