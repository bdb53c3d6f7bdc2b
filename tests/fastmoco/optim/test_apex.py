"""The adapter to NVIDIA apex, which cannot be installed here: a test double stands in for the
import, with torch's numbers.

What the double copies from apex: steps counted by group and only from the first on, `zero_grad()`
without arguments, no named parameters, Adam's list of master weights, which is made with the groups
and ends its steps, and in LAMB a global norm that is clipped to 1 unless told otherwise, no trust
ratio without decay, and gradients overwritten with the update.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

from benchmarks.gpu import smoke_apex
from benchmarks.gpu.checks import Place
from benchmarks.gpu.smoke_apex import apex_check
from fastmoco.checkpoint import flatten_optimizer, restore_optimizer
from fastmoco.config import Config, OptimConfig
from fastmoco.distributed.mesh import World
from fastmoco.optim import apex as adapter
from fastmoco.optim import build_adamw, build_apex
from fastmoco.optim.build import build_optimizer, name_of
from fastmoco.optim.groups import ParameterGroup, set_learning_rates
from fastmoco.recipes import quickstart_digits
from fastmoco.run.folder import RunFolder
from fastmoco.training.trainer import Trainer

NUMBERS = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.98), "eps": 1e-8}
OPTIMIZERS = """
import torch

class _Counted(torch.optim.Optimizer):
    def __init__(self, params, lr, betas, eps, weight_decay, adam_w_mode, **more):
        params = list(params)
        assert adam_w_mode and all(type(p) is torch.nn.Parameter for p in params)
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **more))

    def zero_grad(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def paired(self):
        return [(group, group["params"]) for group in self.param_groups]

    def clip(self):
        return 1.0

    @torch.no_grad()
    def step(self, closure=None):
        clip = self.clip()
        for group, params in self.paired():
            group["step"] = group["step"] + 1 if "step" in group else 1
            (beta1, beta2), t = group["betas"], group["step"]
            for p in (p for p in params if p.grad is not None):
                state, grad = self.state[p], p.grad / clip
                if len(state) == 0:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["exp_avg"].lerp_(grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                m, v = state["exp_avg"] / (1 - beta1**t), state["exp_avg_sq"] / (1 - beta2**t)
                self.move(group, p, m / (v.sqrt() + group["eps"]) + group["weight_decay"] * p)

class FusedAdam(_Counted):
    def __init__(self, params, **more):
        super().__init__(params, **more)
        self.param_groups_master = [
            {"params": [None for _ in group["params"]]} for group in self.param_groups
        ]

    def paired(self):
        for group, masters in zip(self.param_groups, self.param_groups_master):
            yield group, [p for p, _ in zip(group["params"], masters["params"])]

    def move(self, group, p, update):
        p.sub_(group["lr"] * update)

class FusedLAMB(_Counted):
    def __init__(self, params, max_grad_norm=1.0, **more):
        super().__init__(params, max_grad_norm=max_grad_norm, **more)

    def clip(self):
        grads = [p.grad for _, params in self.paired() for p in params if p.grad is not None]
        norm, limit = torch.stack([grad.norm() for grad in grads]).norm(), self.defaults["max_grad_norm"]
        return norm / limit if norm > limit else 1.0

    def move(self, group, p, update):
        ratio = p.norm() / update.norm() if group["weight_decay"] else 1.0
        p.sub_(group["lr"] * ratio * update)
        p.grad.copy_(update)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Writes modules into a folder at the head of sys.path; both are gone after the test."""

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    monkeypatch.syspath_prepend(tmp_path)
    for name in ("apex", "apex.optimizers", "amp_C"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield write
    for name in ("apex", "apex.optimizers", "amp_C"):
        sys.modules.pop(name, None)


@pytest.fixture
def double(place: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """apex as NVIDIA's is laid out, on the CPU."""
    place({"apex/__init__.py": "", "amp_C.py": "", "apex/optimizers.py": OPTIMIZERS})
    monkeypatch.setattr(adapter, "DEVICES", ("cpu", "cuda"))


def _model() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    module[0].weight.requires_grad_(False)
    return module


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        model.zero_grad()
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()


def _distance(one: nn.Module, two: nn.Module) -> float:
    return max(
        (a - b).abs().max().item() for a, b in zip(one.parameters(), two.parameters(), strict=True)
    )


@pytest.mark.usefixtures("double")
def test_adamw_is_the_adamw_of_torch_and_its_state_travels_both_ways() -> None:
    expected = _model()
    _train(expected, build_adamw(expected.named_parameters(), **NUMBERS), range(8))

    builds = {
        "apex": lambda model: build_apex("adamw", model.named_parameters(), **NUMBERS),
        "torch": lambda model: build_adamw(model.named_parameters(), **NUMBERS),
    }
    for first, then in (("apex", "apex"), ("apex", "torch"), ("torch", "apex")):
        model = _model()
        optimizer = builds[first](model)
        _train(model, optimizer, range(3))
        tensors = flatten_optimizer(optimizer, model.named_parameters())
        assert tensors["optimizer.2.bias.step"].item() == 3
        optimizer = builds[then](model)
        restore_optimizer(optimizer, model.named_parameters(), tensors)
        _train(model, optimizer, range(3, 8))
        assert _distance(model, expected) <= 1e-6, (first, then)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("backend", ["apex", "torch"])
def test_two_groups_are_those_of_torch_and_resume(backend: Literal["apex", "torch"]) -> None:
    def build(model: nn.Module, backend: Literal["apex", "torch"]) -> torch.optim.Optimizer:
        config = replace(
            quickstart_digits(), optim=OptimConfig(fused_backend=backend, weight_decay=0.1)
        )
        own = ParameterGroup(lr_scale=0.5, constant_lr=True, weight_decay_scale=0.0)
        optimizer = build_optimizer(
            config,
            model.named_parameters(),
            {},
            lambda name, parameter: own if name.startswith("2.") else ParameterGroup(),
        ).inner
        set_learning_rates(optimizer.param_groups, 1e-2, peak=4e-2)
        assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 2e-2]
        return optimizer

    expected = _model()
    _train(expected, build(expected, "torch"), range(8))
    model = _model()
    optimizer = build(model, "apex")
    _train(model, optimizer, range(3))
    tensors = flatten_optimizer(optimizer, model.named_parameters())
    optimizer = build(model, backend)
    restore_optimizer(optimizer, model.named_parameters(), tensors)
    _train(model, optimizer, range(3, 8))
    assert _distance(model, expected) <= 1e-6


@pytest.mark.usefixtures("double")
def test_lamb_comes_without_apexs_clipping_and_holds_what_trains() -> None:
    model = _model()
    optimizer = build_apex("lamb", model.named_parameters(), **NUMBERS)
    (group,) = optimizer.param_groups
    assert type(optimizer).__module__ == "apex.optimizers"
    assert group["max_grad_norm"] == float("inf")
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (
        1e-2,
        0.1,
        (0.9, 0.98),
        1e-8,
    )
    assert len(group["params"]) == 5
    before = model[2].weight.detach().clone()
    _train(model, optimizer, range(1))
    assert ((model[2].weight - before).norm() / before.norm()).item() == pytest.approx(
        1e-2, rel=1e-4
    )


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_the_trainer_trains_and_continues_with_it_bit_for_bit(
    small_run: Config, tmp_path: Path, name: str
) -> None:
    optim = replace(small_run.optim, name=name, fused_backend="apex", lr=1e-3, warmup_epochs=0.0)
    part = 5 / (1437 // 32)  # five steps of an epoch of the digits
    config = replace(small_run, epochs=part, global_batch_size=32, optim=optim)
    losses = []
    for folder, pieces in (("whole", (None,)), ("cut", (2, None))):
        for max_steps in pieces:
            trainer = Trainer.build(config, tmp_path / folder, World())
            try:
                assert (
                    name_of(trainer.optimizer)
                    == f"apex Fused{'Adam' if name == 'adamw' else 'LAMB'}"
                )
                trainer.run(max_steps)
                trainer._save(force=True)
            finally:
                trainer.close()
        losses.append(RunFolder(tmp_path / folder).read_metric("loss"))
    assert losses[0] == losses[1]
    assert len(losses[0]) == 5


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_the_check_for_a_gpu_passes_and_finds_a_wrong_count(
    name: Literal["adamw", "lamb"], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(device=torch.device("cpu"), narrow=torch.float32, dry=True)
    errors = apex_check(name)(place)
    assert all(error <= limit for error, limit in errors.values()), errors

    def forgetful(optimizer: torch.optim.Optimizer, *given: object) -> None:
        restore_optimizer(optimizer, *given)
        for group in optimizer.param_groups:
            group["step"] = 0

    monkeypatch.setattr(smoke_apex, "restore_optimizer", forgetful)
    error, limit = apex_check(name)(place)["resumed"]
    assert error > 100 * limit


def _refusal(**changes: object) -> list[str]:
    with pytest.raises(ValueError, match=r"^fused_backend='apex': ") as error:
        build_apex("lamb", _model().named_parameters(), **(NUMBERS | changes))
    return str(error.value).splitlines()


def test_a_missing_apex_is_said_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    real = adapter.importlib.util.find_spec
    monkeypatch.setattr(
        adapter.importlib.util, "find_spec", lambda name: None if name == "apex" else real(name)
    )
    lines = _refusal()
    assert len(lines) == 3
    assert "is not installed" in lines[0]
    assert "github.com/NVIDIA/apex" in lines[1]
    assert "fused-backend auto" in lines[2]


def test_the_package_indexs_apex_is_known_without_running_it(place: Callable[..., None]) -> None:
    place({"apex/__init__.py": "raise SystemExit('somebody else ran')", "apex/lib.py": ""})
    lines = _refusal()
    assert len(lines) == 4
    assert "is another project of that" in lines[0]
    assert "pip uninstall apex" in lines[2]


def test_an_apex_without_kernels_is_said(place: Callable[..., None]) -> None:
    place({"apex/__init__.py": "raise SystemExit('not yet')", "apex/optimizers.py": ""})
    lines = _refusal()
    assert len(lines) == 4
    assert "without its CUDA kernels (there is no module amp_C)" in lines[0]


def test_weights_that_its_kernels_cannot_read_are_refused(place: Callable[..., None]) -> None:
    place(
        {
            "apex/__init__.py": "",
            "amp_C.py": "",
            "apex/optimizers.py": "raise SystemExit('not needed')",
        }
    )
    lines = _refusal()
    assert len(lines) == 3
    assert (
        "0.bias is torch.float32 on cpu; apex's kernels update float32 weights on cuda" in lines[0]
    )


def test_the_config_names_what_does_not_exist() -> None:
    with pytest.raises(ValueError, match=r"fused_backend='auto': lamb is available as \('apex',\)"):
        OptimConfig(name="lamb")
    with pytest.raises(
        ValueError, match=r"fused_backend='apex': lars is available as \('auto', 'fastmoco'\)"
    ):
        OptimConfig(name="lars", fused_backend="apex")


def test_nobody_imports_it_unasked(tmp_path: Path) -> None:
    (tmp_path / "apex.py").write_text("raise SystemExit('imported')")
    (tmp_path / "amp_C.py").write_text("raise SystemExit('imported')")
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1])\n"
        "import fastmoco.optim, fastmoco.training.trainer\n"
        "from fastmoco.objectives.build import build_objective\n"
        "from fastmoco.optim.build import build_optimizer\n"
        "from fastmoco.recipes import quickstart_digits\n"
        "config = quickstart_digits()\n"
        "objective = build_objective(config, torch.device('cpu'))\n"
        "build_optimizer(config, objective.named_parameters(), objective.averages())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
