import math

import pytest

from fastmoco.telemetry.metrics import Throughput


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_speed_wait_and_eta_of_an_interval() -> None:
    clock = Clock()
    meter = Throughput(global_batch_size=64, total_steps=30, clock=clock)
    for _ in range(10):
        clock.now += 0.5
        meter.step(wait_seconds=0.1)
    speed = meter.report()
    assert speed.images_per_s == pytest.approx(64 / 0.5)
    assert speed.wait_share == pytest.approx(0.2)
    assert speed.eta_s == pytest.approx(20 * 0.5)


def test_each_interval_stands_for_itself_and_the_eta_follows_smoothly() -> None:
    clock = Clock()
    meter = Throughput(global_batch_size=8, total_steps=100, clock=clock)
    clock.now += 50.0  # the first step compiles: no time left follows from it
    meter.step(0.9)
    assert math.isnan(meter.report().eta_s)
    clock.now += 1.0
    meter.step(0.9)
    assert meter.report().eta_s == pytest.approx(98 * 1.0)
    clock.now += 2.0
    meter.step(0.0)
    speed = meter.report()
    assert speed.images_per_s == pytest.approx(4.0)
    assert speed.wait_share == 0.0
    assert speed.eta_s == pytest.approx(97 * 1.3)


def test_pauses_count_for_nothing() -> None:
    clock = Clock()
    meter = Throughput(global_batch_size=10, total_steps=4, clock=clock)
    for _ in range(2):
        clock.now += 1.0
        meter.step(0.5)
    with meter.paused():
        clock.now += 6.0
    speed = meter.report()
    assert speed.images_per_s == pytest.approx(10.0)
    assert speed.wait_share == pytest.approx(0.5)
    assert speed.eta_s == pytest.approx(2 * 1.0)


def test_a_pause_that_raises_is_a_pause_all_the_same() -> None:
    clock = Clock()
    meter = Throughput(global_batch_size=10, total_steps=4, clock=clock)
    clock.now += 1.0
    meter.step(0.0)

    def fail() -> None:
        with meter.paused():
            clock.now += 9.0
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert meter.report().images_per_s == pytest.approx(10.0)


def test_after_a_resume_only_the_rest_is_left() -> None:
    clock = Clock()
    meter = Throughput(global_batch_size=1, total_steps=100, first_step=90, clock=clock)
    for _ in range(2):
        clock.now += 2.0
        meter.step(0.0)
    assert meter.report().eta_s == pytest.approx(8 * 2.0)


def test_nothing_strange_without_steps_without_time_or_past_the_end() -> None:
    clock = Clock()
    meter = Throughput(global_batch_size=1, total_steps=1, clock=clock)
    assert meter.report() == (0.0, 0.0, 0.0)
    meter.step(0.0)
    assert meter.report().eta_s == 0.0
    clock.now += 1.0
    meter.step(5.0)
    speed = meter.report()
    assert speed == (1.0, 1.0, 0.0)
    assert meter.report() == speed
