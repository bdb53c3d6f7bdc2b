"""The optimizer: torch.optim.AdamW's numbers and its state, both ways; averages, groups, plans."""

from __future__ import annotations

import copy
import itertools
import weakref

import pytest
import torch
from torch import nn

from fastmoco_kernels.adamw_ema import optimizer as optimizer_module
from fastmoco_kernels.adamw_ema.optimizer import AdamWEMA

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["triton", "foreach"]
OPTIONS = {"lr": 0.01, "weight_decay": 0.1}


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 33), nn.GELU(), nn.Linear(33, 5)).to(DEVICE)


def _train(model, optimizer, steps: int, seed: int = 0, **options) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 7, generator=generator).to(DEVICE)).square().mean().backward()
        optimizer.step(**options)


def _close(one: nn.Module, two: nn.Module) -> None:
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fused", [True, False])
def test_state_moves_to_torch_and_back(backend, fused):
    ours, theirs = _model(), _model()
    own = AdamWEMA(ours.named_parameters(), **OPTIONS, backend=backend)
    torchs = torch.optim.AdamW(theirs.named_parameters(), **OPTIONS, fused=fused)
    _train(ours, own, 3)
    _train(theirs, torchs, 3)
    _close(ours, theirs)
    of_own, of_torchs = copy.deepcopy(own.state_dict()), copy.deepcopy(torchs.state_dict())
    assert of_own["param_groups"][0].keys() == of_torchs["param_groups"][0].keys()
    assert of_own["param_groups"][0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert (
        of_own["state"][0].keys()
        == of_torchs["state"][0].keys()
        == {"step", "exp_avg", "exp_avg_sq"}
    )
    own, torchs = (
        AdamWEMA(ours.named_parameters(), lr=9.0, backend=backend),
        torch.optim.AdamW(theirs.named_parameters()),
    )
    own.load_state_dict(of_torchs)
    torchs.load_state_dict(of_own)
    assert own.param_groups[0]["lr"] == torchs.param_groups[0]["lr"] == 0.01
    _train(ours, own, 3, seed=1)
    _train(theirs, torchs, 3, seed=1)
    _close(ours, theirs)
    assert (
        own.state[ours[0].weight]["step"].item()
        == torchs.state[theirs[0].weight]["step"].item()
        == 6
    )


def test_a_state_with_amsgrad_is_refused():
    model = _model()
    torchs = torch.optim.AdamW(model.parameters(), amsgrad=True)
    _train(model, torchs, 1)
    with pytest.raises(ValueError, match="amsgrad=True"):
        AdamWEMA(model.parameters()).load_state_dict(torchs.state_dict())


@pytest.mark.parametrize("backend", BACKENDS)
def test_averages_follow_and_a_predictor_has_none(backend):
    model, plain = _model(), _model()
    encoder, twin = list(model[0].parameters()), _model()
    averages = dict(zip(encoder, twin[0].parameters(), strict=True))
    own = AdamWEMA(model.parameters(), **OPTIONS, averages=averages, backend=backend)
    torchs = torch.optim.AdamW(plain.parameters(), **OPTIONS)
    expected = [p.detach().clone() for p in encoder]
    for step in range(3):
        _train(model, own, 1, seed=step, ema_momentum=0.9)
        _train(plain, torchs, 1, seed=step)
        for average, param in zip(expected, plain[0].parameters(), strict=True):
            average.lerp_(param.detach(), 0.1)
    for average, param in zip(expected, encoder, strict=True):
        torch.testing.assert_close(averages[param].detach(), average, rtol=1e-5, atol=1e-6)
    before = [a.detach().clone() for a in averages.values()]
    _train(model, own, 1, seed=9)
    assert all(torch.equal(a, b) for a, b in zip(averages.values(), before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_have_their_own_numbers_and_parameters_without_gradient_wait(backend):
    ours, theirs = _model(), _model()

    def groups(model):
        return [
            {"params": [model[0].weight, model[2].weight], "lr": 0.02},
            {
                "params": [model[0].bias, model[2].bias],
                "weight_decay": 0.0,
                "betas": (0.8, 0.95),
                "eps": 1e-4,
            },
        ]

    own, torchs = (
        AdamWEMA(groups(ours), **OPTIONS, backend=backend),
        torch.optim.AdamW(groups(theirs), **OPTIONS),
    )
    for model, optimizer in ((ours, own), (theirs, torchs)):
        _train(model, optimizer, 2)
        model[2].weight.requires_grad_(False)
        _train(model, optimizer, 2, seed=1)
        model[2].weight.requires_grad_(True)
        optimizer.param_groups[0]["lr"] = 0.003
        _train(model, optimizer, 2, seed=2)
    _close(ours, theirs)
    assert [own.state[p]["step"].item() for p in (ours[0].weight, ours[2].weight)] == [6, 4]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_new_plan_is_made_only_where_something_changed(backend, monkeypatch):
    made = itertools.count()
    plan = optimizer_module.Plan

    def counted(*arguments):
        next(made)
        return plan(*arguments)

    monkeypatch.setattr(optimizer_module, "Plan", counted)
    model, plain = _model(), _model()
    own, torchs = (
        AdamWEMA(model.parameters(), **OPTIONS, backend=backend),
        torch.optim.AdamW(plain.parameters(), **OPTIONS),
    )
    _train(model, own, 4)
    assert next(made) == 1
    state = own.state[model[0].weight]
    state["exp_avg"] = state["exp_avg"].clone()  # restored from a checkpoint, say
    _train(model, own, 1, seed=1)
    assert next(made) == 3
    own.load_state_dict(own.state_dict())
    _train(model, own, 1, seed=2)
    assert next(made) == 5
    for steps, seed in ((4, 0), (1, 1), (1, 2)):
        _train(plain, torchs, steps, seed=seed)
    _close(model, plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_outlives_its_step(backend):
    model = _model()
    own = AdamWEMA(model.parameters(), **OPTIONS, backend=backend)
    for seed in range(2):  # the step that makes the plan, and one that finds it
        _train(model, own, 1, seed=seed)
        gradients = [weakref.ref(p.grad) for p in model.parameters()]
        own.zero_grad()
        assert all(gradient() is None for gradient in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_grad_scaler_skips_the_bad_step_and_the_next_is_right(backend):
    ours, theirs = _model(), _model()
    own, torchs = (
        AdamWEMA(ours.parameters(), **OPTIONS, backend=backend),
        torch.optim.AdamW(theirs.parameters(), **OPTIONS),
    )
    scaler = torch.amp.GradScaler(DEVICE, init_scale=4.0)
    x = torch.randn(8, 7, device=DEVICE)
    for bad in (False, True, False):
        own.zero_grad()
        scaler.scale(ours(x).square().mean()).backward()
        if bad:
            ours[0].weight.grad[0, 0] = torch.inf
        scaler.step(own)
        scaler.update()
        if not bad:
            torchs.zero_grad()
            theirs(x).square().mean().backward()
            torchs.step()
    _close(ours, theirs)
    assert own.state[ours[0].weight]["step"].item() == 2


def test_closure_lr_schedulers_and_found_inf_by_hand():
    model = _model()
    own = AdamWEMA(model.parameters(), **OPTIONS)
    schedule = torch.optim.lr_scheduler.LambdaLR(own, lambda step: 0.5**step)

    def closure() -> float:
        own.zero_grad()
        loss = model(torch.ones(2, 7, device=DEVICE)).square().mean()
        loss.backward()
        return loss.item()

    first = own.step(closure)
    schedule.step()
    assert own.param_groups[0]["lr"] == 0.005
    assert own.step(closure) < first
    before = [p.detach().clone() for p in model.parameters()]
    own.step(closure, found_inf=torch.ones((), device=DEVICE))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_group_may_be_empty():
    model = _model()
    own = AdamWEMA([{"params": list(model.parameters())}, {"params": []}], **OPTIONS)
    _train(model, own, 1)
    assert own.state[model[0].weight]["step"].item() == 1


def test_an_optimizer_can_be_copied():
    model = _model()
    own = AdamWEMA(model.parameters(), **OPTIONS)
    _train(model, own, 2)
    twin_model, twin = copy.deepcopy((model, own))
    _train(model, own, 2, seed=1)
    _train(twin_model, twin, 2, seed=1)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), twin_model.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"betas": (1.0, 0.9)}, "beta1=1.0"),
        (
            {"averages": {torch.ones(3): torch.ones(3)}},
            r"key 0 of averages, \(3,\), is none of the 1 parameters",
        ),
    ],
)
def test_errors_name_both_numbers(options, text):
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=text):
        AdamWEMA([weight], **options)
    with pytest.raises(ValueError, match=r"averages has \(3,\) for a parameter of \(2,\)"):
        AdamWEMA([weight], averages={weight: torch.ones(3)})
    weight.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"averages\[0\] is torch.bfloat16"):
        AdamWEMA([weight], averages={weight: torch.ones(2).bfloat16()}).step(ema_momentum=0.5)
    with pytest.raises(ValueError, match=r"ema_momentum=2\.0"):
        AdamWEMA([weight]).step(ema_momentum=2.0)
