"""Residual add and layer norm in one pass: against float64 and torch's three operations, in value
and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoco_kernels import residual_norm
from fastmoco_kernels.residual_norm import launch

EPS = 1e-6
NAMES = ("x_new", "y", "dx", "dbranch", "dweight", "dbias")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _inputs(
    shape: tuple[int, ...],
    device: torch.device,
    *,
    x=torch.float32,
    branch=torch.float16,
    weight=None,
):
    """x, branch, weight, bias and the gradients to x_new and y, as values that the dtypes hold
    exactly."""
    generator = torch.Generator().manual_seed(sum(shape))
    E, weight = shape[-1], weight or torch.float32
    shapes = (
        (shape, x),
        (shape, branch),
        ((E,), weight),
        ((E,), weight),
        (shape, x),
        (shape, branch),
    )
    made = [
        torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype)
        for s, dtype in shapes
    ]
    made[0] = made[0] * 3 + 2  # a stream is neither centred nor of variance 1
    return made


def _all(
    inputs: list[Tensor], backend: str, out: torch.dtype, *, branch: bool = True
) -> list[Tensor]:
    """x_new, y and the gradients; without a branch its gradient is left out."""
    x, b, weight, bias, dx_new, dy = inputs
    x, b, weight, bias = (t.detach().requires_grad_() for t in (x, b, weight, bias))
    x_new, y = residual_norm(x, b if branch else None, weight, bias, EPS, out, backend=backend)
    torch.autograd.backward([x_new, y], [dx_new.to(x_new.dtype), dy.to(y.dtype)])
    return [
        x_new.detach(),
        y.detach(),
        x.grad,
        *([b.grad] if branch else []),
        weight.grad,
        bias.grad,
    ]


def _assert_as_good_as_torch(
    inputs: list[Tensor], out: torch.dtype, *, branch: bool = True
) -> None:
    """Twice the error of torch's own operations in these dtypes, or four units in float32's last
    place where those have none.

    A GPU's division and reciprocal root are good to two each.
    """
    truth = _all([t.double() for t in inputs], "reference", torch.float64, branch=branch)
    ours, torchs = (
        _all(inputs, backend, out, branch=branch) for backend in ("triton", "reference")
    )
    names = NAMES if branch else [name for name in NAMES if name != "dbranch"]
    for name, mine, other, exact in zip(names, ours, torchs, truth, strict=True):
        assert mine.dtype == other.dtype, name
        assert mine.shape == other.shape, name
        floor = 4 * torch.finfo(torch.float32).eps * exact.norm()
        error, allowed = (mine.double() - exact).norm(), 2 * (other.double() - exact).norm()
        assert error <= torch.maximum(allowed, floor), (name, float(error), float(allowed))


# one row; fewer rows than a tile; more than all programs take at a time, so that each goes through
# several; then widths: below a warp, odd, ViT-Ti to ViT-H, and one beyond which rows go one at a
# time
@pytest.mark.parametrize("rows", [1, 3, 63])
@pytest.mark.parametrize("E", [1, 7, 64, 101, 192, 384, 768, 1280])
def test_is_as_good_as_torch(rows, E, device):
    _assert_as_good_as_torch(_inputs((rows, E), device), torch.float16)


@pytest.mark.parametrize("E", [2100, 4096])
def test_the_widest_rows(E, device):
    _assert_as_good_as_torch(_inputs((3, E), device), torch.float16)


HALF, SINGLE = torch.float16, torch.float32


# no autocast; a branch of float32 under autocast; shards of weights in 16 bits; a stream of 16
# bits, whose sum with a branch of 32 is wider than itself
@pytest.mark.parametrize(
    ("x", "branch", "weight", "out"),
    [
        (SINGLE, SINGLE, SINGLE, SINGLE),
        (SINGLE, SINGLE, SINGLE, HALF),
        (SINGLE, HALF, HALF, HALF),
        (HALF, HALF, HALF, HALF),
        (HALF, SINGLE, SINGLE, HALF),
    ],
)
def test_every_combination_of_types(x, branch, weight, out, device):
    _assert_as_good_as_torch(_inputs((2, 9, 100), device, x=x, branch=branch, weight=weight), out)


@pytest.mark.parametrize("E", [100, 384])
def test_without_a_branch_it_is_the_plain_layer_norm_and_x_itself(E, device):
    inputs = _inputs((17, E), device)
    _assert_as_good_as_torch(inputs, torch.float16, branch=False)
    for backend in ("triton", "reference"):
        assert (
            residual_norm(inputs[0], None, inputs[2], inputs[3], EPS, backend=backend)[0]
            is inputs[0]
        )


@pytest.mark.parametrize("E", [100, 768])
def test_every_tile_that_tuning_may_pick_gives_the_same(E, device, monkeypatch):
    inputs = _inputs((29, E), device)
    default = _all(inputs, "triton", torch.float32)
    forward, backward = launch.forward_tiles(E), launch.backward_tiles(E)
    assert len(forward) == 4
    assert len(backward) == 3
    for i in range(len(forward)):
        monkeypatch.setattr(launch, "forward_tiles", lambda _, i=i: [forward[i]])
        monkeypatch.setattr(launch, "backward_tiles", lambda _, i=i: [backward[i % len(backward)]])
        for name, a, b in zip(NAMES, _all(inputs, "triton", torch.float32), default, strict=True):
            # dbranch is stored in half precision: one unit in its last place
            tolerance = 1e-3 if name == "dbranch" else 1e-5
            torch.testing.assert_close(a, b, rtol=tolerance, atol=1e-5)


def test_the_same_bits_every_time(device):
    inputs = _inputs((63, 192), device)
    for a, b in zip(_all(inputs, "triton", HALF), _all(inputs, "triton", HALF), strict=True):
        assert torch.equal(a, b)


def test_strided_inputs_and_gradients(device):
    """The class token's rows of [B, L, E]; turned matrices; a gradient that is one number,
    expanded."""
    inputs = _inputs((9, 100), device)
    plain = _all(inputs, "triton", SINGLE)
    sparse = [torch.stack([t, t * 0 - 7], 1)[:, 0] if t.dim() == 2 else t for t in inputs]
    turned = [
        t.mT.contiguous().mT if t.dim() == 2 else torch.stack([t, t], 1)[:, 0] for t in inputs
    ]
    assert not any(t.is_contiguous() for t in (sparse[0], *turned))
    for others in (sparse, turned):
        for a, b in zip(_all(others, "triton", SINGLE), plain, strict=True):
            assert torch.equal(a, b)
    one = torch.ones((), device=device)
    expanded, written_out = (
        [*inputs[:4], g, g] for g in (one.expand(9, 100), torch.ones(9, 100, device=device))
    )
    for a, b in zip(
        _all(expanded, "triton", SINGLE), _all(written_out, "triton", SINGLE), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("branch", [True, False])
def test_no_rows_at_all(backend, branch, device):
    found = _all(_inputs((0, 100), device), backend, HALF, branch=branch)
    assert found[0].shape == found[1].shape == found[2].shape == (0, 100)
    assert not found[-1].any()
    assert not found[-2].any()


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_one_of_the_two_results_alone(backend, device):
    """The last norm's stream is used by nobody, and a result may be left lying."""
    inputs = _inputs((5, 100), device)
    for used in (0, 1):
        leaves = [t.detach().requires_grad_() for t in inputs[:4]]
        out = residual_norm(*leaves, EPS, HALF, backend=backend)[used]
        out.backward(torch.ones_like(out))
        exact = [t.detach().double().requires_grad_() for t in inputs[:4]]
        wide = residual_norm(*exact, EPS, backend="reference")[used]
        wide.backward(torch.ones_like(wide))
        for mine, truth in zip(leaves, exact, strict=True):
            assert (mine.grad is None) == (truth.grad is None)
            if truth.grad is not None:
                torch.testing.assert_close(mine.grad.double(), truth.grad, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_y_is_the_norm_of_the_sum_as_it_is_stored(backend, device):
    """The backward has nothing else to go by."""
    x, branch, weight, bias, *_ = _inputs((9, 100), device, x=HALF)
    x_new, y = residual_norm(8 * x, branch, weight, bias, EPS, SINGLE, backend=backend)
    assert x_new.dtype == HALF
    assert torch.equal(y, residual_norm(x_new, None, weight, bias, EPS, SINGLE, backend=backend)[1])


def test_a_large_mean_costs_its_own_rounding_and_no_more(device):
    """The variance is that of what is left of a row: a difference of two large sums would lose 0.01
    here."""
    x, _, weight, bias, *_ = _inputs((5, 384), device)
    x += 1000
    exact = residual_norm(x.double(), None, weight.double(), bias.double(), EPS)[1]
    found = residual_norm(x, None, weight, bias, EPS, backend="triton")[1]
    unit = torch.finfo(torch.float32).eps * 1000 / x.std()
    assert (found - exact).abs().max() < 8 * unit * weight.abs().max()


def test_a_bad_value_stays_in_its_row(device):
    inputs = _inputs((9, 100), device)
    inputs[0][4, 50] = float("nan")
    x_new, y, dx, dbranch, dweight, dbias = _all(inputs, "triton", HALF)
    assert int(x_new.isnan().sum()) == 1
    for rows in (y, dx, dbranch):
        assert rows[4].isnan().all()
        assert not rows[[0, 1, 2, 3, 5, 6, 7, 8]].isnan().any()
    assert dweight.isnan().all()
    assert not dbias.isnan().any()


@pytest.mark.parametrize("out", [None, torch.bfloat16])
def test_the_reference_has_the_bits_of_the_operations_that_it_replaces(out):
    """A block on a CPU must not change by a bit when it takes this op: under autocast and without,
    bf16 branches too."""
    torch.manual_seed(0)
    x, branch = torch.randn(4, 7, 96), torch.randn(4, 7, 96, dtype=out or torch.float32)
    weight, bias, W = torch.randn(96), torch.randn(96), torch.randn(32, 96)

    def run(norm):
        leaves = [t.clone().requires_grad_() for t in (x, branch, weight, bias, W)]
        with torch.autocast("cpu", torch.bfloat16, enabled=out is not None):
            x_new, y = norm(*leaves[:4])
            result = F.linear(y, leaves[4])
        (result.float().square().sum() + x_new.square().sum()).backward()
        return [result, x_new, *(t.grad for t in leaves)]

    def operations(x, branch, weight, bias):
        return (x_new := x + branch), F.layer_norm(x_new, (96,), weight, bias, EPS)

    ours = run(lambda *inputs: residual_norm(*inputs, EPS))
    for a, b in zip(ours, run(operations), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_gradcheck_of_the_reference():
    inputs = [t.double().requires_grad_() for t in _inputs((3, 5), torch.device("cpu"))[:4]]
    assert torch.autograd.gradcheck(lambda *t: residual_norm(*t, EPS), inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("E", [384, 768])
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
def test_bf16_on_cuda_at_the_size_of_a_chunk(E, weight, device):
    """256 images of 197 tokens."""
    inputs = _inputs((50432, E), device, branch=torch.bfloat16, weight=weight)
    _assert_as_good_as_torch(inputs, torch.bfloat16)
    _assert_as_good_as_torch(inputs, torch.bfloat16, branch=False)


@pytest.mark.gpu
def test_more_elements_than_32_bits_count(device):
    rows, E = 2**31 // 1280 + 1000, 1280
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free memory")
    x = torch.zeros(rows, E, dtype=torch.bfloat16, device=device)
    x[-9:] = torch.randn(9, E, device=device)
    weight, bias = torch.randn(2, E, device=device)
    x.requires_grad_()
    y = residual_norm(x, None, weight, bias, EPS, backend="triton")[1]
    last = x.detach()[-9:].clone().requires_grad_()
    expected = residual_norm(last, None, weight, bias, EPS, backend="reference")[1]
    torch.testing.assert_close(y[-9:], expected)
    torch.testing.assert_close(y[:1], bias.to(torch.bfloat16)[None])
    dy = torch.zeros_like(y)
    dy[-9:] = 1
    y.backward(dy)
    expected.backward(torch.ones_like(expected))
    torch.testing.assert_close(x.grad[-9:], last.grad)
    assert not x.grad[:-9].any()
