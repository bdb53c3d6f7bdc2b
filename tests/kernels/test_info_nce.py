"""The loss against float64, against golden numbers, and against its own closed-form gradient."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from fastmoco_kernels import info_nce_loss


def _random(rows: int, dim: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(
        rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def _close(actual: torch.Tensor, expected: object, tolerance: float) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    error = (actual.double() - expected).abs().max().item()
    scale = max(1.0, expected.abs().max().item())
    assert error <= tolerance * scale, f"error {error:.2e} above {tolerance:.0e} of {scale:.2e}"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 3e-7), (torch.float32, 2e-6)])
def test_golden_losses_and_gradients(golden, dtype, tolerance):
    data = golden("loss")
    assert int(data["num_cases"]) >= 5
    for i in range(int(data["num_cases"])):
        q1, q2, k1, k2 = (
            torch.tensor(data[f"c{i}_{n}"]).to(dtype) for n in ("q1", "q2", "k1", "k2")
        )
        q1.requires_grad_(), q2.requires_grad_()
        temperature = float(data[f"c{i}_tau"])
        one = info_nce_loss(q1, k2, temperature=temperature)
        two = info_nce_loss(q2, k1, temperature=temperature)
        (one + two).backward()
        _close(one.detach(), data[f"c{i}_loss_q1k2"], tolerance)
        _close(two.detach(), data[f"c{i}_loss_q2k1"], tolerance)
        _close((one + two).detach(), data[f"c{i}_loss"], tolerance)
        for q, name in ((q1, "dq1"), (q2, "dq2")):
            expected = torch.tensor(data[f"c{i}_{name}"], dtype=torch.float64)
            error = (q.grad.double() - expected).norm() / expected.norm()
            assert error <= (1e-6 if dtype == torch.float64 else 1e-4), (
                f"case {i} {name}: relative error {error:.1e}"
            )


def test_golden_ranks_by_offset(golden):
    """Each rank's queries against all ranks' keys, positives at rank * B: one process plays all
    ranks."""
    data = golden("loss")
    for j in range(int(data["num_mr"])):
        world, rows, dim = data[f"mr{j}_q1"].shape
        temperature = float(data[f"mr{j}_tau"])
        keys1, keys2 = (
            torch.tensor(data[f"mr{j}_{n}"]).double().reshape(world * rows, dim)
            for n in ("k1", "k2")
        )
        for rank in range(world):
            q1, q2 = (
                torch.tensor(data[f"mr{j}_{n}"][rank]).double().requires_grad_()
                for n in ("q1", "q2")
            )
            loss = info_nce_loss(q1, keys2, temperature=temperature, positive_offset=rank * rows)
            loss = loss + info_nce_loss(
                q2, keys1, temperature=temperature, positive_offset=rank * rows
            )
            loss.backward()
            _close(loss.detach(), data[f"mr{j}_loss"][rank], 3e-7)
            _close(q1.grad, data[f"mr{j}_dq1"][rank], 1e-6)
            _close(q2.grad, data[f"mr{j}_dq2"][rank], 1e-6)


# one row; a prime above a tile; more keys than queries with an offset in the middle; D not a power
# of two
@pytest.mark.parametrize(
    ("rows", "keys", "dim", "offset"),
    [(1, 1, 32, 0), (63, 63, 96, 0), (37, 130, 96, 61), (8, 9, 7, 1)],
)
@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_gradient_is_the_closed_form(rows, keys, dim, offset, temperature):
    q, k = _random(rows, dim, 1).requires_grad_(), _random(keys, dim, 2)
    info_nce_loss(q, k, temperature=temperature, positive_offset=offset).backward()
    unit, unit_keys = normalize(q.detach(), dim=1), normalize(k, dim=1)
    p = (unit @ unit_keys.T / temperature).softmax(1)
    p[torch.arange(rows), torch.arange(rows) + offset] -= 1
    g = 2 / rows * p @ unit_keys
    expected = (g - (g * unit).sum(1, keepdim=True) * unit) / q.detach().norm(dim=1, keepdim=True)
    torch.testing.assert_close(q.grad, expected, rtol=1e-9, atol=1e-12)


def test_gradcheck_in_float64():
    q, k = _random(5, 6, 3).requires_grad_(), _random(9, 6, 4)
    assert torch.autograd.gradcheck(
        lambda x: info_nce_loss(x, k, temperature=0.2, positive_offset=2), q
    )


def test_keys_carry_no_gradient_and_stride_does_not_matter():
    q, k = (
        _random(6, 8, 5, torch.float32).requires_grad_(),
        _random(6, 8, 6, torch.float32).requires_grad_(),
    )
    loss = info_nce_loss(q, k, temperature=0.2)
    loss.backward()
    assert k.grad is None
    strided = q.detach().T.contiguous().T
    assert not strided.is_contiguous()
    assert torch.equal(info_nce_loss(strided, k, temperature=0.2), loss.detach())


def test_bf16_inputs_are_computed_in_float32_even_under_autocast():
    q, k = _random(64, 32, 7, torch.bfloat16), _random(64, 32, 8, torch.bfloat16)
    exact = info_nce_loss(q.double(), k.double(), temperature=0.07)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = info_nce_loss(q, k, temperature=0.07)
    assert loss.dtype == torch.float32
    assert abs(loss.item() - exact.item()) < 2e-6 * exact.item()


def test_zero_rows_stay_finite():
    q = torch.zeros(3, 4, requires_grad=True)
    loss = info_nce_loss(q, torch.zeros(3, 4), temperature=0.2)
    loss.backward()
    assert loss.item() == pytest.approx(0.4 * torch.log(torch.tensor(3.0)).item(), rel=1e-6)
    assert torch.isfinite(q.grad).all()


@pytest.mark.parametrize(
    ("q", "k", "options", "text"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), {}, "D=3 but keys have D=4"),
        (torch.ones(2), torch.ones(2, 4), {}, r"must be \[B, D\]"),
        (torch.ones(3, 4), torch.ones(2, 4), {}, r"positives 0\.\.2 are outside the 2 keys"),
        (
            torch.ones(2, 4),
            torch.ones(4, 4),
            {"positive_offset": 3},
            r"positives 3\.\.4 are outside the 4 keys",
        ),
        (torch.ones(2, 4), torch.ones(4, 4), {"positive_offset": -1}, "outside"),
        (torch.ones(2, 4), torch.ones(2, 4), {"temperature": 0.0}, "temperature=0.0"),
        (torch.ones(2, 4), torch.ones(2, 4), {"backend": "cuda"}, "backend='cuda'"),
        (torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 4), {}, "floating point"),
        (torch.ones(0, 4), torch.ones(2, 4), {}, "no rows"),
        (torch.ones(2, 4), torch.ones(2, 4, device="meta"), {}, "on cpu but keys are on meta"),
    ],
)
def test_errors_name_both_numbers(q, k, options, text):
    with pytest.raises(ValueError, match=text):
        info_nce_loss(q, k, **{"temperature": 0.2, **options})
