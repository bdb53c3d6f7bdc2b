"""The linear layer of a ViT's blocks against torch's, in value and gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoco_kernels import linear as module
from fastmoco_kernels.linear import (
    LEAST_PRODUCTS,
    has_product,
    linear,
    onednn_has_bf16,
    onednn_is_faster,
)

ROWS, K, N = 512, 96, 192
NEEDS_ONEDNN = pytest.mark.skipif(not has_product(), reason="torch was built without oneDNN")


@pytest.fixture
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """oneDNN on any CPU; the list gets an entry for each product of it."""
    products: list[int] = []
    product = module._product
    monkeypatch.setattr(module, "onednn_is_faster", lambda: True)

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        products.append(1)
        return product(x, weight, bias)

    monkeypatch.setattr(module, "_product", counted)
    return products


def _given(dtype: torch.dtype = torch.float32, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, rows // 2, K), (N, K), (N,))
    x, weight, bias = (
        torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes
    )
    return x, weight, bias


def _gradients(out: Tensor, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # A gradient with other strides than those of the result.
    dy = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(N, ROWS).t().view(out.shape)
    return torch.autograd.grad(out, given, dy)


@NEEDS_ONEDNN
def test_value_and_gradients_are_torchs_up_to_rounding(by_onednn: list[int]) -> None:
    given = _given()
    exact = tuple(t.detach().double().requires_grad_() for t in given)
    out, truth = linear(*given), F.linear(*exact)
    found = (out, *_gradients(out, given))
    assert len(by_onednn) == 2  # forward, and the gradient of the input
    for ours, true in zip(found, (truth, *_gradients(truth, exact)), strict=True):
        assert ours.shape == true.shape
        assert (ours - true).abs().max() <= 1e-6 * true.abs().max()


@NEEDS_ONEDNN
def test_without_gradient_the_value_has_the_same_bits(by_onednn: list[int]) -> None:
    given = _given()
    with torch.no_grad():
        alone = linear(*given)
    assert torch.equal(alone, linear(*given))
    assert len(by_onednn) == 2


@NEEDS_ONEDNN
def test_a_frozen_input_costs_no_product(by_onednn: list[int]) -> None:
    x, weight, bias = _given()
    out = linear(x.detach(), weight, bias)
    dweight, dbias = _gradients(out, (weight, bias))
    assert len(by_onednn) == 1
    assert dweight.shape == weight.shape
    assert dbias.shape == bias.shape


@pytest.mark.skipif(not onednn_has_bf16(), reason="oneDNN has no bf16 on this CPU")
@pytest.mark.parametrize("autocast", [True, False])
def test_bf16_has_torchs_value_and_gradients(by_onednn: list[int], autocast: bool) -> None:
    given = _given(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out, plain = linear(*given), F.linear(*given)
    assert out.dtype == plain.dtype == torch.bfloat16
    found, truth = _gradients(out, given), _gradients(plain, given)
    assert len(by_onednn) == 2
    for ours, true in zip((out, *found), (plain, *truth), strict=True):
        assert ours.dtype == true.dtype
        assert (ours - true).abs().max() <= 1e-2 * true.abs().max()


@NEEDS_ONEDNN
def test_a_torch_without_the_private_product_computes_its_own(
    by_onednn: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    for found in (onednn_is_faster, onednn_has_bf16):
        assert not found.__wrapped__()
    monkeypatch.setattr(module, "onednn_is_faster", onednn_is_faster.__wrapped__)
    given = _given()
    assert torch.equal(linear(*given), F.linear(*given))
    assert not by_onednn


@pytest.mark.parametrize("case", ["float64", "small", "float16", "counted"])
def test_torchs_own_elsewhere(by_onednn: list[int], case: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    given = _given(
        torch.float64 if case == "float64" else torch.float32, 8 if case == "small" else ROWS
    )
    assert 8 * K * N < LEAST_PRODUCTS <= ROWS * K * N
    counter = FlopCounterMode(display=False)
    with torch.autocast("cpu", torch.float16, enabled=case == "float16"):
        if case == "counted":
            with counter:
                linear(*given)
            assert counter.get_total_flops() == 2 * ROWS * K * N
        else:
            assert torch.equal(linear(*given), F.linear(*given))
    assert not by_onednn


@NEEDS_ONEDNN
def test_only_amds_cpus(tmp_path: Path) -> None:
    for vendor, faster in (
        ("AuthenticAMD", torch._C.has_mkl),
        ("GenuineIntel", False),
    ):
        info = tmp_path / vendor
        info.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
        assert onednn_is_faster(info) is faster
    assert not onednn_is_faster(tmp_path / "none")


@NEEDS_ONEDNN
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_is_no_view(by_onednn: list[int], dtype: torch.dtype) -> None:
    """Torch's own, where oneDNN has no bf16, may be one."""
    x, weight, bias = (torch.randn(*shape) for shape in ((2, 4096, 64), (64, 64), (64,)))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = linear(x, weight.requires_grad_(), bias)
        plain = F.linear(x, weight, bias)
    assert out.dtype == dtype
    assert bool(by_onednn) == (dtype == torch.float32 or onednn_has_bf16())
    assert out._is_view() == (not by_onednn and plain._is_view())
