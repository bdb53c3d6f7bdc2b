"""The operator as torch sees it: its registration, graphs, autocast, arguments, cost."""

from __future__ import annotations

import pytest
import torch

from fastmoco_kernels.info_nce import cost, operator
from fastmoco_kernels.info_nce.chunked import Request
from fastmoco_kernels.info_nce.op import info_nce_loss, symmetric_info_nce_loss
from fastmoco_kernels.info_nce.tiles import Tile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PATHS = ("triton", "chunked")


def _rows(rows: int, seed: int, dim: int = 32, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


# two directions; one with every gradient. The kernels are the same to torch: once is enough for the
# slow interpreter
@pytest.mark.parametrize(
    ("path", "two"), [("chunked", True), ("chunked", False), ("triton", False)]
)
def test_opcheck(path, two):
    q, k, tau = (
        _rows(3, 0).requires_grad_(),
        _rows(5, 1).requires_grad_(),
        torch.tensor(0.2, device=DEVICE),
    )
    arguments = (
        (q, k.detach(), _rows(3, 2).requires_grad_(), _rows(5, 3), None, 0.2)
        if two
        else (q, k, None, None, tau.requires_grad_(), 0.0)
    )
    options = (0.4, 1, True, not two, two, "fp32", path == "triton")
    torch.library.opcheck(operator._info_nce, (*arguments, *options))


@pytest.mark.parametrize("path", PATHS)
def test_compiles_to_one_graph_with_the_same_numbers(path):
    def both(q1, k2, q2, k1):
        return (
            symmetric_info_nce_loss(
                q1 * 2, k2, q2, k1, temperature=0.2, backend=path, precision="fp32"
            ).loss
            * 3
        )

    data = [_rows(4, 0).requires_grad_(), _rows(6, 1), _rows(4, 2).requires_grad_(), _rows(6, 3)]
    eager, compiled = both(*data), torch.compile(both, fullgraph=True, backend="aot_eager")(*data)
    assert torch.equal(eager, compiled)
    for ours, theirs in zip(
        torch.autograd.grad(eager, data[::2]), torch.autograd.grad(compiled, data[::2]), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_compiles_through_inductor():
    def loss(q, k):
        return info_nce_loss(q * 2, k, temperature=0.2)

    q, k = _rows(4, 0).requires_grad_(), _rows(6, 1)
    torch.testing.assert_close(torch.compile(loss, fullgraph=True)(q, k), loss(q, k))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_changes_no_bit(path, dtype):
    def run():
        q = _rows(6, 0, dtype=dtype).requires_grad_()
        loss = info_nce_loss(
            q, _rows(9, 1, dtype=dtype), temperature=0.1, backend=path, precision="fp32"
        )
        loss.backward()
        return loss.detach(), q.grad

    outside = run()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        inside = run()
    assert outside[0].dtype == torch.float32
    assert outside[1].dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_without_gradients_none_is_computed(path, monkeypatch):
    asked = []
    real = operator.one_pass
    monkeypatch.setattr(
        "fastmoco_kernels.info_nce.op.one_pass",
        lambda q, k, request, **how: asked.append(request.gradient) or real(q, k, request, **how),
    )
    q, k = _rows(4, 0).requires_grad_(), _rows(5, 1)
    how = {"temperature": 0.2, "backend": path, "precision": "fp32"}
    with_gradient = info_nce_loss(q, k, **how)
    with torch.no_grad():
        without = info_nce_loss(q, k, **how)
    with torch.inference_mode():
        inference = info_nce_loss(q, k, **how)
    assert asked == [True, False, False]
    assert not without.requires_grad
    assert without.item() == inference.item() == pytest.approx(with_gradient.item(), rel=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_the_incoming_gradient_scales_in_float32_for_fp16(path):
    """A loss scaler multiplies what fp16 would have flushed to zero."""
    q, k = _rows(4, 0, dtype=torch.float16).requires_grad_(), _rows(5, 1, dtype=torch.float16)
    loss = info_nce_loss(q, k, temperature=0.2, scale=1e-7, backend=path, precision="fp32")
    (loss * 1e7).backward()
    exact = q.detach().double().requires_grad_()
    info_nce_loss(exact, k.double(), temperature=0.2, scale=1.0).backward()
    torch.testing.assert_close(q.grad.double(), exact.grad, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_a_second_derivative_is_refused_in_words(path):
    q, k = _rows(4, 0).requires_grad_(), _rows(5, 1)
    loss = info_nce_loss(q, k, temperature=0.2, backend=path, precision="fp32")
    (gradient,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("path", ["chunked", "reference"])
def test_gradcheck_of_queries_keys_and_temperature(path):
    q, k = (_rows(n, n, 6, torch.float64).requires_grad_() for n in (4, 7))
    tau = torch.tensor(0.3, dtype=torch.float64, device=DEVICE, requires_grad=True)

    def loss(q, k, tau):
        return info_nce_loss(
            q, k, temperature=tau, positive_offset=2, key_gradients=True, backend=path
        )

    assert torch.autograd.gradcheck(loss, (q, k, tau))
    if path == "reference":
        assert torch.autograd.gradgradcheck(loss, (q, k, tau))


@pytest.mark.parametrize("path", ["triton", "chunked", "reference"])
def test_scale_and_a_learnable_temperature_without_its_factor(path):
    q, k = _rows(5, 0).requires_grad_(), _rows(5, 1)
    how = {"backend": path, "precision": "fp32"}
    one = info_nce_loss(q, k, temperature=0.2, scale=1.0, **how)
    assert info_nce_loss(q, k, temperature=0.2, **how).item() == pytest.approx(
        0.4 * one.item(), rel=1e-6
    )
    tau = torch.tensor(0.2, device=DEVICE, requires_grad=True)
    moved = [
        info_nce_loss(q.double(), k.double(), temperature=0.2 + d, scale=1.0).item()
        for d in (-1e-5, 1e-5)
    ]
    (slope,) = torch.autograd.grad(info_nce_loss(q, k, temperature=tau, scale=1.0, **how), tau)
    assert slope.item() == pytest.approx((moved[1] - moved[0]) / 2e-5, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"temperature": 0.01, "backend": "triton"}, "temperature=0.01 below 0.01336"),
        ({"temperature": 0.01, "backend": "triton", "precision": "fp16"}, "below 0.05"),
        ({"precision": "fp8"}, "precision='fp8'"),
        ({"temperature": torch.tensor([0.2])}, "must be a floating-point scalar"),
        ({"temperature": torch.tensor(1)}, "must be a floating-point scalar"),
        ({"temperature": float("nan")}, "temperature=nan must be positive"),
    ],
)
def test_errors(options, text):
    with pytest.raises(ValueError, match=text):
        info_nce_loss(_rows(3, 0), _rows(3, 1), **({"temperature": 0.2} | options))


def test_errors_of_shapes_and_types():
    q, k = _rows(3, 0), _rows(4, 1)
    with pytest.raises(ValueError, match="float64 input"):
        info_nce_loss(q.double(), k.double(), temperature=0.2, backend="triton")
    with pytest.raises(ValueError, match="D=600 above 512"):
        info_nce_loss(_rows(2, 0, 600), _rows(2, 1, 600), temperature=0.2, backend="triton")
    with pytest.raises(
        ValueError, match=r"q1 is torch.float32 \(3, 32\) .* q2 is torch.float32 \(2, 32\)"
    ):
        symmetric_info_nce_loss(q, k, q[:2], k, temperature=0.2)
    with pytest.raises(ValueError, match=r"k2 is .* k1 is torch.float64"):
        symmetric_info_nce_loss(q, k, q, k.double(), temperature=0.2)


@pytest.mark.parametrize(("directions", "gradient"), [(1, True), (2, True), (2, False)])
def test_the_byte_model_is_the_sum_of_the_tensors_of_every_launch(
    monkeypatch, directions, gradient
):
    from fastmoco_kernels.info_nce import launch

    touched = 0

    class Counting:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def run(*arguments, **constants):
                nonlocal touched
                tensors = {
                    x.data_ptr(): x
                    for x in arguments
                    if isinstance(x, torch.Tensor) and x.numel() > 1
                }
                touched += sum(x.nbytes for x in tensors.values())
                return self.kernel[grid](*arguments, **constants)

            return run

    kernels = {
        "unit_rows": launch.triton_kernels,
        "stream": launch.triton_kernels,
        "finish": launch.epilogue_kernels,
    }
    for name, module in kernels.items():
        monkeypatch.setattr(
            module, f"info_nce_{name}_kernel", Counting(getattr(module, f"info_nce_{name}_kernel"))
        )
    q, k = ([_rows(n, seed, 40) for seed in range(directions)] for n in (9, 150))
    request = Request(
        temperature=0.2, scale=0.4, positive_offset=0, gradient=gradient, precision="fp16"
    )
    launch.info_nce_triton(q, k, request, tile=Tile(64, 64, 4, 2), splits=2)
    model = cost.bytes_moved(9, 150, 40, directions=directions, splits=2, gradient=gradient)
    assert touched == model
    large = cost.bytes_moved(16384, 16384, 256)
    assert large < 1.05 * (16 * 16384 * 256 + 8 * 16384 * 256 + 16 * 16384 * 256)


def test_flops():
    assert cost.flops(8, 16, 4) == 4 * 8 * 16 * 4
    assert cost.flops(8, 16, 4, directions=2, gradient=False) == 4 * 8 * 16 * 4
    assert cost.flops(8, 16, 4, key_gradient=True) == 8 * 8 * 16 * 4


@pytest.mark.gpu
@pytest.mark.parametrize(("temperature", "limit"), [(0.2, 1e-3), (0.07, 2e-3)])
def test_default_precision_on_a_gpu(temperature, limit):
    q = _rows(1000, 0, 256, torch.bfloat16).requires_grad_()
    k = (_rows(1500, 1, 256) * 0.4).index_add(
        0, torch.arange(1000, device=DEVICE), q.detach().float()
    )
    loss = info_nce_loss(q, k, temperature=temperature)
    loss.backward()
    exact = q.detach().double().requires_grad_()
    info_nce_loss(exact, k.double(), temperature=temperature).backward()
    assert (
        q.grad.double() - exact.grad
    ).norm() / exact.grad.norm() < limit + 2**-9  # dq is stored in bf16
