"""Schedules against golden numbers, at their ends, and their errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fastmoco.config import Config, OptimConfig, resolve
from fastmoco.optim import Steps, ema_momentum, learning_rate, run_learning_rate, simclr_steps
from fastmoco.optim.schedule import run_end
from fastmoco.recipes import get_recipe

Golden = Callable[[str], dict[str, np.ndarray]]


@pytest.mark.parametrize("case", range(6))
def test_schedules_match_golden(golden: Golden, case: int) -> None:
    data = golden("schedule")
    base_lr, global_batch, epochs, warmup, steps_per_epoch, start = data[f"s{case}_cfg"].tolist()
    peak, per_epoch = base_lr * global_batch / 256, int(steps_per_epoch)
    for step, lr, m in zip(
        data[f"s{case}_iters"], data[f"s{case}_lr"], data[f"s{case}_m"], strict=True
    ):
        ours = learning_rate(
            int(step), peak=peak, epochs=epochs, warmup_epochs=warmup, steps_per_epoch=per_epoch
        )
        assert ours == pytest.approx(lr, rel=1e-12, abs=1e-15)
        ours = ema_momentum(int(step), start=start, epochs=epochs, steps_per_epoch=per_epoch)
        assert ours == pytest.approx(m, rel=1e-14)


def test_ends_of_a_run() -> None:
    shape = {"epochs": 10, "steps_per_epoch": 4}
    rates = [learning_rate(s, peak=2.0, warmup_epochs=3, **shape) for s in range(45)]
    assert rates[0] == 0
    assert rates[12] == 2.0
    assert max(rates) == 2.0
    assert 0 < rates[39] < 0.02
    assert rates[40:] == [0.0] * 5
    assert ema_momentum(0, start=0.99, **shape) == 0.99
    assert ema_momentum(40, start=0.99, **shape) == ema_momentum(99, start=0.99, **shape) == 1.0
    assert ema_momentum(17, start=0.99, schedule="constant", **shape) == 0.99
    assert learning_rate(40, peak=2.0, warmup_epochs=10, **shape) == 2.0


@pytest.mark.parametrize("case", range(2))
def test_cosine_steps_matches_simclr(golden: Golden, case: int) -> None:
    """By a config whose set has no whole number of batches, so SimCLR counts other steps than the
    run."""
    data = golden("siblings/simclr")
    base, batch, warmup, epochs, images = data[f"s{case}_cfg"].tolist()
    config = Config(
        epochs=epochs,
        global_batch_size=int(batch),
        optim=OptimConfig(
            lr=base,
            lr_scaling=str(data[f"s{case}_scaling"]),  # type: ignore[arg-type]
            schedule="cosine_steps",
            warmup_epochs=warmup,
        ),
    )
    resolved = resolve(config, world_size=1, sample_count=int(images))
    counted = simclr_steps(epochs, warmup, sample_count=int(images), global_batch_size=int(batch))
    assert counted.total == int(data[f"s{case}_total_steps"]) != resolved.total_steps
    rates = [run_learning_rate(step, config, resolved) for step in range(counted.total)]
    assert rates == pytest.approx(data[f"s{case}_lr_fp32"], abs=3e-7 * config.peak_lr)
    assert run_learning_rate(counted.total + 9, config, resolved) == 0


def test_cosine_steps_matches_byol(golden: Golden) -> None:
    data = golden("siblings/byol")
    for case in range(int(data["num_schedules"])):
        base, batch, warmup, total, _ = data[f"s{case}_cfg"].tolist()
        peak = base * batch / 256
        for step, rate in zip(data[f"s{case}_steps"].tolist(), data[f"s{case}_lr"], strict=True):
            ours = learning_rate(
                step,
                peak=peak,
                epochs=1,
                warmup_epochs=0,
                steps_per_epoch=1,
                schedule="cosine_steps",
                steps=Steps(int(warmup), int(total)),
            )
            assert abs(ours - rate) <= 1e-6 * peak


def test_cosine_inclusive_matches_swav(golden: Golden) -> None:
    data = golden("siblings/swav")
    for case in range(int(data["num_schedules"])):
        base, final, warmup, start, epochs, per_epoch = data[f"s{case}_cfg"].tolist()
        optim = OptimConfig(
            lr=base,
            lr_scaling="none",
            schedule="cosine_inclusive",
            warmup_epochs=warmup,
            warmup_lr=start,
            final_lr=final,
        )
        config = Config(epochs=epochs, global_batch_size=2, optim=optim)
        resolved = resolve(config, world_size=1, sample_count=2 * int(per_epoch))
        rates = [run_learning_rate(step, config, resolved) for step in range(resolved.total_steps)]
        assert rates == pytest.approx(data[f"s{case}_lr"], rel=1e-12)
        assert run_learning_rate(resolved.total_steps, config, resolved) == pytest.approx(final)


def test_cosine_inclusive_is_at_its_peak_twice() -> None:
    shape = {"peak": 2.0, "epochs": 5, "steps_per_epoch": 2, "schedule": "cosine_inclusive"}
    rates = [
        learning_rate(s, warmup_epochs=2, warmup_lr=0.5, final_lr=1.0, **shape) for s in range(11)
    ]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[10] == 1.0
    # A warm-up of one step has only its first value.
    assert learning_rate(0, warmup_epochs=0.5, warmup_lr=0.5, **shape) == 0.5
    assert learning_rate(1, warmup_epochs=0.5, warmup_lr=0.5, **shape) == 2.0


def test_cosine_unshifted_matches_moby(golden: Golden) -> None:
    """Of update t at step t + 1: the first two steps have the same rate."""
    data = golden("siblings_b/schedules")
    epochs, per_epoch, warmup, peak, start, least = data["moby/args"].tolist()
    optim = OptimConfig(
        lr=peak,
        lr_scaling="none",
        schedule="cosine_unshifted",
        warmup_epochs=warmup,
        warmup_lr=start,
        final_lr=least,
    )
    config = Config(epochs=epochs, global_batch_size=2, optim=optim)
    resolved = resolve(config, world_size=1, sample_count=2 * int(per_epoch))
    times = data["moby/t"].tolist()
    rates = [run_learning_rate(t + 1, config, resolved) for t in times]
    assert rates == pytest.approx(data["moby/lr"], rel=1e-12)
    assert run_learning_rate(0, config, resolved) == start
    assert run_end(config, resolved) == (times[-1] + 1, least)
    shape = {"start": float(data["moby/m0"]), "epochs": epochs, "steps_per_epoch": int(per_epoch)}
    momenta = [ema_momentum(t, **shape) for t in times]
    assert momenta == pytest.approx(data["moby/m"], rel=1e-14)


def test_cosine_per_epoch_is_constant_within_an_epoch() -> None:
    """SimSiam and the linear probe: `peak * 0.5 * (1 + cos(pi * epoch / epochs))`."""
    shape = {"peak": 2.0, "epochs": 4, "steps_per_epoch": 3, "schedule": "cosine_per_epoch"}
    rates = [learning_rate(s, warmup_epochs=0, **shape) for s in range(12)]
    by_epoch = [2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5]
    assert rates == pytest.approx([rate for rate in by_epoch for _ in range(3)])
    # A warm-up rises within epochs; one that ends within an epoch has the peak until its end.
    rates = [learning_rate(s, warmup_epochs=4 / 3, **shape) for s in range(7)]
    assert rates[:6] == pytest.approx([0, 0.5, 1, 1.5, 2, 2])
    assert rates[6] == pytest.approx(1 + np.cos(np.pi * (2 - 4 / 3) / (4 - 4 / 3)))


def test_steps_fall_at_the_milestones() -> None:
    """MoCo v1: a tenth from epoch 120 of 200, and a hundredth from 160; here 2 and 3 of 4."""
    shape = {"peak": 2.0, "epochs": 4, "steps_per_epoch": 3, "schedule": "steps"}
    rates = [learning_rate(s, warmup_epochs=1, milestones=(2, 3), **shape) for s in range(12)]
    expected = [0, 2 / 3, 4 / 3, 2, 2, 2, 0.2, 0.2, 0.2, 0.02, 0.02, 0.02]
    assert rates == pytest.approx(expected)

    # Of a run, and where it ends.
    config = get_recipe("moco_v1_r50_e200_b256")
    resolved = resolve(config, world_size=1, sample_count=256 * 10)
    rates = [run_learning_rate(epoch * 10, config, resolved) for epoch in (0, 119, 120, 159, 160)]
    assert rates == pytest.approx([0.03, 0.03, 0.003, 0.003, 0.0003])
    assert run_learning_rate(1199, config, resolved) == pytest.approx(0.03)
    assert run_end(config, resolved) == (2000, pytest.approx(0.0003))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": "steps"}, r"milestones=\(\): schedule=steps needs epochs"),
        ({"schedule": "steps", "milestones": (3.0, 2.0)}, "in ascending order"),
        ({"milestones": (3.0,)}, "needs schedule=steps"),
        ({"milestone_factor": 1.0}, "milestone_factor=1.0: must be above 0 and below 1"),
    ],
)
def test_wrong_milestones_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, "step=-1"),
        ({"steps_per_epoch": 0}, "steps_per_epoch=0"),
        ({"epochs": 0}, "epochs=0"),
        ({"warmup_epochs": 11}, "warmup_epochs=11: needs 0 <= warmup_epochs <= epochs=10"),
        ({"schedule": "linear"}, "schedule='linear'"),
        ({"schedule": "cosine_steps", "steps": Steps(3, 2)}, "warmup=3"),
    ],
)
def test_wrong_numbers_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learning_rate(
            **(
                {"step": 0, "peak": 1.0, "epochs": 10, "warmup_epochs": 1, "steps_per_epoch": 5}
                | change
            )
        )


def test_wrong_ema_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"start=1.5"):
        ema_momentum(0, start=1.5, epochs=1, steps_per_epoch=1)
    with pytest.raises(ValueError, match="schedule='linear'"):
        ema_momentum(0, start=0.9, epochs=1, steps_per_epoch=1, schedule="linear")  # type: ignore[arg-type]
