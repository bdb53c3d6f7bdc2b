"""The gradient of the branch's bias, which the residual norm's backward sums: against the branch's
gradient and torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fastmoco_kernels import residual_norm
from fastmoco_kernels.residual_norm import launch
from fastmoco_kernels.residual_norm.cost import residual_norm_backward_bytes
from tests.kernels.touched_bytes import CountedKernel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-6
HALF, SINGLE = torch.float16, torch.float32


def _leaves(
    rows: int, E: int, branch: torch.dtype, bias: torch.dtype, x: torch.dtype = SINGLE
) -> list[Tensor]:
    """x, branch, weight, bias and the branch's bias."""
    generator = torch.Generator().manual_seed(rows + E)
    shapes = (((rows, E), x), ((rows, E), branch), ((E,), SINGLE), ((E,), SINGLE), ((E,), bias))
    made = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape, dtype in shapes]
    return [t.requires_grad_() for t in made]


def _run(
    leaves: list[Tensor],
    backend: str,
    out: torch.dtype,
    *,
    with_bias: bool = True,
    used: str = "both",
):
    """Every gradient, that of the branch's bias last."""
    *most, branch_bias = (t.detach().requires_grad_() for t in leaves)
    x_new, y = residual_norm(
        *most, EPS, out, branch_bias=branch_bias if with_bias else None, backend=backend
    )
    loss = (x_new.float().square().sum() if used != "y" else 0) + (
        y.float().square().sum() if used != "x_new" else 0
    )
    loss.backward()
    return [t.grad for t in (*most, branch_bias)]


def _assert_sums(dbias: Tensor, dbranch: Tensor) -> None:
    """To float32's rounding, then that of the bias's dtype."""
    rows = dbranch.double()
    eps = torch.finfo(dbias.dtype).eps if dbias.dtype != SINGLE else 0
    error = (dbias.double() - rows.sum(0)).abs()
    assert (error <= 1e-6 * rows.abs().sum(0) + eps * rows.sum(0).abs() + 1e-30).all()


# a branch of x's dtype, whose gradient is x's own tensor, and a narrower one; a stream of 16 bits;
# biases of both widths
@pytest.mark.parametrize(
    ("x", "branch", "bias"),
    [
        (SINGLE, HALF, SINGLE),
        (SINGLE, HALF, HALF),
        (SINGLE, SINGLE, SINGLE),
        (HALF, HALF, SINGLE),
        (HALF, SINGLE, SINGLE),
    ],
)
@pytest.mark.parametrize(("rows", "E"), [(1, 1), (3, 7), (41, 101)])
@pytest.mark.parametrize("used", ["both", "x_new", "y"])
def test_it_is_the_sum_of_the_branchs_gradient_as_rounded_and_changes_no_other(
    x, branch, bias, rows, E, used
):
    leaves = _leaves(rows, E, branch, bias, x)
    found = _run(leaves, "triton", HALF, used=used)
    assert (found[4].dtype, found[4].shape) == (bias, (E,))
    _assert_sums(found[4], found[1])
    for mine, without in zip(
        found[:4], _run(leaves, "triton", HALF, used=used, with_bias=False)[:4], strict=True
    ):
        assert (mine is None) == (without is None)
        assert mine is None or torch.equal(mine, without)


def test_wide_rows_and_none_at_all():
    for rows, E in ((9, 384), (1, 4096)):
        found = _run(_leaves(rows, E, HALF, SINGLE), "triton", HALF)
        _assert_sums(found[4], found[1])
    for backend in ("triton", "reference"):
        assert _run(_leaves(0, 8, HALF, SINGLE), backend, HALF)[4].tolist() == [0] * 8


@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float64, None), (SINGLE, None), (SINGLE, torch.bfloat16)]
)
def test_the_reference_has_the_bits_of_the_linear_layers_own_gradient(dtype, autocast):
    def run(own: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = ((4, 7, 24), (4, 7, 96), (24, 96), (24,), (24,), (24,), (8, 24))
        leaves = [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]
        x, hidden, W, branch_bias, weight, bias, V = leaves
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            branch = F.linear(hidden, W, branch_bias.detach() if own else branch_bias)
            x, y = residual_norm(
                x,
                branch,
                weight,
                bias,
                EPS,
                branch_bias=branch_bias if own else None,
                backend="reference",
            )
            out = F.linear(y, V)
        return list(torch.autograd.grad(out.square().sum() + x.square().sum(), leaves))

    for mine, torchs in zip(run(True), run(False), strict=True):
        assert mine.dtype == torchs.dtype
        assert torch.equal(mine, torchs)


def _block(
    x: Tensor, h: Tensor, weight: Tensor, bias: Tensor, branch_bias: Tensor, backend: str
) -> Tensor:
    W = torch.ones(h.shape[1], h.shape[1], dtype=h.dtype, device=h.device)
    branch = F.linear(h, W, branch_bias.detach().to(h.dtype))
    x, y = residual_norm(
        x, branch, weight, bias, EPS, HALF, branch_bias=branch_bias, backend=backend
    )
    return x.square().sum() + y.float().square().sum()


def _gradients(function, backend: str) -> list[Tensor]:
    leaves = _leaves(5, 7, HALF, SINGLE)
    return list(torch.autograd.grad(function(*leaves, backend), leaves))


@pytest.mark.parametrize("backend", ["triton", "reference", "auto"])
def test_compiles_to_one_graph_with_the_same_numbers(backend):
    """Of a graph "auto" means the reference, on a GPU too."""
    compiled = torch.compile(_block, fullgraph=True, backend="aot_eager")
    same = "reference" if backend == "auto" else backend
    for a, b in zip(_gradients(compiled, backend), _gradients(_block, same), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_checkpoint_changes_no_bit(backend):
    def forgetful(*arguments):
        return checkpoint(_block, *arguments, use_reentrant=False)

    for a, b in zip(_gradients(forgetful, backend), _gradients(_block, backend), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bias", [SINGLE, HALF])
def test_opcheck(bias):
    x, b, weight, norm_bias, branch_bias = _leaves(5, 7, HALF, bias)
    given = (x, b, weight, norm_bias, EPS, HALF, branch_bias)
    torch.library.opcheck(torch.ops.fastmoco.residual_norm.default, given)
    with torch.no_grad():
        x_new, y, mean, rstd = torch.ops.fastmoco.residual_norm(*given)
    arguments = (y, x_new * 2, x_new, weight.detach(), mean, rstd, SINGLE, HALF, bias)
    torch.library.opcheck(torch.ops.fastmoco.residual_norm_backward.default, arguments)


def test_nothing_more_is_kept_and_a_bias_that_wants_no_gradient_gets_none():
    def kept(with_bias: bool) -> list[tuple[int, ...]]:
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t
        ):
            x, b, weight, bias, branch_bias = (
                torch.zeros(s, device=DEVICE) for s in ((5, 8), (5, 8), 8, 8, 8)
            )
            residual_norm(
                x.requires_grad_(),
                b,
                weight,
                bias,
                EPS,
                branch_bias=branch_bias if with_bias else None,
                backend="triton",
            )
        return shapes

    real = kept(True)
    assert real == kept(False)
    with FakeTensorMode():
        assert kept(True) == real
    *most, branch_bias = _leaves(5, 8, HALF, SINGLE)
    for backend in ("triton", "reference"):
        constant = branch_bias.detach()
        residual_norm(*most, EPS, HALF, branch_bias=constant, backend=backend)[1].sum().backward()
        assert constant.grad is None


@pytest.mark.parametrize(
    ("branch", "bias", "text"),
    [
        (torch.zeros(3, 8), torch.zeros(7), r"branch is \(3, 8\) but its bias is \(7,\)"),
        (
            torch.zeros(3, 8),
            torch.zeros(8, device="meta"),
            "branch is on cpu but its bias is on meta",
        ),
        (torch.zeros(3, 8), torch.zeros(8, dtype=torch.int8), "its bias is torch.int8"),
        (None, torch.zeros(8), r"branch is None but branch_bias is \(8,\)"),
    ],
)
def test_errors_name_both_sides(branch, bias, text):
    with pytest.raises(ValueError, match=text):
        residual_norm(
            torch.zeros(3, 8), branch, torch.zeros(8), torch.zeros(8), EPS, branch_bias=bias
        )


def test_the_byte_model_counts_the_tensors_that_the_launches_touch(monkeypatch):
    touched: list[int] = []
    x, b, weight, bias, branch_bias = _leaves(63, 384, HALF, SINGLE)
    x_new, y = residual_norm(
        x, b, weight, bias, EPS, HALF, branch_bias=branch_bias, backend="triton"
    )
    for name in ("residual_norm_bwd_kernel", "residual_norm_sum_kernel"):
        monkeypatch.setattr(launch, name, CountedKernel(getattr(launch, name), touched))
    (y.float().square().sum() + x_new.sum()).backward()
    programs = launch.programs_of(63, launch.backward_tiles(384)[0], DEVICE)
    assert sum(touched) == residual_norm_backward_bytes(63, 384, programs=programs, branch_bias=4)


@pytest.mark.gpu
@pytest.mark.parametrize("E", [384, 768])
@pytest.mark.parametrize("bias", [SINGLE, torch.bfloat16])
@pytest.mark.parametrize(
    "deterministic", [True, False]
)  # the default tile, and the one that tuning picks
def test_bf16_on_cuda_at_the_size_of_a_chunk(E, bias, deterministic):
    """256 images of 197 tokens."""
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    leaves = _leaves(50432, E, torch.bfloat16, bias)
    found = _run(leaves, "triton", torch.bfloat16)
    _assert_sums(found[4], found[1])
    for mine, other in zip(found[:2], _run(leaves, "reference", torch.bfloat16)[:2], strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-2, atol=2e-2)
