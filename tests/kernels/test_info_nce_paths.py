"""The chunked path and the kernels (in the interpreter where there is no GPU) against the
definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from fastmoco_kernels.info_nce import cost
from fastmoco_kernels.info_nce.chunked import TILE_CPU, OnePass, Request, info_nce_chunked
from fastmoco_kernels.info_nce.op import info_nce_loss, symmetric_info_nce_loss
from fastmoco_kernels.info_nce.reference import info_nce_reference, positive_ranks_reference
from fastmoco_kernels.info_nce.tiles import FAMILIES, Tile, candidates, key_splits

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Relative errors. Operands are rounded to 2^-11 (tf32, fp16): at temperature 0.07 a cosine's error
# of 1e-4 is one of 1.5e-3 in its term, and a few terms make a row. float32: products of 256 terms,
# and exponents up to 30.
TOLERANCE = {
    "fp32": (2e-6, 4e-6),
    "tf32": (1e-3, 2e-3),
    "fp16": (1e-3, 2e-3),
    "chunked": (2e-6, 4e-6),
}


def _data(rows: int, keys: int, dim: int, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positives at a cosine around 0.7, rows of lengths far from 1; float64."""
    generator = torch.Generator().manual_seed(rows + keys)
    q = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    k = torch.randn(keys, dim, generator=generator, dtype=torch.float64)
    k[offset : offset + rows] += q
    return (q * 3).to(DEVICE), (k * 0.2).to(DEVICE)


def _relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def _everything(q, k, temperature, offset, **how):
    """Loss and all gradients, temperature's included."""
    q, k = q.detach().clone().requires_grad_(), k.detach().clone().requires_grad_()
    tau = torch.tensor(temperature, dtype=q.dtype, device=q.device, requires_grad=True)
    loss = info_nce_loss(q, k, temperature=tau, positive_offset=offset, key_gradients=True, **how)
    return (loss.detach(), *torch.autograd.grad(loss, (q, k, tau)))


def _kernels(queries, keys, request, **how) -> OnePass:
    from fastmoco_kernels.info_nce.launch import info_nce_triton

    return info_nce_triton(queries, keys, request, **how)


# one row; a few; a prime below a tile; one beyond a tile: each against keys that fill no tile, D
# padded and not
@pytest.mark.parametrize(
    ("rows", "keys", "dim", "offset", "temperature"),
    [
        (1, 3, 32, 2, 0.2),
        (5, 7, 96, 1, 1.0),
        (63, 130, 100, 61, 0.07),
        (130, 150, 64, 11, 0.2),
        (17, 33, 256, 0, 0.07),
    ],
)
@pytest.mark.parametrize("path", ["fp32", "tf32", "fp16", "chunked"])
def test_every_gradient_is_that_of_float64(path, rows, keys, dim, offset, temperature):
    q, k = _data(rows, keys, dim, offset)
    truth = _everything(q, k, temperature, offset, backend="reference")
    how = {"backend": "chunked"} if path == "chunked" else {"backend": "triton", "precision": path}
    found = _everything(q.float(), k.float(), temperature, offset, **how)
    loss_tolerance, tolerance = TOLERANCE[path]
    names = ("loss", "dq", "dkeys", "dtemperature")
    limits = (loss_tolerance, tolerance, tolerance, 2 * tolerance)
    for name, value, expected, limit in zip(names, found, truth, limits, strict=True):
        assert value.dtype == torch.float32
        assert _relative(value, expected) <= limit, f"{name}: {_relative(value, expected):.1e}"


@pytest.mark.parametrize("path", ["triton", "chunked"])
def test_gradients_of_the_keys_at_a_temperature_that_is_a_number(path):
    q, k = _data(5, 9, 40, 2)
    how = {"temperature": 0.2, "positive_offset": 2, "key_gradients": True}
    truth = [x.clone().requires_grad_() for x in (q, k)]
    info_nce_loss(*truth, **how, backend="reference").backward()
    found = [x.float().requires_grad_() for x in (q, k)]
    info_nce_loss(*found, **how, backend=path, precision="fp32").backward()
    for mine, exact in zip(found, truth, strict=True):
        assert _relative(mine.grad, exact.grad) <= TOLERANCE["fp32"][1]


@pytest.mark.parametrize("path", ["fp32", "tf32", "fp16", "chunked"])
def test_golden_figures(golden, path):
    """Loss and gradient of moco-v3's formula in every case, both directions in one launch."""
    data = golden("loss")
    for i in range(int(data["num_cases"])):
        q1, q2, k1, k2 = (
            torch.tensor(data[f"c{i}_{n}"]).to(DEVICE) for n in ("q1", "q2", "k1", "k2")
        )
        q1.requires_grad_(), q2.requires_grad_()
        how = (
            {"backend": "chunked"}
            if path == "chunked"
            else {"backend": "triton", "precision": path}
        )
        result = symmetric_info_nce_loss(
            q1, k2, q2, k1, temperature=float(data[f"c{i}_tau"]), **how
        )
        result.loss.backward()
        loss_tolerance, tolerance = TOLERANCE[path]
        assert abs(result.loss.item() - data[f"c{i}_loss"]) <= loss_tolerance * max(
            1.0, data[f"c{i}_loss"]
        )
        for q, name in ((q1, "dq1"), (q2, "dq2")):
            expected = torch.tensor(data[f"c{i}_{name}"], dtype=torch.float64, device=DEVICE)
            assert _relative(q.grad, expected) <= max(tolerance, 1e-5), f"case {i} {name}"


@pytest.mark.parametrize("path", ["triton", "chunked", "reference"])
def test_both_directions_with_a_learnable_temperature(path):
    """Loss, and gradients in queries and temperature, by an explicit softmax in float64."""
    q1, k2 = _data(5, 9, 40, 2)
    q2, k1 = (x.flip(0, 1) for x in _data(5, 9, 40, 2))  # positives from row 2 on here too

    def plain(q1, q2, tau):
        total = 0
        for q, k in ((q1, k2), (q2, k1)):
            unit_q, unit_k = q / q.norm(dim=1, keepdim=True), k / k.norm(dim=1, keepdim=True)
            share = torch.exp(unit_q @ unit_k.T / tau)
            own = share[torch.arange(5), torch.arange(5) + 2]
            total = total - 2 * tau * torch.log(own / share.sum(1)).mean()
        return total

    exact = [q1, q2, torch.tensor(0.3, dtype=torch.float64, device=DEVICE)]
    found = [q1.float(), q2.float(), torch.tensor(0.3, device=DEVICE)]
    for tensors in (exact, found):
        tensors[:] = [tensor.clone().requires_grad_() for tensor in tensors]
    truth = plain(*exact)
    truth.backward()
    how = {"positive_offset": 2, "backend": path, "precision": "fp32"}
    (result, *none) = symmetric_info_nce_loss(
        found[0], k2.float(), found[1], k1.float(), temperature=found[2], **how
    )
    result.backward()
    assert none == [None, None]
    assert _relative(result.detach(), truth.detach()) <= TOLERANCE["fp32"][0]
    for mine, theirs in zip(found, exact, strict=True):
        assert theirs.grad.abs().max() > 1e-3
        assert _relative(mine.grad, theirs.grad) <= 2 * TOLERANCE["fp32"][1]

    # The same number, whether the temperature is a tensor or not.
    numbers = symmetric_info_nce_loss(
        q1.float(), k2.float(), q2.float(), k1.float(), temperature=0.3, **how
    )
    assert _relative(numbers.loss, truth.detach()) <= TOLERANCE["fp32"][0]


@pytest.mark.parametrize("path", ["triton", "chunked", "reference"])
def test_ranks_are_counted_in_the_same_pass(path):
    q, k = (x.float() for x in _data(70, 90, 64, 13))
    k[13:83] += 0.3 * torch.randn(70, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    q2, k1 = (
        q.flip(1).contiguous(),
        torch.randn(90, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE),
    )
    how = {"temperature": 0.2, "positive_offset": 13, "backend": path, "precision": "fp32"}
    result = symmetric_info_nce_loss(q, k, q2, k1, accuracy=True, **how)
    ranks = torch.cat(
        [
            positive_ranks_reference(a.double(), b.double(), positive_offset=13)
            for a, b in ((q, k), (q2, k1))
        ]
    )
    assert result.top1.item() == pytest.approx((ranks < 1).double().mean().item(), abs=1e-6)
    assert result.top5.item() == pytest.approx((ranks < 5).double().mean().item(), abs=1e-6)
    assert 0 < result.top1 < result.top5 < 1
    silent = symmetric_info_nce_loss(q, k, q2, k1, **how)
    assert silent.top1 is None
    assert torch.equal(silent.loss, result.loss)


@pytest.mark.parametrize("path", ["triton", "chunked"])
def test_keys_as_similar_as_the_positive_count_against_it(path):
    """A collapsed encoder, whose rows are all alike, must not look perfect."""
    rows = torch.randn(
        1, 256, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0)
    ).repeat(9, 1)
    result = symmetric_info_nce_loss(
        rows, rows, rows, rows, temperature=0.2, accuracy=True, backend=path, precision="fp32"
    )
    assert result.top1.item() == 0
    assert result.loss.item() == pytest.approx(
        4 * 0.2 * torch.log(torch.tensor(9.0)).item(), rel=1e-5
    )


def _request(**changes) -> Request:
    return Request(
        **(
            {
                "temperature": 0.1,
                "scale": 0.2,
                "positive_offset": 3,
                "gradient": True,
                "precision": "fp32",
            }
            | changes
        )
    )


def test_parts_of_the_keys_add_to_the_same_and_every_run_gives_the_same_bits():
    q, k = (x.float() for x in _data(20, 200, 64, 3))
    tile = Tile(64, 32, 4, 2)
    whole = _kernels((q,), (k,), _request(), tile=tile, splits=1)
    for splits in (3, 50):
        parts = _kernels((q,), (k,), _request(), tile=tile, splits=splits)
        assert _relative(parts.loss, whole.loss.double()) < 1e-6
        assert _relative(parts.dq, whole.dq.double()) < 1e-6
        again = _kernels((q,), (k,), _request(), tile=tile, splits=splits)
        assert torch.equal(again.loss, parts.loss)
        assert torch.equal(again.dq, parts.dq)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("rows", "keys"), [(4096, 4096), (512, 4096), (1, 65536), (16384, 16384), (64, 64)]
)
def test_splits_cover_the_keys_and_fill_the_gpu(family, rows, keys):
    tile, processors = candidates(family, 256, "bf16")[0], 132
    parts = key_splits(rows, keys, 2, tile, processors)
    tiles = -(-keys // tile.block_y)
    assert 1 <= parts <= max(1, min(32, tiles // 2))
    per_part = -(-tiles // parts)
    assert (parts - 1) * per_part < tiles <= parts * per_part, "an empty part"
    blocks = 2 * cost.padded(rows) // tile.block_x
    if tiles >= 64:
        assert parts == 32 or blocks * parts >= 0.85 * processors


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("path", ["triton", "chunked"])
def test_strides_change_no_bit(path, transposed):
    q, k = (x.float() for x in _data(6, 9, 40, 2))
    plain = info_nce_loss(q, k, temperature=0.2, positive_offset=2, backend=path, precision="fp32")
    if transposed:
        q, k = q.T.contiguous().T, k.T.contiguous().T
    else:  # columns of a wider tensor, as the trainer's gathered keys are
        q, k = torch.cat([q, q], 1).chunk(2, 1)[1], torch.cat([k, k], 1).chunk(2, 1)[0]
    assert not q.is_contiguous()
    found = info_nce_loss(q, k, temperature=0.2, positive_offset=2, backend=path, precision="fp32")
    if (
        DEVICE.type == "cuda" and path == "triton"
    ):  # a kernel's layout, and with it the order of its sums, follows strides
        torch.testing.assert_close(found, plain, rtol=1e-6, atol=0)
    else:
        assert torch.equal(found, plain)


@pytest.mark.parametrize("path", ["triton", "chunked"])
def test_rows_of_no_length_are_divided_by_a_constant_as_in_the_definition(path):
    q, k = (x.float() for x in _data(5, 6, 32, 0))
    q[1] = 0
    q[2] *= 1e-14 / q[2].norm()
    k[4] = 0
    truth = _everything(q.double(), k.double(), 0.2, 1, backend="reference")
    found = _everything(q, k, 0.2, 1, backend=path, precision="fp32")
    for value, expected in zip(found, truth, strict=True):
        for row, expected_row in zip(
            value.reshape(len(value) if value.dim() else 1, -1),
            torch.atleast_2d(expected),
            strict=False,
        ):
            assert _relative(row, expected_row) < 1e-4


@pytest.mark.parametrize(
    ("path", "temperature"),
    [("triton", 0.0134), ("triton", 0.02), ("chunked", 0.0134), ("chunked", 0.003)],
)
def test_opposite_vectors_at_the_smallest_temperatures(path, temperature):
    """Every negative at a cosine of -1, or the positive alone there: exponents as far apart as they
    come."""
    unit = normalize(torch.ones(1, 32, dtype=torch.float64), dim=1).to(DEVICE)
    apart = torch.cat([unit, -unit, -unit])
    for q, k, offset in (
        (unit, apart, 0),
        (unit, apart, 1),
        (unit, -apart[:2], 0),
        (-unit, apart[:1].repeat(3, 1), 1),
    ):
        q = q + 1e-3 * torch.arange(32, device=DEVICE)  # off the pole, where the gradient vanishes
        truth = _everything(q, k, temperature, offset, backend="reference")
        found = _everything(
            q.float(), k.float(), temperature, offset, backend=path, precision="fp32"
        )
        for value, expected in zip(found[:2], truth[:2], strict=True):
            assert torch.isfinite(value).all()
            # Where the true gradient is zero (e^-149, or all keys alike), float32 leaves a rounding
            # of unit vectors.
            assert (value.double() - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-7


def test_losses_near_zero_keep_their_digits():
    """Late in training: log(1 + x) of x = 1e-9, which 1 + x loses in float32."""
    q = torch.eye(4, 32, device=DEVICE)
    truth = info_nce_reference(q.double(), q.double(), temperature=0.05, positive_offset=0)
    assert truth < 1e-9
    for path in ("triton", "chunked"):
        loss = info_nce_loss(q, q, temperature=0.05, backend=path, precision="fp32")
        assert _relative(loss, truth) < 1e-4, path


def test_nan_and_infinity_are_passed_on():
    for bad in (float("nan"), float("inf")):
        q, k = (x.float() for x in _data(4, 5, 32, 0))
        q[1, 3] = bad
        for path in ("triton", "chunked", "reference"):
            assert info_nce_loss(q, k, temperature=0.2, backend=path, precision="fp32").isnan(), (
                path
            )


def test_memory_of_the_chunked_path_grows_with_rows_times_dim():
    from benchmarks.contest import peak_bytes

    q, k = (x.float().cpu() for x in _data(8192, 8192, 32, 0))
    peak = peak_bytes(
        lambda: info_nce_chunked((q,), (k,), _request(positive_offset=0)), torch.device("cpu")
    )
    tile = TILE_CPU[0] * TILE_CPU[1] * 4
    assert peak <= 8 * q.nbytes + 1.1 * tile < 8192 * 8192 * 4 / 4
