"""The plain backends against float64, in value and in every gradient, and every wrong call by its
numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

from fastmoco_kernels import attention
from fastmoco_kernels.attention.cost import attention_bytes, attention_flops, explicit_weights_bytes
from fastmoco_kernels.attention.reference import attention_explicit, attention_reference


def _qkv(shape: tuple[int, ...], queries: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    batch, heads, keys, dim = shape
    rows = (queries, keys, keys)
    return [
        torch.randn(batch, heads, n, dim, generator=generator, dtype=torch.float64) for n in rows
    ]


def _loss_and_gradients(inputs: list[torch.Tensor], backend: str) -> list[torch.Tensor]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = attention(*leaves, backend=backend)
    (
        out.double() * torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    ).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


# ViT-S at 224 (197 tokens, 12 heads of 32) cut to two heads; a tiny picture; the class token alone
# as query
@pytest.mark.parametrize(
    ("shape", "queries"), [((1, 2, 197, 32), 197), ((3, 4, 17, 16), 17), ((2, 3, 50, 64), 1)]
)
@pytest.mark.parametrize("backend", ["sdpa", "explicit", "reference"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 6e-2)]
)
def test_matches_float64(shape, queries, backend, dtype, tolerance):
    exact = _loss_and_gradients(_qkv(shape, queries), "explicit")
    actual = _loss_and_gradients([t.to(dtype) for t in _qkv(shape, queries)], backend)
    assert actual[0].dtype == dtype
    for a, e in zip(actual, exact, strict=True):
        # bf16 keeps 8 bits: the bound is on the whole tensor, relative to its largest value
        assert (a.double() - e).abs().max() <= tolerance * e.abs().max()


@pytest.mark.parametrize("backend", ["sdpa", "explicit", "reference"])
def test_one_query_over_two_keys_by_hand(backend):
    """Scores 0 and 2 log 3 / sqrt(4) = log 3: weights 1/4 and 3/4."""
    q, k, v = (torch.zeros(1, 1, rows, 4, dtype=torch.float64) for rows in (1, 2, 2))
    q[..., 0, 0], k[..., 1, 0] = 2, math.log(3)
    v[..., 0, 0], v[..., 1, 0], v[..., 1, 1] = 4, 8, 4
    expected = torch.tensor([[[[7.0, 3, 0, 0]]]], dtype=torch.float64)
    torch.testing.assert_close(attention(q, k, v, backend=backend), expected)


@pytest.mark.parametrize("function", [attention_reference, attention_explicit])
def test_gradients_of_the_written_out_forms(function):
    inputs = [t.requires_grad_() for t in _qkv((2, 2, 5, 3), 4)]
    assert gradcheck(function, inputs)


def test_the_reference_rounds_once():
    """In bf16 the explicit form rounds scores and weights; the reference only its result."""
    inputs = [t.bfloat16() for t in _qkv((1, 2, 64, 32), 64)]
    exact = attention_explicit(*(t.double() for t in inputs))
    assert torch.equal(
        attention_reference(*inputs), attention_explicit(*(t.float() for t in inputs)).bfloat16()
    )
    errors = [
        (attention(*inputs, backend=b).double() - exact).norm() for b in ("reference", "explicit")
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("backend", ["auto", "sdpa", "explicit", "reference"])
def test_autocast_decides_the_dtype_and_float64_stays(backend):
    q, k, v = (t.float() for t in _qkv((1, 2, 5, 8), 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attention(q, k, v, backend=backend)
        wide = attention(q.double(), k.double(), v.double(), backend=backend)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), backend=backend))
    assert torch.equal(wide, attention(q.double(), k.double(), v.double(), backend=backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_compiles_without_a_break(dtype):
    inputs = [t.to(dtype) for t in _qkv((1, 2, 9, 8), 9)]
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), attention(*inputs))


def test_errors_name_the_shapes():
    q, k = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 5)
    with pytest.raises(ValueError, match=r"\(1, 2, 3, 4\).*\(1, 2, 3, 5\)"):
        attention(q, k, k)
    with pytest.raises(ValueError, match=r"\(0, 2, 3, 4\).*at least one"):
        attention(q[:0], q[:0], q[:0])
    with pytest.raises(ValueError, match=r"\(1, 2, 0, 4\).*at least one"):
        attention(q, q[:, :, :0], q[:, :, :0])
    with pytest.raises(ValueError, match="float64"):
        attention(q, q.double(), q.double())
    with pytest.raises(ValueError, match="int64"):
        attention(q.long(), q.long(), q.long())
    with pytest.raises(ValueError, match="backend='flash9'"):
        attention(q, q, q, backend="flash9")


def test_flops_are_those_that_torch_counts():
    """The backward of the explicit form has four products; one that keeps no weights makes the
    scores again."""
    inputs = [t.requires_grad_() for t in _qkv((2, 3, 7, 8), 5)]
    sizes = (2, 3, 5, 7, 8)
    with FlopCounterMode(display=False) as forward:
        out = attention(*inputs, backend="explicit")
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert attention_flops(*sizes) == forward.get_total_flops()
    scores = attention_flops(*sizes) // 2
    assert attention_flops(*sizes, backward=True) == backward.get_total_flops() + scores


def test_bytes_of_the_tensors_there_are():
    q, k, v = (t.half() for t in _qkv((2, 3, 7, 8), 5))
    lse = torch.empty(2, 3, 5)
    forward = sum(t.nbytes for t in (q, k, v, q, lse))
    assert attention_bytes(2, 3, 5, 7, 8, 2) == forward
    assert attention_bytes(2, 3, 5, 7, 8, 2, backward=True) == forward + sum(
        t.nbytes for t in (q, q, k, v)
    )
    assert explicit_weights_bytes(2, 3, 5, 7, 2) == (q @ k.mT).nbytes
