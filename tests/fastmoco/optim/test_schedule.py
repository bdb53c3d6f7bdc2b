"""Schedules against golden numbers, at their ends, and their errors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fastmoco.optim import ema_momentum, learning_rate

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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, "step=-1"),
        ({"steps_per_epoch": 0}, "steps_per_epoch=0"),
        ({"epochs": 0}, "epochs=0"),
        ({"warmup_epochs": 11}, "warmup_epochs=11: needs 0 <= warmup_epochs <= epochs=10"),
    ],
)
def test_wrong_numbers_are_named(change: dict[str, int], message: str) -> None:
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
