"""Attention of stacked projections against `attention` of their parts, in value and gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastmoco_kernels import attention
from fastmoco_kernels.attention.cost import attention_flops
from fastmoco_kernels.attention.stacked import _Explicit, stacked_attention

B, L, A, D = 2, 19, 3, 8


def _qkv(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    # Larger than a unit, so that the softmax is far from uniform.
    numbers = 2 * torch.randn(B, L, 3 * A * D, generator=generator)
    return numbers.bfloat16().to(dtype).requires_grad_()


def _plain(qkv: Tensor) -> Tensor:
    q, k, v = (part.transpose(1, 2) for part in qkv.view(B, L, 3, A, D).unbind(2))
    return attention(q, k, v, backend="reference").transpose(1, 2).reshape(B, L, A * D)


def _gradient(out: Tensor, qkv: Tensor) -> Tensor:
    # A gradient with other strides than those of the result.
    dy = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(A * D, B * L).t()
    return torch.autograd.grad(out, qkv, dy.reshape(out.shape))[0]


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-14), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("autocast", [False, True])
def test_value_and_gradient_are_those_of_the_parts(
    dtype: torch.dtype, limit: float, autocast: bool
) -> None:
    qkv, exact = _qkv(dtype), _qkv(torch.float64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype != torch.float32):
        out = stacked_attention(qkv, A)
    truth = _plain(exact)
    assert out.dtype == dtype
    assert (type(out.grad_fn).__name__ == "_ExplicitBackward") is (dtype == torch.bfloat16)
    for ours, true in ((out, truth), (_gradient(out, qkv), _gradient(truth, exact))):
        assert (ours - true).abs().max() <= limit * true.abs().max()


def test_without_gradient_the_value_has_the_same_bits() -> None:
    qkv = _qkv(torch.bfloat16)
    with torch.no_grad():
        alone = stacked_attention(qkv, A)
    assert torch.equal(alone, stacked_attention(qkv, A))


def test_another_backend_and_a_counting_mode_see_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Explicit, "apply", None)
    qkv = _qkv(torch.bfloat16)
    with FlopCounterMode(display=False) as counter:
        stacked_attention(qkv, A)
    assert counter.get_total_flops() == attention_flops(B, A, L, L, D)
    assert torch.equal(stacked_attention(qkv, A, backend="reference"), _plain(qkv))
