"""Compiled blocks: who compiles, static shapes that evaluation does not touch, and what is kept for
the backward."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmoco.models import VisionTransformer, compiled
from fastmoco.models.compiled import choose_compile, compile_blocks, traced_blocks
from fastmoco.objectives import MoCoV3
from fastmoco.planning.live_bytes import LiveBytes
from tests.golden_objective import features_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
TOKENS = 4**2 + 1


@pytest.fixture(autouse=True)
def fresh_graphs() -> Iterator[None]:
    """Graphs are kept by the code of a block: those of another test must not serve here."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def encoder(depth: int = 3) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        image_size=32, patch_size=8, embed_dim=64, depth=depth, num_heads=4, attention="sdpa"
    )


@pytest.mark.parametrize(
    ("wanted", "device", "precision", "triton", "expected"),
    [
        ("auto", CUDA, "bf16", True, True),
        ("auto", CUDA, "fp32", True, True),
        ("auto", CUDA, "fp64", True, False),
        ("auto", CUDA, "bf16", False, False),
        ("auto", CPU, "bf16", True, False),
        (True, CPU, "fp64", False, True),
        (False, CUDA, "bf16", True, False),
    ],
)
def test_auto_compiles_where_triton_writes_the_kernels(
    monkeypatch: pytest.MonkeyPatch,
    wanted: Any,
    device: torch.device,
    precision: str,
    triton: bool,
    expected: bool,
) -> None:
    monkeypatch.setattr(compiled, "triton_is_default", lambda _: triton)
    choice = choose_compile(wanted, device, precision)
    assert choice.compiled is expected
    assert choice.reason in str(choice)


class Graphs:
    """A backend that writes down the sizes of the inputs of every graph, and computes
    uncompiled."""

    def __init__(self) -> None:
        self.sizes: list[list[Any]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nodes = graph.graph.find_nodes(op="placeholder")
        self.sizes.append(
            [
                n.meta["example_value"].shape if isinstance(n.meta["example_value"], Tensor) else n
                for n in nodes
            ]
        )
        return graph.forward


def test_shapes_are_static_and_evaluation_compiles_nothing() -> None:
    """A last batch of evaluation of another size, before the first step, made the graphs of
    training symbolic."""
    graphs = Graphs()
    objective = MoCoV3(encoder, projection_dim=16, hidden_dim=32)
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend=graphs)):
        compile_blocks(objective)
    objective.eval()
    for images in (5, 3):  # before training, with a ragged last batch
        with torch.no_grad():
            objective.encoder(torch.randn(images, 3, 32, 32))
    assert graphs.sizes == []
    objective.train()
    views = torch.randn(2, 4, 3, 32, 32).unbind()
    for _ in range(3):
        objective(*views).loss.backward()
        objective.zero_grad()
    seen = len(graphs.sizes)
    # Blocks share graphs: one of a block and one of a class row, with gradient and without.
    assert seen == 4
    assert all(
        isinstance(size, int) for shapes in graphs.sizes for shape in shapes for size in shape
    )
    objective.eval()
    with torch.no_grad():
        objective.encoder(torch.randn(7, 3, 32, 32))
    objective.train()
    objective(*views).loss.backward()
    assert len(graphs.sizes) == seen


def test_three_sizes_of_chunks_with_all_kinds_of_calls_stay_compiled() -> None:
    graphs = Graphs()
    objective = MoCoV3(encoder, projection_dim=16, hidden_dim=32)
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend=graphs)):
        compile_blocks(objective)
    for images in (2, 3, 4):
        views = torch.randn(2, images, 3, 32, 32).unbind()
        for mode in (torch.no_grad, torch.enable_grad):
            with mode():
                features_of(objective.encoder, views)
            with torch.no_grad():
                features_of(objective.momentum_encoder, views)
    # Query side with and without gradient, key side; a block and a class row; three sizes.
    assert len(graphs.sizes) == 3 * 3 * 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        features_of(objective.encoder, views)


@pytest.mark.parametrize("budget", [1.0, 0.9])
def test_compiled_blocks_compute_the_same(budget: float) -> None:
    plain = encoder()
    ours = copy.deepcopy(plain)
    names = list(ours.state_dict())

    def split_only(share: float) -> Any:
        del share
        return torch._dynamo.lookup_backend("aot_eager_decomp_partition")

    with (
        mock.patch.object(compiled, "_within", split_only),
        mock.patch.object(torch, "compile", functools.partial(torch.compile, fullgraph=True)),
    ):
        compile_blocks(ours, budget=min(budget, 0.999))
    assert list(ours.state_dict()) == names
    images, weights = torch.randn(5, 3, 32, 32), torch.randn(5, 64)
    with torch._functorch.config.patch(activation_memory_budget=budget):
        for model in (plain, ours):
            (model(images) * weights).sum().backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), ours.named_parameters(), strict=True):
        if a.grad is not None:
            assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-5), name


def test_a_budget_binds_the_graphs_of_these_blocks_alone() -> None:
    import torch._functorch.config as functorch
    from torch._inductor import compile_fx

    seen: list[float] = []

    def noted(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append(functorch.activation_memory_budget)
        return graph.forward

    model = encoder()
    with mock.patch.object(compile_fx, "compile_fx", noted):
        compile_blocks(model, budget=0.7)
        model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert seen == [0.7, 0.7]  # a block and a class row
    assert functorch.activation_memory_budget == 1.0
    assert not torch._dynamo.config.optimize_ddp  # which would cut blocks at the borders of buckets


def kept_by_graph(output: Tensor, held: set[int]) -> int:
    """Bytes of the storages that one compiled graph keeps, without those of ``held``."""
    saved = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in output.grad_fn.saved_tensors
    }
    return sum(size for pointer, size in saved.items() if pointer not in held)


@pytest.mark.parametrize("budget", [1.0, 0.9, 0.4])
def test_what_is_counted_is_what_compiled_blocks_keep(budget: float) -> None:
    """Counted without memory, against the tensors that torch.compile's own split keeps of a real
    call."""
    images = 8
    block = encoder().blocks[0]
    block.hands_on_parts = False
    x = torch.randn(images, TOKENS, 64)
    split = torch.compile(block, backend="aot_eager_decomp_partition", dynamic=False)
    with (
        torch._functorch.config.patch(activation_memory_budget=budget),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        out, _ = split(x.requires_grad_())
    held = {t.untyped_storage().data_ptr() for t in (*block.parameters(), x, out)}
    real = kept_by_graph(out, held)
    with FakeTensorMode():
        model = encoder()
        fake = torch.empty(images, TOKENS, 64, requires_grad=True)
        with traced_blocks(model, budget=budget):
            for _ in range(2):  # the first call traces
                live = LiveBytes((*model.parameters(), fake))
                with live, torch.autocast("cpu", dtype=torch.bfloat16):
                    made, _ = model.blocks[0](fake)
                counted = live.now - made.untyped_storage().nbytes()
    assert counted == pytest.approx(real, rel=0.02)


def test_a_smaller_budget_keeps_less_and_first_what_costs_no_product() -> None:
    def kept(budget: float | None) -> int:
        with (
            FakeTensorMode(),
            nullcontext() if budget is None else traced_blocks(model := encoder(), budget=budget),
        ):
            model = encoder() if budget is None else model
            model.blocks[0].hands_on_parts = False
            fake = torch.empty(64, TOKENS, 64, requires_grad=True)
            for _ in range(2):  # the first call traces
                live = LiveBytes((*model.parameters(), fake))
                with live, torch.autocast("cpu", dtype=torch.bfloat16):
                    made = model.blocks[0](fake)
            return live.now - sum(t.untyped_storage().nbytes() for t in made if t is not None)

    eager, by_budget = kept(None), [kept(budget) for budget in compiled.BUDGETS]
    assert by_budget[0] <= eager
    assert by_budget[1] < 0.75 * by_budget[0]
