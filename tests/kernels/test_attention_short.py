"""The Triton kernels for short sequences: against float64 and torch's own attention, in value and
every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.aot.attention import aot_cases
from fastmoco_kernels import attention
from fastmoco_kernels.attention import launch, short
from fastmoco_kernels.attention.choice import TRITON_DTYPES, triton_fault
from fastmoco_kernels.attention.cost import attention_bytes

WIDE = torch.bfloat16 if torch.cuda.is_available() else torch.float32
"""Compiled kernels take 16 bits alone; the interpreter cannot hold bf16, and float32 shows its
arithmetic best."""


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _inputs(
    L: int, M: int, d: int, dtype: torch.dtype, device: torch.device, *, B: int = 1, A: int = 2
) -> list[Tensor]:
    """q, k, v and the gradient that comes back, as values that ``dtype`` holds exactly."""
    generator = torch.Generator().manual_seed(1000 * L + M)
    rows = (L, M, M, L)
    return [
        torch.randn(B, A, n, d, generator=generator, dtype=torch.float64).to(device, dtype)
        for n in rows
    ]


def _all(inputs: list[Tensor], backend: str, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Output and the three gradients."""
    *leaves, grad = (t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs)
    out = attention(*leaves, backend=backend)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def _cancelled(inputs: list[Tensor]) -> tuple[float, float]:
    """Norms of what cancels in dq and dk over a single key: its weight is 1 whatever they are, so
    both gradients are differences of equal numbers, s (g v - g v) k and s (g v - g v) q. How much
    rounding leaves of them is the processor's choice: the order in which it adds up g v."""
    q, k, v, grad = (t.double() for t in inputs)
    if k.shape[-2] > 1:
        return 0.0, 0.0
    both = 2 * q.shape[-1] ** -0.5 * (grad @ v.mT).abs()
    return (both @ k.abs()).norm().item(), (both.mT @ q.abs()).norm().item()


def _assert_as_good_as_torch(inputs: list[Tensor]) -> None:
    """Twice the error of torch's own attention in this dtype, or a few units in the last place
    where that has none."""
    truth = _all(inputs, "reference", torch.float64)
    ours, torchs = _all(inputs, "triton"), _all(inputs, "sdpa")
    dq, dk = _cancelled(inputs)
    for name, lost, mine, other, exact in zip(
        ("out", "dq", "dk", "dv"), (0.0, dq, dk, 0.0), ours, torchs, truth, strict=True
    ):
        least = exact.norm() + 0.1 * exact.numel() ** 0.5 + lost
        floor = 4 * torch.finfo(mine.dtype).eps * least
        error, allowed = (mine.double() - exact).norm(), 2 * (other.double() - exact).norm()
        assert error <= torch.maximum(allowed, floor), (name, float(error), float(allowed))


# a class token; one tile exactly; a 28 pixel picture's 50; around 64; 145 of 192 pixels; 196 and
# 197 of 224; all that fits; then the class token alone over 197, and unequal numbers that end in
# different tiles
SIZES = [(n, n) for n in (1, 16, 50, 64, 65, 145, 196, 197, 256)]
SIZES += [(1, 197), (16, 256), (197, 1), (65, 64), (50, 196)]


@pytest.mark.parametrize(("L", "M"), SIZES)
@pytest.mark.parametrize(("d", "dtype"), [(32, WIDE), (64, torch.float16)])
def test_is_as_good_as_torch(L, M, d, dtype, device):
    _assert_as_good_as_torch(_inputs(L, M, d, dtype, device, A=1))


@pytest.mark.parametrize(("d", "dtype"), [(32, torch.float16), (64, WIDE)])
def test_several_images_and_heads(d, dtype, device):
    _assert_as_good_as_torch(_inputs(65, 50, d, dtype, device, B=2, A=2))


@pytest.mark.gpu
@pytest.mark.parametrize("d", [32, 64])
@pytest.mark.parametrize(("L", "M"), [(197, 197), (1, 197), (256, 256), (64, 65)])
def test_bf16_on_cuda(d, L, M, device):
    _assert_as_good_as_torch(_inputs(L, M, d, torch.bfloat16, device, B=4, A=12))


def test_reads_a_packed_projection_where_it_lies_and_leaves_rows_together(device):
    """qkv is [B, L, 3, A, d] as a linear layer leaves it; the next one wants [B, L, A d]."""
    B, L, A, d = 2, 65, 2, 32
    *_, grad = _inputs(L, L, d, WIDE, device, B=B, A=A)
    qkv = torch.randn(B, L, 3, A, d, device=device, dtype=WIDE, requires_grad=True)
    out = attention(*qkv.permute(2, 0, 3, 1, 4).unbind(), backend="triton")
    assert out.transpose(1, 2).is_contiguous()
    out.backward(grad)
    copied = qkv.detach().permute(2, 0, 3, 1, 4).contiguous()
    plain = _all([*copied, grad], "triton")
    assert torch.equal(out, plain[0])
    assert torch.equal(qkv.grad.permute(2, 0, 3, 1, 4), torch.stack(plain[1:]))


def test_any_other_layout_is_copied(device):
    q, k, v, grad = _inputs(50, 50, 32, WIDE, device)
    turned = [t.mT.contiguous().mT for t in (q, k, v, grad)]
    assert all(t.stride(3) != 1 for t in turned)
    for a, b in zip(_all(turned, "triton"), _all([q, k, v, grad], "triton"), strict=True):
        assert torch.equal(a, b)


def test_the_same_bits_every_time(device):
    inputs = _inputs(197, 197, 32, torch.float16, device)
    for a, b in zip(_all(inputs, "triton"), _all(inputs, "triton"), strict=True):
        assert torch.equal(a, b)


def _cuts(cuts: tuple[launch.Rows, ...]) -> list[int]:
    """A number of rows for each cut: the most that take it."""
    return [sum(rows) if rows != launch.VIT_ROWS else 197 for rows in cuts]


@pytest.mark.parametrize("d", [32, 64])
@pytest.mark.parametrize("M", _cuts(launch.KEY_ROWS))
def test_every_tile_of_the_forward(M, d, device, monkeypatch):
    """Tests take defaults alone, so every tile that tuning may pick on any chip is run by name:
    against float64."""
    q, k, v, _ = _inputs(197 if M == 197 else 20, M, d, WIDE, device, A=1)
    exact = attention(*(t.double() for t in (q, k, v)), backend="reference")
    keys = launch.row_tiles(M, launch.KEY_ROWS)
    tiles = {
        tile for chip in _chips(device) for tile in launch.forward_tiles(chip, d, q.shape[2], keys)
    }
    assert len(tiles) == (1 if M != 197 else len(_tiles_of_197(device)))
    for tile in sorted(tiles):
        monkeypatch.setattr(launch, "forward_tiles", lambda *_, tile=tile: [tile])
        out = attention(q, k, v, backend="triton")
        assert (out.double() - exact).norm() <= _tolerance(out) * exact.norm(), tile


@pytest.mark.parametrize("d", [32, 64])
@pytest.mark.parametrize("L", _cuts(launch.QUERY_ROWS))
def test_every_tile_of_the_backward(L, d, device, monkeypatch):
    inputs = _inputs(L, 197 if L == 197 else 20, d, WIDE, device, A=1)
    exact = _all(inputs, "reference", torch.float64)
    rows = launch.row_tiles(L, launch.QUERY_ROWS)
    for tile in sorted(
        {tile for chip in _chips(device) for tile in launch.backward_tiles(chip, d, rows)}
    ):
        monkeypatch.setattr(launch, "backward_tiles", lambda *_, tile=tile: [tile])
        for name, mine, true in zip(
            ("out", "dq", "dk", "dv"), _all(inputs, "triton"), exact, strict=True
        ):
            assert (mine.double() - true).norm() <= _tolerance(mine) * true.norm(), (name, tile)


def _chips(device: torch.device) -> tuple[int, ...]:
    """Those whose tiles run here: the own ones on a GPU, all in the interpreter."""
    return launch.CHIPS if device.type == "cpu" else (launch._chip(device),)


def _tiles_of_197(device: torch.device) -> set[launch.Tile]:
    plain = {(64, 0, 4, 1), (128, 0, 8, 1)}
    return plain | {(64, 16, 4, 1)} if 90 in _chips(device) else plain


def _tolerance(found: Tensor) -> float:
    """Relative to the whole tensor: bf16 rounds weights and results to 2^-9, float32 adds some
    hundred terms."""
    return 1e-5 if found.dtype == torch.float32 else 1e-2


def test_float32_has_no_tiles_and_is_refused_on_cuda():
    """The choice lets in what is compiled ahead of time, and no more."""
    compiled = {case.signature["q_ptr"] for case in aot_cases()}
    assert compiled == {"*bf16", "*fp16"}
    assert set(TRITON_DTYPES) == {torch.bfloat16, torch.float16}
    cuda = torch.device("cuda")
    assert triton_fault(cuda, torch.bfloat16, 197, 197, 64) == ""
    assert "registers" in triton_fault(cuda, torch.float32, 197, 197, 64)
    assert (
        triton_fault(torch.device("cpu"), torch.float32, 197, 197, 64) == ""
    )  # in the interpreter


@pytest.mark.gpu
def test_float32_on_cuda_says_why_it_is_refused_compiled_callers_too(device):
    q = torch.ones(1, 2, 197, 64, device=device)
    with pytest.raises(
        ValueError, match=r"backend='triton': float32 operands.*registers.*backend='auto'"
    ):
        attention(q, q, q, backend="triton")
    with pytest.raises(ValueError, match="float32 operands"):
        torch.ops.fastmoco.short_attention(q, q, q)


@pytest.mark.parametrize("dtype", [WIDE, torch.float16])
def test_queries_in_halves_on_ampere(dtype, device, monkeypatch):
    monkeypatch.setattr(launch, "_chip", lambda _: 80)
    assert launch.in_halves(80, 64, 209)
    assert not any(
        launch.in_halves(*other) for other in ((80, 64, 208), (80, 32, 256), (90, 64, 256))
    )
    inputs = _inputs(210, 20, 64, dtype, device)
    _assert_as_good_as_torch(inputs)
    out, lse = torch.ops.fastmoco.short_attention(*inputs[:3])
    gradients = torch.ops.fastmoco.short_attention_backward(inputs[3], *inputs[:3], out, lse)
    assert all(t.transpose(1, 2).is_contiguous() for t in gradients)


def test_only_the_last_tile_of_keys_is_partly_empty():
    """The forward masks the last tile alone."""
    for rows in range(1, 257):
        used = [n for n in launch.row_tiles(rows, launch.KEY_ROWS) if n]
        assert sum(used[:-1]) < rows <= sum(used), rows
        assert rows <= sum(launch.row_tiles(rows, launch.QUERY_ROWS))
    assert (
        sum(launch.row_tiles(197, launch.KEY_ROWS))
        == sum(launch.row_tiles(197, launch.QUERY_ROWS))
        == 208
    )


@pytest.mark.filterwarnings(
    "ignore:overflow encountered in exp2"
)  # of those columns, before they are cut
def test_scores_far_from_zero(device):
    """exp2(-lse) is infinite for a column of zeros here: columns beyond the keys must be cut, not
    multiplied by 0."""
    q, k, v, grad = _inputs(5, 5, 32, WIDE, device)
    far = [30 + q, -30 + 0.01 * k, v, grad]
    large = [100 * q, 100 * k, v, grad]  # a softmax of zeros and ones
    rounding = 1e-4 if torch.float32 == WIDE else 3e-2
    for inputs in (far, large):
        for found, exact in zip(
            _all(inputs, "triton"), _all(inputs, "reference", torch.float64), strict=True
        ):
            assert found.isfinite().all()
            assert (found.double() - exact).norm() <= rounding * (
                exact.norm() + 30 * exact.numel() ** 0.5
            )


def test_a_bad_value_stays_in_its_row_and_head(device):
    q, k, v, _ = _inputs(20, 20, 32, WIDE, device)
    q[0, 1, 3] = float("nan")
    out = attention(q, k, v, backend="triton")
    assert out[0, 1, 3].isnan().all()
    assert out.isnan().sum() == 32


def test_opcheck(device):
    q, k, v, grad = _inputs(5, 7, 32, WIDE, device)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(torch.ops.fastmoco.short_attention.default, leaves)
    strided = torch.randn(1, 5, 3, 2, 32, device=device, dtype=WIDE).permute(2, 0, 3, 1, 4).unbind()
    torch.library.opcheck(torch.ops.fastmoco.short_attention.default, strided)
    out, lse = torch.ops.fastmoco.short_attention(q, k, v)
    torch.library.opcheck(
        torch.ops.fastmoco.short_attention_backward.default, (grad, q, k, v, out, lse)
    )


def test_lse_is_the_logarithm_of_the_denominator(device):
    q, k, v, _ = _inputs(17, 20, 64, WIDE, device)
    lse = torch.ops.fastmoco.short_attention(q, k, v)[1]
    exact = (q.double() @ k.double().mT / 8).logsumexp(-1) / torch.tensor(2.0).double().log()
    torch.testing.assert_close(lse.double(), exact, rtol=2e-6, atol=2e-6)
    assert not lse.requires_grad


def test_compiles_without_a_break_forward_and_backward(device):
    inputs = _inputs(5, 7, 32, WIDE, device)
    eager = _all(inputs, "triton")
    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    *leaves, grad = (t.clone().requires_grad_() for t in inputs)
    out = compiled(*leaves)
    out.backward(grad)
    for a, b in zip([out, *(leaf.grad for leaf in leaves)], eager, strict=True):
        assert torch.equal(a, b)


def test_autocast_casts_as_torch_does_for_its_own(device):
    """fp16, because the interpreter cannot hold bf16."""
    q, k, v, _ = _inputs(5, 7, 32, torch.float32, device)
    with torch.autocast(device.type, dtype=torch.float16):
        found = attention(q, k, v, backend="triton")
    assert found.dtype == torch.float16
    assert torch.equal(found, attention(q.half(), k.half(), v.half(), backend="triton"))


@pytest.mark.parametrize(
    ("shape", "dtype", "text"),
    [
        ((1, 1, 5, 48), torch.float32, r"head dimension 48 is none of \(32, 64\)"),
        ((1, 1, 257, 32), torch.float32, "257 queries and 257 keys, where at most 256 fit"),
        ((1, 1, 5, 32), torch.float64, "float64 is none of bfloat16, float16"),
    ],
)
def test_errors_name_both_numbers(shape, dtype, text):
    q = torch.ones(shape, dtype=dtype)
    with pytest.raises(ValueError, match=text):
        attention(q, q, q, backend="triton")
    with pytest.raises(ValueError, match="256 rows on chip; 300"):
        launch.row_tiles(300, launch.KEY_ROWS)


@pytest.mark.parametrize(("L", "M"), [(197, 197), (1, 197), (50, 196)])
def test_the_byte_model_counts_the_tensors_that_a_launch_touches(L, M, device, monkeypatch):
    q, k, v, grad = _inputs(L, M, 32, torch.float16, device)
    touched: list[int] = []
    for name in ("short_attention_fwd_kernel", "short_attention_bwd_kernel"):
        kernel = _Counting(getattr(launch, name), touched)
        monkeypatch.setattr(launch, name, kernel)
    out, lse = short._short_attention(q, k, v)
    assert touched.pop() == attention_bytes(1, 2, L, M, 32, 2)
    short._short_attention_backward(grad, q, k, v, out, lse)
    assert touched.pop() == attention_bytes(1, 2, L, M, 32, 2, backward=True)


class _Counting:
    """A kernel that adds up the bytes of every tensor that one launch is given."""

    def __init__(self, kernel, touched: list[int]) -> None:
        self.kernel, self.touched = kernel, touched

    def __getitem__(self, grid):
        def launched(*arguments, **options):
            self.touched.append(sum(t.nbytes for t in arguments if isinstance(t, Tensor)))
            return self.kernel[grid](*arguments, **options)

        return launched
