"""Plans outlive a call: whatever changes under a tensor, at its address or elsewhere, must be seen
by the next call."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastmoco_kernels import AdamWEMA, ema_update_, tables
from fastmoco_kernels import _unchanged as unchanged_module
from fastmoco_kernels._unchanged import Unchanged, guards, plain
from fastmoco_kernels.adamw_ema import optimizer as optimizer_module
from fastmoco_kernels.ema import plan as ema_plan
from fastmoco_kernels.tables import PointerTable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _square() -> Tensor:
    return torch.arange(16.0, device=DEVICE).view(4, 4)


def _transposed(tensor: Tensor) -> None:
    tensor.data = tensor.data.t()


def _halved(tensor: Tensor) -> None:
    tensor.data = tensor.data.half()


def _other_type_at_the_same_address(tensor: Tensor) -> None:
    tensor.data = tensor.data.view(torch.float16)[:, :4]


def _shorter(tensor: Tensor) -> None:
    tensor.data = tensor.data[:2]


def _needs_a_gradient(tensor: Tensor) -> None:
    tensor.requires_grad_(not tensor.requires_grad)


CHANGES = [_transposed, _halved, _other_type_at_the_same_address, _shorter, _needs_a_gradient]


@pytest.mark.parametrize("comparison", [guards, plain])
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_both_comparisons_see_every_change_and_no_move(comparison, change):
    tensors = [
        _square(),
        nn.Parameter(_square()),
        torch.zeros(0, 3, device=DEVICE),
        torch.zeros((), device=DEVICE),
    ]
    holds = comparison(tensors)
    moved = [
        tensors[0].clone(),
        nn.Parameter(tensors[1].clone()),
        tensors[2].clone(),
        tensors[3].clone(),
    ]
    assert holds(*tensors)
    assert holds(*moved)
    for which in (0, 1):
        changed = list(moved)
        changed[which] = type(moved[which])(moved[which].detach().clone())
        change(changed[which])
        assert not holds(*changed)
    assert not holds(moved[1], moved[0], *moved[2:])  # a parameter where a tensor was
    assert not holds(*[tensor.to("meta") for tensor in tensors])


def test_a_torch_that_was_not_tested_takes_the_plain_comparison(monkeypatch):
    for version, compiled in (
        ("2.10.1", False),
        ("2.11.0+cu130", True),
        ("2.13.0", True),
        ("2.14.0a0", False),
    ):
        monkeypatch.setattr(torch, "__version__", version)
        assert unchanged_module._has_guards() == compiled
    monkeypatch.setattr(
        unchanged_module, "guards", lambda _: pytest.fail("not tested with this torch")
    )
    same = Unchanged([_square()])
    assert same.holds([_square()])
    assert not same.holds([])
    assert Unchanged([]).holds([])


def _averaged(averages: list[Tensor], sources: list[Tensor]) -> list[Tensor]:
    return [0.5 * a.double() + 0.5 * s.double() for a, s in zip(averages, sources, strict=True)]


def _check_ema(averages: list[Tensor], sources: list[Tensor]) -> None:
    expected = _averaged(averages, sources)
    ema_update_(averages, sources, 0.5, backend="triton")
    for average, value in zip(averages, expected, strict=True):
        torch.testing.assert_close(average.double(), value, rtol=1e-3, atol=1e-3)


def _both(change: Callable[[Tensor], None]) -> Callable[[Tensor, Tensor], None]:
    def apply(average: Tensor, source: Tensor) -> None:
        change(average)
        change(source)

    return apply


EMA_CHANGES = {
    "source transposed": lambda a, s: _transposed(s),
    "average transposed": lambda a, s: _transposed(a),
    "source in another type": lambda a, s: _halved(s),
    "source in another type at its address": lambda a, s: _other_type_at_the_same_address(
        s.fill_(0)
    ),
    "both shorter": _both(_shorter),
    "source needs a gradient": lambda a, s: _needs_a_gradient(s),
    "source elsewhere": lambda a, s: setattr(s, "data", s.data + 1),
    "average elsewhere": lambda a, s: setattr(a, "data", a.data + 1),
    "both elsewhere": _both(lambda t: setattr(t, "data", t.data + 1)),
}


@pytest.mark.parametrize("name", EMA_CHANGES)
def test_an_average_follows_what_changes_under_its_tensors(name):
    averages = [_square() + i for i in range(3)]
    sources = [(_square() * 2 + i).clone() for i in range(3)]
    _check_ema(averages, sources)
    with torch.no_grad():
        EMA_CHANGES[name](averages[1], sources[1])
    for _ in range(2):
        _check_ema(averages, sources)


def test_memory_that_was_freed_and_handed_out_again_is_another_tensor():
    """The allocator gives the address of a dead tensor to the next: same address, other type and
    shape."""
    room = torch.zeros(64, device=DEVICE)
    for shape, dtype in (
        ((4, 4), torch.float32),
        ((2, 8), torch.float32),
        ((4, 4), torch.float16),
        ((4, 4), torch.float32),
    ):
        average, source = _square().view(shape), room.view(dtype)[:16].view(shape)
        assert source.data_ptr() == room.data_ptr()
        source.copy_(torch.ones(shape, device=DEVICE))
        _check_ema([average], [source])


def test_wrong_tensors_are_refused_where_right_ones_have_a_plan():
    averages, sources = [_square(), _square()], [_square(), _square()]
    _check_ema(averages, sources)
    with pytest.raises(ValueError, match="2 averages but 1 sources"):
        ema_update_(averages, sources[:1], 0.5, backend="triton")
    with pytest.raises(ValueError, match=r"sources\[1\] is \(2, 8\) but averages\[1\] is \(4, 4\)"):
        ema_update_(averages, [sources[0], sources[1].view(2, 8)], 0.5, backend="triton")
    with pytest.raises(ValueError, match=r"averages\[0\] is torch\.bfloat16"):
        ema_update_([a.bfloat16() for a in averages], sources, 0.5, backend="triton")
    with pytest.raises(ValueError, match=r"momentum=1\.5"):
        ema_update_(averages, sources, 1.5, backend="triton")


def test_a_plan_is_made_once_and_only_so_many_are_kept(monkeypatch):
    made = []
    plan = ema_plan.Plan
    monkeypatch.setattr(ema_plan, "_plans", OrderedDict())
    monkeypatch.setattr(ema_plan, "Plan", lambda *given: made.append(given) or plan(*given))
    alive = [([_square()], [_square()]) for _ in range(70)]
    for averages, sources in alive:
        for _ in range(3):
            _check_ema(averages, [source.clone() for source in sources])
    assert len(made) == 70
    assert len(ema_plan._plans) <= 64


class Trained:
    """A weight of 4 x 4 and a bias, their averages under one optimizer, and the same under
    torch's."""

    def __init__(self, backend: str) -> None:
        self.ours = [nn.Parameter(_square()), nn.Parameter(torch.ones(4, device=DEVICE))]
        self.theirs = [nn.Parameter(p.detach().clone()) for p in self.ours]
        self.averages = {p: p.detach().clone() for p in self.ours}
        self.expected = [p.detach().clone() for p in self.ours]
        options = {"lr": 0.1, "weight_decay": 0.1}
        self.own = AdamWEMA(self.ours, averages=self.averages, backend=backend, **options)
        self.torchs = torch.optim.AdamW(self.theirs, **options)

    def step(self, seed: int) -> None:
        """Gradients at new addresses, as after zero_grad(set_to_none=True)."""
        for mine, other in zip(self.ours, self.theirs, strict=True):
            gradient = torch.randn(mine.shape, generator=torch.Generator().manual_seed(seed)).to(
                DEVICE, mine.dtype
            )
            mine.grad, other.grad = gradient, gradient.clone()
        self.own.step(ema_momentum=0.5)
        self.torchs.step()
        for mine, other, average in zip(self.ours, self.theirs, self.expected, strict=True):
            average.lerp_(other.detach(), 0.5)
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
            for key in ("step", "exp_avg", "exp_avg_sq"):
                state, expected = self.own.state[mine][key], self.torchs.state[other][key]
                torch.testing.assert_close(state.cpu(), expected.cpu(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(self.averages[mine], average, rtol=1e-5, atol=1e-6)


def _replace_state(trained: Trained) -> None:
    """All of a parameter's state in another dictionary, the old one still alive."""
    weight = trained.ours[0]
    trained.own.state[weight] = {
        name: value.clone() for name, value in trained.own.state[weight].items()
    }


def _freeze_and_thaw(trained: Trained) -> None:
    for parameter in trained.ours:
        parameter.requires_grad_(False)
        parameter.requires_grad_(True)


ADAM_CHANGES = {
    "weight elsewhere": lambda t: setattr(t.ours[0], "data", t.ours[0].data.clone()),
    "average elsewhere": lambda t: setattr(
        t.averages[t.ours[0]], "data", t.averages[t.ours[0]].data.clone()
    ),
    "average transposed in memory": lambda t: setattr(
        t.averages[t.ours[0]], "data", t.averages[t.ours[0]].data.t().contiguous().t()
    ),
    "moment elsewhere": lambda t: setattr(
        t.own.state[t.ours[0]]["exp_avg"], "data", t.own.state[t.ours[0]]["exp_avg"].data.clone()
    ),
    "moment another tensor": lambda t: t.own.state[t.ours[0]].update(
        exp_avg=t.own.state[t.ours[0]]["exp_avg"].clone()
    ),
    "state another dictionary": _replace_state,
    "frozen and thawed": _freeze_and_thaw,
}


@pytest.mark.parametrize("name", ADAM_CHANGES)
@pytest.mark.parametrize("backend", ["triton", "foreach"])
def test_an_optimizer_follows_what_changes_under_its_tensors(name, backend):
    trained = Trained(backend)
    trained.step(0)
    trained.step(1)
    with torch.no_grad():
        ADAM_CHANGES[name](trained)
    trained.step(2)
    trained.step(3)


def test_gradients_that_move_upload_one_column_and_those_that_stay_none(monkeypatch):
    uploads, upload = [], PointerTable._upload
    monkeypatch.setattr(
        tables, "_tables", OrderedDict()
    )  # earlier tests' memory may have been handed out again

    def counted(self, addresses, first, end, capturing):
        uploads.append((first, end))
        upload(self, addresses, first, end, capturing)

    monkeypatch.setattr(PointerTable, "_upload", counted)
    plans = []
    plan = optimizer_module.Plan
    monkeypatch.setattr(
        optimizer_module, "Plan", lambda *given: plans.append(given) or plan(*given)
    )
    trained = Trained("triton")
    kept = []
    for seed in range(4):
        trained.step(seed)
        kept.append([p.grad for p in trained.ours])  # alive, so that the next ones lie elsewhere
    assert uploads == [(1, 2)] * 3
    assert len(plans) == 1
    trained.own.step(ema_momentum=0.5)
    assert len(uploads) == 3


@pytest.mark.gpu
def test_a_plan_made_outside_is_right_inside_a_capture_and_after_it():
    trained = Trained("triton")
    trained.step(0)
    trained.own.step(ema_momentum=0.5)
    before = [p.detach().clone() for p in trained.ours]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        trained.own.step(ema_momentum=0.5)
    assert all(torch.equal(p, b) for p, b in zip(trained.ours, before, strict=True))
    eager = Trained("triton")
    eager.step(0)
    for _ in range(3):
        eager.own.step(ema_momentum=0.5)
    graph.replay()
    graph.replay()
    for one, two in zip(trained.ours, eager.ours, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    captured = [p.grad for p in trained.ours]  # alive: the graph reads them
    for parameter, gradient in zip(trained.ours, captured, strict=True):
        parameter.grad = (
            gradient.clone()
        )  # an eager step with gradients elsewhere leaves the graph's addresses alone
    trained.own.step(ema_momentum=0.5)
    eager.own.step(ema_momentum=0.5)
    graph.replay()
    eager.own.step(ema_momentum=0.5)
    for one, two in zip(trained.ours, eager.ours, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
