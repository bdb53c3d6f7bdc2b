"""Who decides on a step that is to be skipped: the device, for every optimizer but apex's."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from fastmoco import setup_run
from fastmoco.config import resolve
from fastmoco.recipes import quickstart_digits
from fastmoco.update import scheduled, update_weights


@pytest.mark.parametrize("optim", [{"fused_backend": "torch"}, {"name": "lars"}])
def test_the_host_does_not_wait_for_the_flag(optim: dict[str, str]) -> None:
    """Fake tensors have no numbers: whoever asks the host for one fails. (The sweep's plans bypass them; test_skip_step.py.)"""
    config = replace(quickstart_digits(), precision="fp32")
    config = replace(config, optim=replace(config.optim, **optim))  # type: ignore[arg-type]
    with FakeTensorMode():
        objective = setup_run.build_model(config)
        optimizer = setup_run.build_optimizer(config, objective)
        for parameter in objective.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        update_weights(optimizer, objective, None, found_inf=torch.zeros(()))
        waits = torch.optim.AdamW(objective.parameters(), foreach=True)
        with pytest.raises(DataDependentOutputException):
            update_weights(waits, objective, None, found_inf=torch.zeros(()))


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_rates_follow_every_number_of_the_config(schedule: str) -> None:
    """Against the definitions, with no number at its default."""
    recipe = quickstart_digits()
    config = replace(
        recipe,
        epochs=7,
        global_batch_size=64,
        optim=replace(recipe.optim, lr=0.03, warmup_epochs=2),
        objective=replace(recipe.objective, ema_momentum=0.9, ema_schedule=schedule),
    )
    resolved = resolve(config, world_size=1, sample_count=700)
    assert resolved.steps_per_epoch == 10
    peak = 0.03 * 64 / 256
    for step in range(70):
        epoch = step / 10
        cosine = 0.5 * (1 + math.cos(math.pi * (epoch - 2) / 5))
        rising = 1 - 0.5 * (1 + math.cos(math.pi * epoch / 7)) * 0.1
        lr, momentum = scheduled(config, resolved, step)
        assert lr == pytest.approx(peak * (epoch / 2 if epoch < 2 else cosine), rel=1e-12)
        assert momentum == pytest.approx(rising if schedule == "cosine" else 0.9, rel=1e-12)
