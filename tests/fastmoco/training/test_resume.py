"""What a run that continues reports about its learning rate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastmoco.config import Config, resolve
from fastmoco.config.serial import to_json
from fastmoco.training.resume import schedule_changes

SAVED = replace(Config(), epochs=10, optim=replace(Config().optim, warmup_epochs=1))


def change(config, step):
    """What is said at a step of a run with ten steps per epoch."""
    checkpoint = SimpleNamespace(
        state={"config": to_json(SAVED)}, step=step, path=Path("run/checkpoints/step_1")
    )
    now = resolve(config, world_size=1, sample_count=10 * config.global_batch_size)
    return schedule_changes(checkpoint, config, now)


def test_more_epochs_raise_the_learning_rate_again():
    # Peak 0.0024; e = 9 of 10 epochs, then of 19: 0.0024 * 0.5 * (1 + cos(pi * 8 / 9 or 18)).
    assert change(replace(SAVED, epochs=19), 90) == (
        "epochs 10 -> 19: the schedule spans all epochs, so the learning rate of step 90 is "
        "0.00141 instead of 7.24e-05: it rises again, and reaches 0 after step 190 instead of 100"
    )


def test_another_schedule_is_named_with_its_end():
    optim = replace(
        SAVED.optim, schedule="cosine_inclusive", final_lr=1e-3, lr_scaling="none", lr=2.4e-3
    )
    text = change(replace(SAVED, optim=optim), 90)
    assert text.startswith(
        "optim.lr 0.00015 -> 0.0024, optim.lr_scaling linear -> none, optim.schedule cosine -> "
        "cosine_inclusive, optim.final_lr 0 -> 0.001: "
    )
    assert text.endswith(", and reaches 0.001 after step 100 instead of 0 after step 100")


def test_simclr_counts_steps_of_its_own():
    """Ten batches of an epoch and no rest: 100 steps, and one more."""
    text = change(replace(SAVED, optim=replace(SAVED.optim, schedule="cosine_steps")), 90)
    assert text.endswith("and reaches 0 after step 101 instead of 100")


def test_a_lower_rate_is_named_without_a_rise():
    lower = replace(SAVED, optim=replace(SAVED.optim, lr=1e-5))
    text = change(lower, 50)
    assert text.startswith("optim.lr 0.00015 -> 1e-05: ")
    assert "rises" not in text


@pytest.mark.parametrize("config", [SAVED, replace(SAVED, log_every_steps=3)])
def test_an_unchanged_schedule_is_not_mentioned(config):
    assert change(config, 50) is None
