"""GELU that takes over the bias's gradient: against float64, against torch's linear layer, and as
torch sees it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fastmoco_kernels import _bias_gradient, gelu
from fastmoco_kernels.column_sums import launch as sums
from fastmoco_kernels.gelu_bias import launch
from fastmoco_kernels.gelu_bias.cost import eager_backward_bytes, gelu_backward_bytes, gelu_bytes
from tests.kernels.touched_bytes import CountedKernel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF, SINGLE = torch.float16, torch.float32


def _inputs(
    shape: tuple[int, ...], dtype: torch.dtype = SINGLE, bias: torch.dtype = SINGLE
) -> list[Tensor]:
    """h, bias and the gradient to the result."""
    generator = torch.Generator().manual_seed(sum(shape))
    h, b, dy = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in (shape, shape[-1:], shape)
    )
    return [(h * 2).to(DEVICE, dtype), b.to(DEVICE, bias), dy.to(DEVICE, dtype)]


def _all(inputs: list[Tensor], backend: str, *, with_bias: bool = True) -> list[Tensor]:
    """The result, dh and dbias."""
    h, bias = (t.detach().requires_grad_() for t in inputs[:2])
    out = gelu(h, bias if with_bias else None, backend=backend)
    out.backward(inputs[2].to(out.dtype))
    assert (bias.grad is not None) == with_bias
    return [out.detach(), h.grad, *([bias.grad] if with_bias else [])]


def _assert_right(inputs: list[Tensor], *, with_bias: bool = True) -> None:
    """Value and dh: twice torch's error, or four units of float32: a GPU is good to two. dbias: the
    sum of dh as rounded."""
    truth = _all([t.double() for t in inputs], "reference", with_bias=with_bias)
    ours, torchs = (
        _all(inputs, backend, with_bias=with_bias) for backend in ("triton", "reference")
    )
    for mine, other, exact in zip(ours[:2], torchs[:2], truth[:2], strict=True):
        assert (mine.dtype, mine.shape) == (other.dtype, other.shape)
        floor = 4 * torch.finfo(SINGLE).eps * exact.norm()
        assert (mine.double() - exact).norm() <= torch.maximum(
            2 * (other.double() - exact).norm(), floor
        )
    if with_bias:
        assert ours[2].dtype == inputs[1].dtype
        rounded = ours[1].double().reshape(-1, inputs[1].numel())
        # float32's rounding, as if each row's were added up in the worst way, then that of the
        # bias's dtype
        error = (ours[2].double() - rounded.sum(0)).abs()
        eps = torch.finfo(ours[2].dtype).eps if ours[2].dtype != SINGLE else 0
        assert (error <= 1e-6 * rounded.abs().sum(0) + eps * rounded.sum(0).abs() + 1e-30).all()


# one row; fewer than a tile; so many that every program goes through several tiles (the narrow ones
# share 24 programs), then widths: below a block of columns, odd, a block and a bit, ViT-Ti's and
# ViT-S's
@pytest.mark.parametrize(
    ("rows", "F"),
    [(1, 1), (1, 1536), (3, 7), (3, 768), (801, 33), (401, 100), (101, 257), (63, 1536)],
)
@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize("with_bias", [True, False])
def test_is_as_good_as_torch(rows, F, dtype, with_bias):
    _assert_right(_inputs((rows, F), dtype), with_bias=with_bias)


@pytest.mark.parametrize("bias", [SINGLE, HALF])
def test_a_batch_of_tokens_and_a_narrow_bias(bias):
    _assert_right(_inputs((2, 9, 100), HALF, bias))


def test_far_out_the_gradient_is_0_or_that_of_the_identity():
    h = torch.tensor([[-60000.0, -40, -6, 0, 6, 40, 60000]], device=DEVICE).to(HALF)
    dh = _all([h, h[0].float(), torch.ones_like(h)], "triton")[1]
    assert dh.flatten().tolist() == pytest.approx([0, 0, 0, 0.5, 1, 1, 1], abs=1e-6)


def _through_linear(own: bool, dtype: torch.dtype, autocast: torch.dtype | None) -> list[Tensor]:
    """Every gradient of two layers with a GELU between them; ``own``: the bias's gradient comes
    from it."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 7, 24), (96, 24), (96,), (24, 96))
    x, W, bias, V = (
        torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes
    )
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        h = F.linear(x, W, bias.detach() if own else bias)
        out = F.linear(gelu(h, bias, backend="reference") if own else F.gelu(h), V)
    return list(torch.autograd.grad(out.square().sum(), (x, W, bias, V)))


@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float64, None), (SINGLE, None), (SINGLE, torch.bfloat16)]
)
def test_the_reference_has_the_bits_of_the_linear_layers_own_gradient(dtype, autocast):
    for mine, torchs in zip(
        _through_linear(True, dtype, autocast), _through_linear(False, dtype, autocast), strict=True
    ):
        assert mine.dtype == torchs.dtype
        assert torch.equal(mine, torchs)


def test_every_tile_that_tuning_may_pick_gives_the_same(monkeypatch):
    inputs = _inputs((101, 257), HALF)
    default = _all(inputs, "triton")
    for tile in launch.tiles(257)[1:]:
        monkeypatch.setattr(launch, "tiles", lambda _, tile=tile: [tile])
        out, dh, dbias = _all(inputs, "triton")
        assert torch.equal(out, default[0])
        torch.testing.assert_close(dh, default[1], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(dbias, default[2], rtol=1e-5, atol=1e-4)


def test_the_same_bits_every_time():
    for a, b in zip(*(_all(_inputs((101, 257), HALF), "triton") for _ in range(2)), strict=True):
        assert torch.equal(a, b)


def test_strided_inputs_and_gradients():
    inputs = _inputs((9, 100))
    plain = _all(inputs, "triton")
    turned = [
        t.mT.contiguous().mT if t.dim() == 2 else torch.stack([t, t], 1)[:, 0] for t in inputs
    ]
    assert not any(t.is_contiguous() for t in turned)
    found = _all(turned, "triton")
    torch.testing.assert_close(
        found[0], plain[0]
    )  # torch's own forward on a CPU: other instructions for other strides
    for a, b in zip(found[1:], plain[1:], strict=True):
        assert torch.equal(a, b)
    one = torch.ones((), device=DEVICE)
    for a, b in zip(
        *(_all([*inputs[:2], g], "triton") for g in (one.expand(9, 100), one.repeat(9, 100))),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_no_rows_at_all(backend):
    out, dh, dbias = _all(_inputs((0, 100)), backend)
    assert out.shape == dh.shape == (0, 100)
    assert dbias.tolist() == [0] * 100


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_bias_that_wants_no_gradient_gets_none(backend):
    h, bias, dy = _inputs((3, 8))
    h.requires_grad_()
    gelu(h, bias, backend=backend).backward(dy)
    assert bias.grad is None
    bias.requires_grad_()
    gelu(h.detach(), bias, backend=backend).backward(dy)  # and h may want none where the bias does
    assert bias.grad is not None
    with torch.no_grad():
        assert not gelu(h, bias, backend=backend).requires_grad


def _layers(x: Tensor, W: Tensor, bias: Tensor, backend: str) -> Tensor:
    return gelu(F.linear(x, W, bias.detach()), bias, backend=backend).square().sum()


def _gradients(function, backend: str) -> list[Tensor]:
    x, _, _ = _inputs((5, 6))
    W, _, _ = _inputs((9, 6))
    leaves = [x.requires_grad_(), W.requires_grad_(), torch.ones(9, device=DEVICE).requires_grad_()]
    return list(torch.autograd.grad(function(*leaves, backend), leaves))


@pytest.mark.parametrize("backend", ["triton", "reference", "auto"])
def test_compiles_to_one_graph_with_the_same_numbers(backend):
    compiled = torch.compile(_layers, fullgraph=True, backend="aot_eager")
    for a, b in zip(_gradients(compiled, backend), _gradients(_layers, backend), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_checkpoint_changes_no_bit(backend):
    def forgetful(*arguments):
        return checkpoint(_layers, *arguments, use_reentrant=False)

    for a, b in zip(_gradients(forgetful, backend), _gradients(_layers, backend), strict=True):
        assert torch.equal(a, b)


def test_auto_takes_the_kernel_where_triton_runs_in_a_compiled_graph_too(monkeypatch):
    torch._dynamo.reset()  # a constant is not guarded: graphs of other tests would be taken
    # as what decides on CUDA: no graph compiler looks into it, so it must be a constant
    monkeypatch.setattr(
        _bias_gradient, "triton_is_default", lambda device: Path(os.devnull).exists()
    )
    taken = []
    real = launch.backward
    monkeypatch.setattr(launch, "backward", lambda *given: taken.append(given) or real(*given))
    compiled = torch.compile(_layers, fullgraph=True, backend="aot_eager")
    for number, function in enumerate((_layers, compiled)):
        _gradients(function, "auto")
        assert len(taken) == number + 1
    h, bias, _ = (t.double() for t in _inputs((3, 8)))
    gelu(h.requires_grad_(), bias).sum().backward()
    assert len(taken) == 2
    torch._dynamo.reset()


@pytest.mark.parametrize("bias_dtype", [SINGLE, HALF, None])
def test_opcheck(bias_dtype):
    h, _, dy = _inputs((5, 7), HALF)
    torch.library.opcheck(torch.ops.fastmoco.gelu_backward.default, (dy, h, bias_dtype))


def _saved(h: Tensor, bias: Tensor) -> list[tuple[torch.dtype, tuple[int, ...], int]]:
    kept = []

    def pack(t: Tensor) -> Tensor:
        kept.append((t.dtype, tuple(t.shape), t.untyped_storage().nbytes()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        gelu(h.requires_grad_(), bias.requires_grad_(), backend="triton")
    return kept


def test_fake_tensors_keep_what_real_ones_keep_which_is_h():
    real = _saved(torch.zeros(6, 100, dtype=HALF, device=DEVICE), torch.zeros(100, device=DEVICE))
    with FakeTensorMode():
        fake = _saved(
            torch.zeros(6, 100, dtype=HALF, device=DEVICE), torch.zeros(100, device=DEVICE)
        )
    assert fake == real == [(HALF, (6, 100), 1200)]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ((torch.zeros(3, 8), torch.zeros(7)), r"h is \(3, 8\) but its bias is \(7,\)"),
        ((torch.zeros(3, 8), torch.zeros(8, device="meta")), "h is on cpu but its bias is on meta"),
        ((torch.zeros(3, 8), torch.zeros(8, dtype=torch.int8)), "its bias is torch.int8"),
        ((torch.zeros(3, 8, dtype=torch.int8),), "h is torch.int8"),
        ((torch.zeros(()),), r"h is torch.float32 \(\)"),
        ((torch.zeros(3, 8), None, "cuda"), "backend='cuda' is none of"),
        ((torch.zeros(3, 8).double(), None, "triton"), "h is torch.float64"),
    ],
)
def test_errors_name_both_sides(given, text):
    with pytest.raises(ValueError, match=text):
        gelu(*given[:2], backend=given[2] if len(given) > 2 else "auto")


@pytest.mark.parametrize("bias", [SINGLE, HALF, None])
def test_the_byte_model_counts_the_tensors_that_the_launches_touch(bias, monkeypatch):
    touched: list[int] = []
    for module, name in ((launch, "gelu_bwd_kernel"), (sums, "column_sum_kernel")):
        monkeypatch.setattr(module, name, CountedKernel(getattr(module, name), touched))
    rows, width = 63, 1536
    h, _, dy = _inputs((rows, width), HALF)
    launch.backward(dy, h, bias)
    programs = launch.programs_of(rows, width, launch.tiles(width)[0], DEVICE)
    assert sum(touched) == gelu_backward_bytes(
        rows, width, bias=0 if bias is None else bias.itemsize, programs=programs
    )
    R = 256 * 197
    assert gelu_bytes(R, width) == 4 * R * width
    assert gelu_backward_bytes(R, width, bias=4, programs=176) == pytest.approx(
        6 * R * width, rel=5e-3
    )
    assert eager_backward_bytes(R, width) == 8 * R * width


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [SINGLE, torch.bfloat16])
@pytest.mark.parametrize(
    "deterministic", [True, False]
)  # the default tile, and the one that tuning picks
def test_bf16_on_cuda_at_the_size_of_a_chunk(bias, deterministic):
    """256 images of 197 tokens."""
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    inputs = _inputs((50432, 1536), torch.bfloat16, bias)
    _assert_right(inputs)
    _assert_right(inputs, with_bias=False)


@pytest.mark.gpu
def test_a_compiled_layer_on_cuda_takes_the_kernel(monkeypatch):
    taken = []
    real = launch.backward
    monkeypatch.setattr(launch, "backward", lambda *given: taken.append(given) or real(*given))
    compiled = torch.compile(_layers, fullgraph=True, dynamic=False)
    for a, b in zip(_gradients(compiled, "auto"), _gradients(_layers, "reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert len(taken) == 1
