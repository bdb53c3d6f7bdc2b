"""The roofline counts what a step does: equal to a count by hand, eager and fused, and images/s
follow from it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import roofline
from benchmarks.op_counts import ATTENTION, PRODUCTS, Cost, Counts, OperationCounter
from benchmarks.step_counts import CountingBackend, count_step
from fastmoco.recipes import get_recipe

# vit_nano: E wide, A heads, two blocks of which the second computes the class token alone; R rows
# of tokens of both views.
E, HIDDEN, CHUNK, TOKENS, PATCH = 64, 256, 8, 17, 3 * 2 * 2
R = 2 * CHUNK * TOKENS


@pytest.fixture(scope="module")
def config():
    recipe = get_recipe("quickstart_digits")
    return replace(recipe, precision="bf16", global_batch_size=32)


@pytest.fixture(scope="module")
def eager(config):
    return count_step(config, chunk=CHUNK, compiled=False)


@pytest.fixture(scope="module")
def compiled(config):
    return count_step(config, chunk=CHUNK, compiled=True)


def _block_products() -> int:
    """FLOPs of the first block's linear layers, forward."""
    return 2 * R * E * (3 * E + E + 2 * HIDDEN)


def _class_row_products() -> int:
    """Those of the second block: queries, asks, scores, means, values, projection and MLP of 2
    CHUNK class tokens."""
    images, heads = 2 * CHUNK, 4
    linear = 2 * images * E * (E + E + 2 * HIDDEN)
    asks = values = 2 * images * E * E
    scores = means = 2 * images * heads * TOKENS * E
    return linear + asks + values + scores + means


def test_an_eager_chunk_equals_a_count_by_hand(eager):
    patches = 2 * 2 * CHUNK * 16 * PATCH * E
    assert (
        eager.query.by_kind[PRODUCTS].flops == patches + _block_products() + _class_row_products()
    )
    assert eager.keys.by_kind[PRODUCTS].flops == _block_products() + _class_row_products()
    # Two products where there was one, but none for the images, whose projection is frozen.
    assert eager.backward.by_kind[PRODUCTS].flops == 2 * (_block_products() + _class_row_products())
    assert eager.query.by_kind[ATTENTION].flops == 2 * 2 * (2 * CHUNK) * TOKENS**2 * E
    # Layer norms read and write float32 rows, their weights and two statistics: three of all
    # tokens, two of the class token.
    rows = 3 * R + 2 * 2 * CHUNK
    assert eager.query.by_kind["layer norm"] == Cost(5, rows * (2 * E + 2) * 4 + 5 * 2 * E * 4, 0)
    gelus = (R + 2 * CHUNK) * HIDDEN * 2 * 2
    assert eager.query.by_kind["GELU"] == Cost(2, gelus, 0)


def test_a_compiled_chunk_multiplies_as_much_and_moves_less(eager, compiled):
    for part in ("query", "keys", "backward"):
        before, after = getattr(eager, part), getattr(compiled, part)
        for kind in (PRODUCTS, ATTENTION):
            assert after.by_kind[kind].flops == before.by_kind[kind].flops
        assert after.total.bytes < before.total.bytes
        assert after.total.operations < before.total.operations
    assert compiled.heads.total == eager.heads.total


def test_a_step_adds_up_its_chunks(eager):
    whole, again = eager.step(4, 4), eager.step(4, 1)
    chunk = sum(part.total.flops for part in (eager.query, eager.keys, eager.backward))
    assert whole.total.flops == 4 * chunk + eager.heads.total.flops
    assert again.total.flops - whole.total.flops == 3 * eager.first.total.flops
    card = roofline.Card(bytes_per_s=2.0, flops_per_s=3.0, memory=0)
    counts = Counts()
    counts.add(PRODUCTS, 100, 6)
    counts.add(ATTENTION, 100, 6)
    counts.add("add", 8)
    assert card.seconds_of(counts) == pytest.approx(2 + 2 / roofline.ATTENTION_SHARE + 4)


def test_a_fused_block_equals_a_count_by_hand(config, eager):
    """A norm with a branch moves 12 bytes a token and channel; the gradient of GELU moves 8 for
    each of its four tensors."""
    fused = count_step(
        replace(config, model=replace(config.model, blocks="fused")), chunk=CHUNK, compiled=False
    )
    for part in ("query", "keys", "backward"):
        for kind in (PRODUCTS, ATTENTION):
            assert (
                getattr(fused, part).by_kind[kind].flops == getattr(eager, part).by_kind[kind].flops
            )
    images, weight = 2 * CHUNK, 4
    # The first block has no branch to add, and neither has the class row's second norm a wide one.
    norms = (
        R * E * (4 + 2)
        + R * E * (4 + 2 + 4 + 2)
        + R * E * (4 + 2 + 4 + 2)
        + images * E * (4 + 2 + 4 + 2)
    )
    assert (
        fused.query.by_kind["layer norm"].bytes
        == norms
        + 4 * 2 * E * weight
        + 8 * (3 * R + images)
        + images * E * 8
        + 2 * E * weight
        + 8 * images
    )
    # The gradient to GELU's output and its input in; its output, the gradient and sums over rows
    # out. The class row's is torch's.
    assert fused.backward.by_kind["GELU"].bytes == (4 * R + 3 * images) * HIDDEN * 2 + HIDDEN * 4


class Small(nn.Module):
    """Norm, product with bias, GELU, residual: what the model of fusion is about."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.nn.functional.gelu(self.linear(self.norm(x)))


def test_fused_kernels_equal_a_count_by_hand():
    blocks, counter = CountingBackend(), OperationCounter()
    torch._dynamo.reset()
    with FakeTensorMode():
        module, x = Small(), torch.empty(100, 32, requires_grad=True)
        module.forward = blocks.compile(module.forward)
        module(x).sum().backward()
        blocks.counter = counter
        with counter:
            out = module(x)
        forward, counter.counts = counter.counts, Counts()
        with counter:
            out.backward(torch.empty_like(out))
    row, tensor = 32 * 4, 100 * 32 * 4
    # The norm reads x and two weights, writes its result and three statistics of each row.
    assert forward.by_kind["fused rows"] == Cost(1, 2 * tensor + 2 * row + 3 * 400, 0)
    assert forward.by_kind[PRODUCTS] == Cost(1, 2 * tensor + 32 * row + row, 2 * 100 * 32 * 32)
    assert forward.by_kind["fused pointwise"] == Cost(
        1, 3 * tensor, 0
    )  # x and the product in, the sum out
    assert counter.counts.by_kind[PRODUCTS].operations == 2
    # Bias, norm weight and norm bias.
    assert 2 <= counter.counts.by_kind["column sums"].operations <= 3
    # GELU's backward reads the gradient and the product, and writes one tensor.
    assert counter.counts.by_kind["fused pointwise"] == Cost(1, 3 * tensor, 0)
    # The norm's reads the product's gradient, x and the outer gradient, and writes the gradient of
    # x.
    assert counter.counts.by_kind["fused rows"] == Cost(1, 4 * tensor + row + 2 * 400, 0)


def test_the_table_is_printed(capsys, monkeypatch, config):
    monkeypatch.setattr(roofline, "get_recipe", lambda name: config)
    assert roofline.main(["--recipes", "quickstart_digits", "--chunk", "8", "--mode", "eager"]) == 0
    text = capsys.readouterr().out
    assert "vit_nano, eager, chunks of 8" in text
    assert "H200" in text
    assert "layer norm" in text
