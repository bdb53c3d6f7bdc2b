"""The passes of a fused block: kernels against float64 and the reference, bits, tiles,
registration, bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmoco_kernels.fused_block import launch
from fastmoco_kernels.fused_block.op import (
    gelu_backward,
    kernels_fit,
    norm_backward,
    norm_forward,
    stack_qkv,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-6
HALF, SINGLE = torch.float16, torch.float32  # the interpreter cannot hold bf16


def _draw(*shape: int, seed: int, dtype: torch.dtype = SINGLE) -> Tensor:
    """Numbers that ``dtype`` holds exactly."""
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(dtype).to(DEVICE)


def _norm_inputs(
    rows: int, E: int, half: torch.dtype, *, branch: bool, dsum: bool
) -> dict[str, Tensor | None]:
    """Of a stream that is neither centred nor of variance 1."""
    return {
        "dy": _draw(rows, E, seed=1, dtype=half),
        "dsum": _draw(rows, E, seed=2) if dsum else None,
        "x": _draw(rows, E, seed=3) * 3 + 2,
        "branch": _draw(rows, E, seed=4, dtype=half) if branch else None,
        "weight": _draw(E, seed=5),
        "bias": _draw(E, seed=6),
    }


def _norms(
    inputs: dict[str, Tensor | None], half: torch.dtype, narrow: torch.dtype | None, *, triton: bool
):
    """Forward, and the backward from its statistics: sum, y, dx, dbranch, y again, sums."""
    summed, y, mean, rstd = norm_forward(
        inputs["x"], inputs["branch"], inputs["weight"], inputs["bias"], EPS, half, triton
    )
    return [summed, y, *norm_backward(*inputs.values(), mean, rstd, narrow, triton)]


def _double(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if t is None else t.double() for name, t in inputs.items()}


def _assert_as_good_as_torch(ours: list[Tensor], torchs: list[Tensor], truth: list[Tensor]) -> None:
    """Twice the error of the reference in these dtypes, or four units in the last place where that
    has none."""
    for i, (mine, other, exact) in enumerate(zip(ours, torchs, truth, strict=True)):
        assert (mine.dtype, mine.shape) == (other.dtype, other.shape), i
        if mine.numel():
            floor = 4 * torch.finfo(mine.dtype).eps * float(exact.norm())
            error, allowed = (
                float((mine.double() - exact).norm()),
                2 * float((other.double() - exact).norm()),
            )
            assert error <= max(allowed, floor), (i, error, allowed)


# a row; fewer rows than a tile; more than all programs take at a time; then an odd width and those
# of ViT-S to ViT-H. The second norm of a block, the first, the first of the first block; a stream
# that nobody else used.
@pytest.mark.parametrize(("rows", "E"), [(1, 384), (3, 101), (63, 384), (40, 768), (9, 1280)])
@pytest.mark.parametrize(
    ("dsum", "branch", "narrow"),
    [(True, True, HALF), (True, False, HALF), (True, False, None), (False, True, HALF)],
)
def test_norms_are_as_good_as_torch(rows, E, dsum, branch, narrow):
    inputs = _norm_inputs(rows, E, HALF, branch=branch, dsum=dsum)
    ours, torchs = (_norms(inputs, HALF, narrow, triton=triton) for triton in (True, False))
    truth = _norms(
        _double(inputs), torch.float64, None if narrow is None else torch.float64, triton=False
    )
    _assert_as_good_as_torch(ours, torchs, truth)
    # Made again y is what the forward gave, up to a multiply-add that a compiler fuses in one
    # kernel and not in the other.
    torch.testing.assert_close(ours[1], ours[4], rtol=2e-3, atol=2e-3)


def test_norms_in_float32_alone():
    inputs = _norm_inputs(30, 100, SINGLE, branch=True, dsum=True)
    ours, torchs = (_norms(inputs, SINGLE, None, triton=triton) for triton in (True, False))
    _assert_as_good_as_torch(
        ours, torchs, _norms(_double(inputs), torch.float64, None, triton=False)
    )


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize(("rows", "F"), [(1, 1536), (3, 101), (63, 400), (200, 64)])
def test_gelu_is_as_good_as_torch(rows, F, dtype):
    dg, h = _draw(rows, F, seed=1, dtype=dtype), _draw(rows, F, seed=2, dtype=dtype) * 3
    ours, torchs = (list(gelu_backward(dg, h, triton)) for triton in (True, False))
    _assert_as_good_as_torch(ours, torchs, list(gelu_backward(dg.double(), h.double(), False)))


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize("lies", ["by token", "by head"])
def test_the_stack_is_that_of_torch(dtype, lies):
    parts = [_draw(2, 5, 3, 32, seed=i, dtype=dtype) for i in range(3)]
    if lies == "by token":
        parts = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in parts]
    ours, torchs = (stack_qkv(*parts, triton) for triton in (True, False))
    assert torch.equal(ours[0], torchs[0])
    torch.testing.assert_close(ours[1], torchs[1])


def test_the_references_are_autograds():
    """In float64, to rounding."""
    inputs = {
        name: t.requires_grad_()
        for name, t in _double(_norm_inputs(7, 12, SINGLE, branch=True, dsum=True)).items()
    }
    x, branch, weight, bias = (inputs[name] for name in ("x", "branch", "weight", "bias"))
    summed = x + branch
    y = torch.nn.functional.layer_norm(summed, (12,), weight, bias, EPS)
    torch.autograd.backward([y, summed], [inputs["dy"].detach(), inputs["dsum"].detach()])
    detached = {name: t.detach() for name, t in inputs.items()}
    found = _norms(detached, torch.float64, None, triton=False)
    for mine, truth in zip(
        (*found[:3], *found[5]),
        (summed, y, x.grad, weight.grad, bias.grad, branch.grad.sum(0)),
        strict=True,
    ):
        torch.testing.assert_close(mine, truth.detach(), rtol=1e-12, atol=1e-12)
    h = _draw(5, 8, seed=1).double().requires_grad_()
    dg = _draw(5, 8, seed=2).double()
    g = torch.nn.functional.gelu(h)
    g.backward(dg)
    for mine, truth in zip(
        gelu_backward(dg, h.detach(), False), (g, h.grad, h.grad.sum(0)), strict=True
    ):
        torch.testing.assert_close(mine, truth.detach(), rtol=1e-12, atol=1e-12)


def test_every_tile_gives_the_same(monkeypatch):
    inputs = _norm_inputs(29, 100, SINGLE, branch=True, dsum=True)
    dg, h = _draw(2, 150, 64, seed=1).unbind()
    norm, gelu = _norms(inputs, SINGLE, None, triton=True), gelu_backward(dg, h, True)
    norm_tiles, gelu_tiles = launch.norm_tiles(100), launch.gelu_tiles(64)
    for i in range(1, max(len(norm_tiles), len(gelu_tiles))):
        monkeypatch.setattr(launch, "norm_tiles", lambda _, i=i: [norm_tiles[i % len(norm_tiles)]])
        monkeypatch.setattr(launch, "gelu_tiles", lambda _, i=i: [gelu_tiles[i % len(gelu_tiles)]])
        for a, b in zip(_norms(inputs, SINGLE, None, triton=True), norm, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        for a, b in zip(gelu_backward(dg, h, True), gelu, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_same_bits_every_time():
    inputs = _norm_inputs(63, 100, HALF, branch=True, dsum=True)
    for a, b in zip(*(_norms(inputs, HALF, HALF, triton=True) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("triton", [True, False])
def test_no_rows_at_all(triton):
    inputs = _norm_inputs(0, 32, HALF, branch=True, dsum=True)
    found = _norms(inputs, HALF, HALF, triton=triton)
    assert [t.shape for t in found[2:]] == [(0, 32), (0, 32), (0, 32), (3, 32)]
    assert not found[5].any()
    empty = torch.zeros(0, 64, device=DEVICE)
    assert not gelu_backward(empty, empty, triton)[2].any()


@pytest.mark.parametrize("triton", [True, False])
def test_opcheck(triton):
    inputs = _norm_inputs(5, 7, HALF, branch=True, dsum=True)
    forward = (inputs["x"], inputs["branch"], inputs["weight"], inputs["bias"], EPS, HALF, triton)
    torch.library.opcheck(torch.ops.fastmoco.block_norm.default, forward)
    mean, rstd = norm_forward(*forward)[2:]
    for narrow, branch in ((HALF, inputs["branch"]), (None, None)):
        given = (*(inputs | {"branch": branch}).values(), mean, rstd, narrow, triton)
        torch.library.opcheck(torch.ops.fastmoco.block_norm_backward.default, given)
    dg, h = _draw(2, 5, 8, seed=1).unbind()
    torch.library.opcheck(torch.ops.fastmoco.block_gelu_backward.default, (dg, h, triton))
    parts = _draw(3, 2, 3, 4, 8, seed=1).unbind()
    torch.library.opcheck(torch.ops.fastmoco.block_stack_qkv.default, (*parts, triton))


def test_kernels_are_not_for_float64_nor_for_a_cpu():
    assert not kernels_fit(torch.zeros(1, 8, dtype=torch.float64, device=DEVICE))
    assert not kernels_fit(torch.zeros(1, 8))
    assert not kernels_fit(torch.zeros(1, 4097, device=DEVICE))


@pytest.mark.gpu
@pytest.mark.parametrize("E", [384, 768])
def test_bf16_on_cuda_at_the_size_of_a_chunk(E):
    """256 images of 197 tokens."""
    bf16 = torch.bfloat16
    inputs = _norm_inputs(50432, E, bf16, branch=True, dsum=True)
    ours, torchs = (_norms(inputs, bf16, bf16, triton=triton) for triton in (True, False))
    _assert_as_good_as_torch(
        ours, torchs, _norms(_double(inputs), torch.float64, torch.float64, triton=False)
    )
    del inputs, ours, torchs
    dg, h = (_draw(25216, 4 * E, seed=seed, dtype=bf16) for seed in (1, 2))
    found = [list(gelu_backward(dg, h, triton)) for triton in (True, False)]
    _assert_as_good_as_torch(*found, list(gelu_backward(dg.double(), h.double(), False)))
