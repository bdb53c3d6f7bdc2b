"""Who decides on a step that is to be skipped: the device, for every optimizer but apex's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from fastmoco.objectives.build import build_model
from fastmoco.optim.build import build_optimizer
from fastmoco.recipes import quickstart_digits
from fastmoco.training.update import update_weights


@pytest.mark.parametrize("optim", [{"fused_backend": "torch"}, {"name": "lars"}])
def test_the_host_does_not_wait_for_the_flag(optim: dict[str, str]) -> None:
    """Fake tensors have no numbers: whoever asks the host for one fails. (The sweep's plans bypass them; test_skip_step.py.)"""
    config = replace(quickstart_digits(), precision="fp32")
    config = replace(config, optim=replace(config.optim, **optim))  # type: ignore[arg-type]
    with FakeTensorMode():
        objective = build_model(config)
        optimizer = build_optimizer(config, objective.named_parameters(), objective.averages())
        for parameter in objective.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        update_weights(optimizer, objective, None, found_inf=torch.zeros(()))
        waits = torch.optim.AdamW(objective.parameters(), foreach=True)
        with pytest.raises(DataDependentOutputException):
            update_weights(waits, objective, None, found_inf=torch.zeros(()))
