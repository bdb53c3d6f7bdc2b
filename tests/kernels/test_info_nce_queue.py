"""The loss against a queue: against its definition in float64, on the chunked path and in the kernels
(in the interpreter where there is no GPU)."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from fastmoco_kernels import queued_info_nce_loss
from fastmoco_kernels.info_nce import chunked, operator

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = ("loss", "dq", "top1", "top5")


def sides(rows: int, queue: int, dim: int = 40, dtype: torch.dtype = torch.float64):
    """Raw queries, keys at cosines from 0 to 1 of them, and a queue of unit length."""
    noise = torch.Generator().manual_seed(rows)
    q, k = (torch.randn(rows, dim, generator=noise, dtype=torch.float64) for _ in range(2))
    k = k + q * torch.linspace(0, 2, rows, dtype=torch.float64)[:, None]
    negatives = torch.randn(queue, dim, generator=noise, dtype=torch.float64)
    # Some rows of the queue are near to each query: positives rank first, among five, and later.
    negatives = normalize(negatives + 0.8 * q[torch.arange(queue) % rows], dim=1)
    return [x.to(DEVICE, dtype) for x in (5 * q, k, negatives)]


def measure(q, k, queue, *, temperature, **how) -> dict[str, torch.Tensor]:
    """Loss, gradients of queries and temperature, accuracy."""
    q, k = q.detach().clone().requires_grad_(), k.detach().clone().requires_grad_()
    tau = temperature
    if temperature == "tensor":
        tau = torch.tensor(0.2, dtype=q.dtype, device=DEVICE, requires_grad=True)
    result = queued_info_nce_loss(q, k, queue, temperature=tau, accuracy=True, **how)
    result.loss.backward()
    assert k.grad is None
    found = {"loss": result.loss.detach(), "dq": q.grad, "top1": result.top1, "top5": result.top5}
    return found | ({"dtau": tau.grad} if temperature == "tensor" else {})


# One query and one negative; a queue of no whole tile, shorter and longer than the batch.
@pytest.mark.parametrize(("rows", "queue"), [(1, 1), (5, 3), (30, 77)])
@pytest.mark.parametrize("temperature", [0.07, 1.0, 0.003, "tensor"])
def test_the_definition_in_float64(rows, queue, temperature, monkeypatch):
    monkeypatch.setattr(chunked, "TILE_CPU", (16, 16))
    monkeypatch.setattr(chunked, "TILE", (16, 16))
    data = sides(rows, queue)
    how = {"temperature": temperature, "scale": 0.7}
    found, truth = (measure(*data, backend=b, **how) for b in ("chunked", "reference"))
    assert found.keys() == truth.keys()
    for name, value in found.items():
        largest = max(1.0, truth[name].abs().max().item())
        assert (value - truth[name]).abs().max() <= 1e-12 * largest, name
    if rows == 30:
        assert 0 < truth["top1"] < truth["top5"] < 1


@pytest.mark.parametrize(
    ("path", "temperature"), [("triton", 0.07), ("triton", "tensor"), ("chunked", 0.07)]
)
def test_float32(path, temperature):
    """Keys of other queries are no negatives: there are as many queries as a tile has rows."""
    data = sides(20, 40)
    truth = measure(*data, backend="reference", temperature=temperature)
    narrow = [x.float() for x in data]
    found, again = (
        measure(*narrow, backend=path, temperature=temperature, precision="fp32") for _ in range(2)
    )
    for name, value in found.items():
        assert torch.equal(value, again[name]), name
        difference = (value.double() - truth[name]).norm() / truth[name].norm()
        assert difference <= 5e-6, name


def test_the_queue_is_used_as_it_is():
    """On both paths: a queue of half length has half the logits."""
    q, k, queue = (x.float() for x in sides(4, 9))
    for path in ("triton", "chunked"):
        how = {"temperature": 0.2, "backend": path, "precision": "fp32"}
        loss = queued_info_nce_loss(q, k, 0.5 * queue, **how).loss
        expected = queued_info_nce_loss(
            q, k, 0.5 * queue, temperature=0.2, backend="reference"
        ).loss
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_queries_against_a_wide_queue(dtype):
    q, k, queue = sides(8, 24)
    truth = measure(q, k, queue, temperature=0.2, backend="reference")
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        found = measure(q.to(dtype), k.to(dtype), queue.float(), temperature=0.2)
    assert found["loss"].dtype == torch.float32
    assert found["dq"].dtype == dtype
    for name in ("loss", "dq"):
        difference = (found[name].double() - truth[name]).norm() / truth[name].norm()
        assert difference <= 3e-2, name


def test_one_tile_of_logits_is_in_memory(monkeypatch):
    """Whatever the length of the queue: neither all logits nor a second queue is made."""
    monkeypatch.setattr(chunked, "TILE_CPU", (16, 32))
    largest = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            own = isinstance(out, torch.Tensor) and "aten::split" not in str(function)
            largest.append(out.numel() if own and out._base is None else 0)
            return out

    q, k, queue = (x.float().cpu() for x in sides(12, 4096))
    with Sizes():
        request = chunked.Request(temperature=0.2, scale=1.0, positive_offset=0, gradient=True)
        chunked.info_nce_chunked((q,), (k,), request, queue=queue)
    assert 0 < max(largest) <= 32 * (q.shape[1] + chunked.ONES)


def test_opcheck_and_graphs():
    q, k, queue = (x.float() for x in sides(3, 5))
    q.requires_grad_()
    arguments = (q, k, None, None, None, 0.2, 1.0, 0, True, False, True, "fp32", False, queue)
    torch.library.opcheck(operator._info_nce, arguments)

    def loss(q, k, queue):
        return queued_info_nce_loss(2 * q, k, queue, temperature=0.2, backend="chunked").loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, queue), loss(q, k, queue))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"k": torch.zeros(3, 40)}, "positives 0..3 are outside the 3 keys"),
        ({"k": torch.zeros(5, 40)}, "4 queries but 5 keys"),
        ({"queue": torch.zeros(9, 41)}, r"queue \(9, 41\) must be \[K, 40\]"),
        ({"queue": torch.zeros(0, 40)}, r"queue \(0, 40\) must be"),
        ({"queue": torch.zeros(9, 40, dtype=torch.int64)}, "queue is torch.int64"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
    ],
)
def test_what_does_not_fit_is_refused(change, text):
    given = {"q": torch.ones(4, 40), "k": torch.ones(4, 40), "queue": torch.ones(9, 40)}
    with pytest.raises(ValueError, match=text):
        queued_info_nce_loss(**({"temperature": 0.2} | given | change))
