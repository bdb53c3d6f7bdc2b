"""The base of the optimizers: torch's behavior, without torch._dynamo."""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys

import pytest
import torch
from torch import nn

from fastmoco_kernels import LARS, AdamWEMA
from fastmoco_kernels.eager_optimizer import EagerOptimizer

WHOLE_LIFE = """
import sys, torch
from fastmoco_kernels import LARS, AdamWEMA

layer = torch.nn.Linear(3, 2)
for kind in (AdamWEMA, LARS):
    optimizer = kind(layer.parameters(), lr=0.1)
    layer(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.zero_grad()
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    assert isinstance(optimizer, torch.optim.Optimizer)
assert "torch._dynamo" not in sys.modules
torch.optim.SGD(layer.parameters(), lr=0.1)
assert "torch._dynamo" in sys.modules
"""
"""The last two lines fail if torch no longer needs the base; then it can go."""


class Descent(EagerOptimizer):
    """Gradient descent."""

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(param.grad, alpha=group["lr"])


def test_the_whole_life_of_an_optimizer_needs_no_dynamo() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WHOLE_LIFE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("imported", [False, True], ids=["without dynamo", "with dynamo"])
@pytest.mark.parametrize("kind", [AdamWEMA, LARS])
def test_methods_are_those_of_torch(
    kind: type[torch.optim.Optimizer], imported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if imported:
        importlib.import_module("torch._dynamo")
    else:
        monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    one, two = (nn.Linear(3, 2) for _ in range(2))
    optimizer = kind([{"params": one.parameters(), "lr": 0.2}], lr=0.1)
    optimizer.add_param_group({"params": two.parameters()})
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.1]
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": one.parameters()})

    # Hooks run once, and a loaded state is a copy.
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("step"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("save"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("load"))
    two(one(torch.ones(4, 3)).relu() @ torch.ones(2, 3)).sum().backward()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    assert calls == ["step", "save", "load"]
    again = optimizer.state_dict()["state"]
    for number, state in saved["state"].items():
        for name, value in state.items():
            assert torch.equal(value, again[number][name])
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in (*one.parameters(), *two.parameters()))


def test_a_step_can_be_compiled() -> None:
    plain, compiled = (nn.Parameter(torch.arange(3.0)) for _ in range(2))
    expected, optimizer = Descent([plain], {"lr": 0.5}), Descent([compiled], {"lr": 0.5})

    @torch.compile(backend="eager")
    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        for parameter in (plain, compiled):
            parameter.square().sum().backward()
        expected.step()
        expected.zero_grad()
        step()
    assert torch.equal(plain, compiled)
    assert compiled.grad is None
