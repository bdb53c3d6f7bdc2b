"""Both backends against float64, in value and in every gradient."""

from __future__ import annotations

import pytest
import torch

from fastmoco_kernels import attention
from fastmoco_kernels.attention.op import _default


def _qkv(shape: tuple[int, ...], queries: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    batch, heads, keys, dim = shape
    rows = (queries, keys, keys)
    return [torch.randn(batch, heads, n, dim, generator=generator, dtype=torch.float64) for n in rows]


def _loss_and_gradients(inputs: list[torch.Tensor], backend: str) -> list[torch.Tensor]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = attention(*leaves, backend=backend)
    (out.double() * torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


# ViT-S at 224 (197 tokens, 12 heads of 32) cut to two heads; a tiny picture; the class token alone as query
@pytest.mark.parametrize(("shape", "queries"), [((1, 2, 197, 32), 197), ((3, 4, 17, 16), 17), ((2, 3, 50, 64), 1)])
@pytest.mark.parametrize("backend", ["sdpa", "explicit"])
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


def test_bf16_on_a_cpu_is_written_out():
    assert _default(torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16)) == "explicit"
    assert _default(torch.zeros(1, 1, 1, 1)) == "sdpa"


def test_errors_name_the_shapes():
    q, k = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 5)
    with pytest.raises(ValueError, match=r"\(1, 2, 3, 4\).*\(1, 2, 3, 5\)"):
        attention(q, k, k)
    with pytest.raises(ValueError, match="float64"):
        attention(q, q.double(), q.double())
    with pytest.raises(ValueError, match="backend='flash9'"):
        attention(q, q, q, backend="flash9")
