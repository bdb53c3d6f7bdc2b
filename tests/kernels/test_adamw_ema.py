"""One sweep of AdamW and average against float64 and against torch.optim.AdamW."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch

from fastmoco_kernels.adamw_ema.launch import CHUNK
from fastmoco_kernels.adamw_ema.op import adamw_ema_step_, bytes_moved, flops
from tests.kernels.touched_bytes import touched_bytes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["triton", "foreach", "reference"]
# one element; around a chunk; a chunk and more; no elements; no dimensions
SHAPES = [(1,), (CHUNK - 1,), (CHUNK,), (CHUNK + 1,), (33, 65), (0, 5), ()]


def _random(seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in SHAPES]


@dataclass
class Tensors:
    """Everything a sweep changes; every third parameter has no average."""

    params: list[torch.Tensor] = field(default_factory=lambda: _random(1))
    exp_avgs: list[torch.Tensor] = field(default_factory=lambda: [t * 0.1 for t in _random(2)])
    exp_avg_sqs: list[torch.Tensor] = field(
        default_factory=lambda: [t.square() for t in _random(3)]
    )
    steps: list[torch.Tensor] = field(
        default_factory=lambda: [torch.full((), 6.0, device=DEVICE) for _ in SHAPES]
    )
    averages: list = field(
        default_factory=lambda: [None if i % 3 == 2 else t for i, t in enumerate(_random(4))]
    )

    def step(self, grads, **options):
        options = {"lr": 0.01, "weight_decay": 0.1, "ema_momentum": 0.9} | options
        lists = self.params, grads, self.exp_avgs, self.exp_avg_sqs, self.steps
        adamw_ema_step_(*lists, averages=self.averages, **options)
        return self

    def all(self):
        lists = self.params, self.exp_avgs, self.exp_avg_sqs, self.steps, self.averages
        return [t for tensors in lists for t in tensors if t is not None]


def _exact(
    tensors: Tensors,
    grads,
    *,
    lr=0.01,
    weight_decay=0.1,
    betas=(0.9, 0.999),
    eps=1e-8,
    momentum=0.9,
):
    """The equations in float64: new parameters, moments and averages."""
    results = []
    for i, grad in enumerate(grads):
        p, m, v, g = (
            t.double()
            for t in (tensors.params[i], tensors.exp_avgs[i], tensors.exp_avg_sqs[i], grad)
        )
        t = tensors.steps[i].item() + 1
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        p = p * (1 - lr * weight_decay)
        p = p - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
        average = tensors.averages[i]
        results.append(
            (p, m, v, None if average is None else momentum * average.double() + (1 - momentum) * p)
        )
    return results


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_matches_float64(backend, dtype):
    grads = _random(7, dtype)
    expected = _exact(Tensors(), grads)
    ours = Tensors().step(grads, backend=backend)
    for i, (p, m, v, a) in enumerate(expected):
        torch.testing.assert_close(ours.params[i].double(), p, rtol=1e-6, atol=3e-7)
        torch.testing.assert_close(ours.exp_avgs[i].double(), m, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(ours.exp_avg_sqs[i].double(), v, rtol=1e-6, atol=1e-9)
        assert ours.steps[i].item() == 7
        if a is not None:
            torch.testing.assert_close(ours.averages[i].double(), a, rtol=1e-6, atol=3e-7)


# the first steps have the largest bias corrections; betas on both sides of the lerp's 1/2, and at
# its end
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("betas", "eps"), [((0.9, 0.999), 1e-8), ((0.3, 0.95), 1e-3), ((0.0, 0.0), 1e-6)]
)
def test_follows_torch_from_the_first_step(backend, betas, eps):
    ours, theirs = Tensors(), Tensors()
    for tensor in [*ours.exp_avgs, *ours.exp_avg_sqs, *ours.steps]:
        tensor.zero_()
    twins = [torch.nn.Parameter(p) for p in theirs.params]
    optimizer = torch.optim.AdamW(twins, lr=0.01, betas=betas, eps=eps, weight_decay=0.1)
    for seed in (10, 11, 12):
        grads = _random(seed)
        for twin, grad in zip(twins, grads, strict=True):
            twin.grad = grad
        optimizer.step()
        ours.step(grads, betas=betas, eps=eps, backend=backend)
    for param, twin in zip(ours.params, twins, strict=True):
        torch.testing.assert_close(param, twin.detach(), rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("found", [1.0, math.nan, math.inf])
def test_found_inf_changes_nothing_and_zero_does_not_matter(backend, found):
    grads = [torch.full_like(g, math.nan) for g in _random(7)]
    ours = Tensors().step(grads, found_inf=torch.tensor([found], device=DEVICE), backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(ours.all(), Tensors().all(), strict=True))
    plain = Tensors().step(_random(7), backend=backend)
    watched = Tensors().step(_random(7), found_inf=torch.zeros((), device=DEVICE), backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(plain.all(), watched.all(), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_grad_scale_is_divided_out_and_gradients_stay(backend):
    grads = [g * 1024 for g in _random(7)]
    scaled = Tensors().step(grads, grad_scale=torch.tensor(1024.0, device=DEVICE), backend=backend)
    plain = Tensors().step(_random(7), backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(scaled.all(), plain.all(), strict=True))
    assert all(torch.equal(g, h * 1024) for g, h in zip(grads, _random(7), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_may_lie_on_the_device(backend):
    def number(x):
        return torch.tensor([x], dtype=torch.float64, device=DEVICE)

    numbers = {
        "lr": number(0.01),
        "weight_decay": number(0.1),
        "eps": number(1e-8),
        "ema_momentum": number(0.9),
    }
    one = Tensors().step(_random(7), betas=(number(0.9), 0.999), **numbers, backend=backend)
    two = Tensors().step(_random(7), backend=backend)
    for a, b in zip(one.all(), two.all(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("momentum", [0.0, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_ends_of_the_average_are_exact(backend, momentum):
    ours = Tensors().step(_random(7), ema_momentum=momentum, backend=backend)
    for average, before, param in zip(ours.averages, Tensors().averages, ours.params, strict=True):
        assert average is None or torch.equal(average, before if momentum else param)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_equals_its_average_stays_equal(backend):
    ours = Tensors()
    ours.averages = [p.clone() for p in ours.params]
    for step in range(20):
        ours.step(_random(step), lr=0.0, ema_momentum=0.9 + step / 200, backend=backend)
    assert all(torch.equal(a, p) for a, p in zip(ours.averages, Tensors().params, strict=True))


def test_odd_addresses_and_permuted_memory_give_the_same_numbers():
    plain = Tensors().step(_random(7), backend="triton")
    odd, grads = Tensors(), _random(7)
    for tensors in (odd.params, odd.exp_avg_sqs, odd.averages, grads):
        for i in (2, 3, 4):
            if tensors[i] is not None:
                room = torch.zeros(tensors[i].numel() + 3, device=DEVICE, dtype=tensors[i].dtype)
                tensors[i] = room[3:].view(SHAPES[i]).copy_(tensors[i])
    odd.step(grads, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(plain.all(), odd.all(), strict=True))
    for permuted in ("all", "gradient", "param"):
        ours, grads = Tensors(), _random(7)
        lists = [grads] if permuted == "gradient" else [ours.params]
        lists += [ours.exp_avgs, ours.exp_avg_sqs, grads] if permuted == "all" else []
        for tensors in lists:
            tensors[4] = tensors[4].t().contiguous().t()
        ours.averages[4] = None
        ours.step(grads, backend="triton")
        torch.testing.assert_close(ours.params[4], plain.params[4], rtol=1e-6, atol=2e-7)


@pytest.mark.skipif(DEVICE == "cuda", reason="counted in the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_byte_model_is_what_the_sweep_touches(dtype):
    ours = Tensors()
    with touched_bytes(CHUNK) as counts:
        ours.step(_random(7, dtype), backend="triton")

    def elements(tensors):
        return sum(t.numel() for t in tensors if t is not None)

    assert counts["read"] + counts["written"] == bytes_moved(
        elements(ours.params),
        grad_bytes=dtype.itemsize,
        averaged=elements(ours.averages),
    )
    assert bytes_moved(1, averaged=1) == 36
    assert flops(2, averaged=1) == 33


def _packed(tensors: Tensors, backend: str):
    averages = [t for t in tensors.averages if t is not None]
    places = iter(range(len(averages)))
    rows = [-1 if t is None else next(places) for t in tensors.averages]
    numbers, lr = [0.0, 0.1, 0.9, 0.999, 1e-8, 0.9], torch.tensor([0.01], device=DEVICE)
    lists = (
        tensors.params,
        _random(7),
        tensors.exp_avgs,
        tensors.exp_avg_sqs,
        tensors.steps,
        averages,
    )
    return (*lists, rows, numbers, [lr], [0], None, None, backend)


@pytest.mark.parametrize("backend", ["triton", "foreach"])
def test_opcheck(backend):
    torch.library.opcheck(torch.ops.fastmoco.adamw_ema_step_.default, _packed(Tensors(), backend))


def test_compiles_as_a_whole_graph_and_autocast_changes_nothing():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(tensors, grads, lr):
        lists = tensors.params, grads, tensors.exp_avgs, tensors.exp_avg_sqs, tensors.steps
        adamw_ema_step_(
            *lists, lr=lr, weight_decay=0.1, ema_momentum=0.9, averages=tensors.averages
        )

    one, two = Tensors(), Tensors()
    compiled(one, _random(7), torch.tensor(0.01, dtype=torch.float64, device=DEVICE))
    with torch.autocast(DEVICE, torch.bfloat16):
        two.step(_random(7))
    assert all(torch.equal(a, b) for a, b in zip(one.all(), two.all(), strict=True))


def _call(**changes):
    one = {n: [torch.ones(2)] for n in ("params", "grads", "exp_avgs", "exp_avg_sqs")} | {
        "steps": [torch.zeros(())]
    }
    adamw_ema_step_(**({"lr": 0.1} | one | changes))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"grads": []}, "1 params but 0 grads"),
        ({"steps": []}, "1 params but 0 steps"),
        ({"averages": [], "ema_momentum": 0.9}, "1 params but 0 averages"),
        ({"averages": [torch.ones(2)]}, "1 averages but ema_momentum=None"),
        ({"exp_avgs": [torch.ones(3)]}, r"exp_avgs\[0\] is \(3,\) but params\[0\] is \(2,\)"),
        (
            {"grads": [torch.ones(2, device="meta")]},
            r"grads\[0\] is on meta but params\[0\] is on cpu",
        ),
        ({"grads": [torch.ones(2).long()]}, "int64"),
        ({"grads": [torch.ones(2).to_sparse()]}, "sparse"),
        ({"params": [torch.ones(2).bfloat16()]}, r"params\[0\] is torch.bfloat16"),
        ({"exp_avg_sqs": [torch.ones(2).bfloat16()]}, r"exp_avg_sqs\[0\] is torch.bfloat16"),
        ({"steps": [torch.ones(2)]}, r"steps\[0\] has 2 elements"),
        ({"lr": -1.0}, "lr=-1.0 must be 0 or more"),
        ({"betas": (0.9, 1.0)}, r"beta2=1.0 is outside \[0, 1\)"),
        ({"ema_momentum": 1.5}, "ema_momentum=1.5"),
        ({"found_inf": torch.zeros(2)}, "found_inf has 2 elements on cpu; it must be 1 on cpu"),
        ({"backend": "apex"}, "backend='apex'"),
    ],
)
def test_errors_name_both_numbers(changes, text):
    with pytest.raises(ValueError, match=text):
        _call(**changes)
    adamw_ema_step_([], [], [], [], [], lr=0.1)


@pytest.mark.gpu
def test_bf16_gradients_and_a_captured_step_on_a_gpu():
    eager, captured = Tensors(), Tensors()
    grads = _random(7, torch.bfloat16)
    lr = torch.tensor(0.01, device=DEVICE)
    for _ in range(3):
        eager.step(grads, lr=lr)
    captured.step(grads, lr=lr)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step(grads, lr=lr)
    graph.replay()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(eager.all(), captured.all(), strict=True))
