"""LARS as an optimizer, and its custom ops under torch's own checks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastmoco_kernels.lars.op import BACKENDS, lars_step_
from fastmoco_kernels.lars.optimizer import LARS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    return nn.Sequential(*layers).to(DEVICE, torch.float64)


def _gradients(model: nn.Module, seed: int) -> None:
    model.zero_grad()
    x = torch.randn(5, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    model(x.to(DEVICE)).square().mean().backward()


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 10.0 / (1 + step)
        _gradients(model, step)
        optimizer.step()


def test_it_follows_the_op_with_groups_of_their_own_and_skips_what_has_no_gradient() -> None:
    model = _model()
    frozen = nn.Parameter(torch.ones(2, 2, dtype=torch.float64, device=DEVICE))
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if n.startswith("0")], "weight_decay": 0.1},
        {
            "params": [p for n, p in named.items() if not n.startswith("0")] + [frozen],
            "momentum": 0.5,
        },
    ]
    optimizer = LARS(groups, lr=2.0, weight_decay=0.01)
    params = {n: p.detach().clone() for n, p in named.items()}
    buffers = {n: torch.zeros_like(p) for n, p in params.items()}
    for step in range(3):
        _gradients(model, step)
        optimizer.step()
        for name, param in params.items():
            own = (
                {"weight_decay": 0.1}
                if name.startswith("0")
                else {"weight_decay": 0.01, "momentum": 0.5}
            )
            grad = named[name].grad
            lars_step_([param], [grad], [buffers[name]], lr=2.0, backend="reference", **own)
            # The gradients come from the optimizer's model, whose parameters may differ in the last
            # bit.
            assert (param - named[name]).abs().max() <= 1e-13, name
    assert bool((frozen == 1).all())
    assert frozen not in optimizer.state


def test_the_rate_in_the_buffer_and_adaptation_by_group() -> None:
    """A matrix without and a vector with decay and trust ratio, at a rate that changes."""
    torch.manual_seed(0)
    start = [torch.randn(shape, dtype=torch.float64) for shape in ((3, 4), (5,), (2, 2), (6,))]
    parameters = [nn.Parameter(tensor.clone()) for tensor in start]
    groups = [
        {"params": parameters[:1], "adapt": False},
        {"params": parameters[1:2], "adapt": True},
        {"params": parameters[2:]},
    ]
    optimizer = LARS(groups, lr=0.0, weight_decay=0.1, lr_in_buffer=True)
    buffers = [torch.zeros_like(tensor) for tensor in start]
    for lr in (0.5, 2.0, 1.0):
        for group in optimizer.param_groups:
            group["lr"] = lr
        grads = [torch.randn_like(tensor) for tensor in start]
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        optimizer.step()
        for i, adapted in enumerate((False, True, True, False)):
            update = grads[i]
            if adapted:
                update = update + 0.1 * start[i]
                update = update * (0.001 * start[i].norm() / update.norm())
            buffers[i] = 0.9 * buffers[i] + lr * update
            start[i] = start[i] - buffers[i]
            assert (parameters[i] - start[i]).abs().max() <= 1e-14


def test_a_state_from_before_the_rate_could_be_in_the_buffer_is_read() -> None:
    model = _model()
    state = LARS(model.parameters(), lr=0.5).state_dict()
    for group in state["param_groups"]:
        del group["lr_in_buffer"], group["adapt"]
    optimizer = LARS(model.parameters(), lr=0.0)
    optimizer.load_state_dict(state)
    _gradients(model, 0)
    optimizer.step()


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_its_state_travels_by_torchs_conventions(backend: str) -> None:
    whole, cut = _model(), _model()
    optimizer = LARS(whole.named_parameters(), lr=0.0, weight_decay=1e-3, backend=backend)
    _train(whole, optimizer, range(6))

    first = LARS(cut.named_parameters(), lr=0.0, weight_decay=1e-3, backend=backend)
    _train(cut, first, range(2))
    state = copy.deepcopy(first.state_dict())
    assert [sorted(entry) for entry in state["state"].values()] == [["momentum_buffer"]] * 6
    assert state["param_groups"][0]["trust_coefficient"] == 0.001
    second = LARS(cut.named_parameters(), lr=1.0, backend=backend)
    second.load_state_dict(state)
    _train(cut, second, range(2, 6))
    for a, b in zip(whole.state_dict().values(), cut.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_sgd_reads_its_buffers() -> None:
    """One name for one thing: momentum_buffer means the same in torch's SGD."""
    model = _model()
    lars = LARS(model.parameters(), lr=0.0)
    _train(model, lars, range(1))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sgd.load_state_dict(
        {"state": lars.state_dict()["state"], "param_groups": sgd.state_dict()["param_groups"]}
    )
    before = model[0].weight.detach().clone()
    buffer = lars.state[model[0].weight]["momentum_buffer"]
    expected = before - 0.1 * (0.9 * buffer + model[0].weight.grad)
    sgd.step()
    assert (model[0].weight - expected).abs().max() <= 1e-15


@pytest.mark.parametrize("bad", [0.0, 1.0])
def test_guard_and_closure(bad: float) -> None:
    model = _model()
    optimizer = LARS(model.parameters(), lr=1.0)
    before = model[0].weight.detach().clone()

    def closure() -> torch.Tensor:
        model.zero_grad()
        loss = model(torch.ones(5, 2, 4, 4, dtype=torch.float64, device=DEVICE)).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure, found_inf=torch.tensor(bad, device=DEVICE)) > 0
    assert torch.equal(before, model[0].weight) == bool(bad)


def test_several_dtypes_in_one_group() -> None:
    wide, narrow = (
        nn.Parameter(torch.ones(3, 4, dtype=dtype)) for dtype in (torch.float64, torch.float32)
    )
    wide.grad, narrow.grad = torch.ones_like(wide), torch.ones_like(narrow)
    LARS([wide, narrow], lr=100.0).step()
    assert (wide - 0.9).abs().max() <= 1e-15
    assert (narrow - 0.9).abs().max() <= 1e-7


def test_it_learns() -> None:
    """Gradients here are of the size 1e-2 of what SGD would need at such a rate; the ratio sets the
    length of a step."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 32, bias=False), nn.Tanh(), nn.Linear(32, 1, bias=False))
    x = torch.randn(64, 8)
    y = x[:, :1] * 1e-2
    optimizer = LARS(model.parameters(), lr=5.0, weight_decay=1e-6)
    losses = []
    for _ in range(60):
        model.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"momentum": 1.5}, "momentum=1.5"),
        ({"trust_coefficient": -1.0}, "trust_coefficient=-1.0"),
        ({"backend": "apex"}, "backend='apex' is none of"),
    ],
)
def test_wrong_numbers_are_named(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        LARS([nn.Parameter(torch.ones(2))], **{"lr": 1.0, **options})


def test_a_wrong_number_in_a_group_is_named_at_the_step() -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    optimizer = LARS([{"params": [parameter], "momentum": 2.0}], lr=1.0)
    with pytest.raises(ValueError, match=r"momentum=2\.0"):
        optimizer.step()


def _op_arguments() -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    draw = [
        [torch.randn(shape, generator=generator).to(DEVICE) for shape in ((3, 4), (5,))]
        for _ in range(3)
    ]
    return draw[0], draw[1], draw[2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    params, grads, buffers = _op_arguments()
    adapt = [True, False]
    arguments: tuple[object, ...] = (params, grads, 0.1, adapt, backend)
    torch.library.opcheck(torch.ops.fastmoco.lars_squares.default, arguments)
    squares = torch.ones(2, 2, dtype=torch.float64, device=DEVICE)
    found_inf = torch.zeros(1, device=DEVICE)
    for lr, found, inside in (
        (torch.tensor(0.1), None, True),
        (torch.tensor(0.1, dtype=torch.float64), found_inf, False),
    ):
        numbers = (lr, adapt, 0.9, 0.1, 0.001, found, inside, backend)
        arguments = (params, grads, buffers, squares, *numbers)
        torch.library.opcheck(torch.ops.fastmoco.lars_update_.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_without_a_graph_break(backend: str) -> None:
    def step(
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        buffers: list[torch.Tensor],
        lr: torch.Tensor,
    ):
        lars_step_(
            params, [g * 2 for g in grads], buffers, lr=lr, weight_decay=0.1, backend=backend
        )
        return params[0].sum()

    eager, compiled = _op_arguments(), _op_arguments()
    fast = torch.compile(step, backend="aot_eager", fullgraph=True)
    for lr in (torch.tensor(0.5), torch.tensor(0.25)):
        assert torch.equal(fast(*compiled, lr), step(*eager, lr))
    for a, b in zip(eager[0] + eager[2], compiled[0] + compiled[2], strict=True):
        assert torch.equal(a, b)
