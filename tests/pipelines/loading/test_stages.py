"""The figures of a running loader, and what they say in words."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from fastmoco_pipelines.loading import loader as module
from fastmoco_pipelines.loading import stages
from fastmoco_pipelines.loading.loader import build_loader
from fastmoco_pipelines.loading.stages import (
    AUGMENT,
    DECODE,
    DRAW,
    HEAL,
    READ,
    StageClock,
    StageFigures,
)
from fastmoco_pipelines.loading.synthetic import SyntheticLoader
from tests.pipelines.damage import damaged_copy
from tests.pipelines.healing.test_healer import FIRST, spec_of
from tests.pipelines.loading.test_loader import GUARD_SECONDS


def figures(wait: float, **stages: float) -> StageFigures:
    return StageFigures(steps=10, wall_s=10.0, wait_s=wait, stage_s=stages, queued=15, prefetch=2)


def test_a_loader_that_nobody_waits_for_is_not_the_bottleneck():
    said = figures(0.2, read=0.5, draw=0.1, decode=9.0).summary()
    assert said == "the trainer waits for the loader 2% of the time: it is not the bottleneck"
    assert "not the bottleneck" in StageFigures().summary()


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (
            {"read": 3.0, "draw": 0.1, "decode": 7.0},
            "decoding (and augmenting, where DALI does) is its slowest stage, 69% of its work",
        ),
        (
            {"read": 8.0, "draw": 0.1, "decode": 2.0},
            "reading the shards is its slowest stage, 79% of its work",
        ),
        (
            {"read": 3.0, "draw": 0.1, "decode": 1.0, "augment": 6.0},
            "cutting the views and changing their colors is its slowest stage",
        ),
        ({"read": 1.0, "draw": 0.1, "decode": 1.0, "heal": 6.0}, "fastmoco data check"),
    ],
)
def test_the_slowest_stage_is_named_with_its_cure(stages, words):
    said = figures(6.0, **stages).summary()
    assert said.startswith("the trainer waits for the loader 60% of the time: ")
    assert words in said
    assert "to speed it up: " in said


def test_the_difference_of_two_moments_is_what_lies_between():
    early = StageFigures(
        steps=4, wall_s=4.0, wait_s=1.0, stage_s={"read": 1.0}, queued=4, prefetch=2, left_out=1
    )
    recent = figures(3.0, read=2.5, heal=0.6) - early
    assert (recent.steps, recent.wall_s, recent.wait_s, recent.wait_share) == (
        6,
        6.0,
        2.0,
        pytest.approx(1 / 3),
    )
    assert recent.queue_depth == pytest.approx(11 / 6)
    metrics = recent.metrics()
    assert metrics["loader/read_ms"] == pytest.approx(250)
    assert metrics["loader/heal_ms"] == pytest.approx(100)
    assert metrics["loader/quarantined"] == 0


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """The time, which goes on by the test alone."""
    now = [100.0]
    times = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(stages, "time", times)
    return now


def test_the_clock_adds_up_and_knows_what_is_under_way(now):
    clock = StageClock(prefetch=2)
    assert clock.doing("") == "nothing is under way"
    assert not clock.busy
    with clock.stage(READ, 3), clock.stage(DECODE, 2):
        now[0] += 4
        said = clock.doing("train-000001.tar at byte 512")
        assert clock.busy
    assert "reading the shards for step 3 (train-000001.tar at byte 512) since 4 s" in said
    assert "decoding (and augmenting, where DALI does) for step 2 since 4 s" in said
    clock.waited(0.5, 2)
    found = clock.figures(7)
    assert found.stage_s[READ] == 4
    assert found.stage_s[DRAW] == 0
    assert (found.steps, found.wait_s, found.queued, found.left_out) == (1, 0.5, 2, 7)


def test_a_part_of_a_stage_may_be_anothers(now):
    clock = StageClock(prefetch=2)
    with clock.stage(DECODE, 0):
        now[0] += 0.03
    before = clock.figures(0).stage_s[DECODE]
    clock.within(DECODE, AUGMENT, 0.01)
    after = clock.figures(0).stage_s
    assert (after[DECODE], after[AUGMENT]) == (pytest.approx(before - 0.01), pytest.approx(0.01))


def test_a_running_loader_says_what_is_slow(packed, monkeypatch, now):
    """Each batch takes ten seconds, from the moment at which it is asked for."""
    render, asked, step = module.Source.render, threading.Semaphore(0), [-1]
    waiting: set[int] = set()

    def asks() -> float:
        if step[0] not in waiting:
            waiting.add(step[0])
            asked.release()
        return now[0]

    def slow(self, prepared):
        assert asked.acquire(timeout=GUARD_SECONDS)
        with self.clock.stage(DECODE, prepared.places.step):
            now[0] += 10
        return render(self, prepared)

    def take(loader):
        step[0] += 1
        assert loader.next().step == step[0]

    times = SimpleNamespace(perf_counter=asks, monotonic=time.monotonic)
    monkeypatch.setattr(module, "time", times)
    monkeypatch.setattr(module.Source, "render", slow)
    with build_loader(spec_of(packed)) as loader:
        take(loader)
        before = loader.figures()
        for _ in range(5):
            take(loader)
        recent = loader.figures() - before
        asked.release(100)  # for those that are ahead
    assert recent.steps == 5
    assert recent.wait_share == 1
    assert recent.queue_depth < 1
    metrics = recent.metrics()
    assert metrics["loader/decode_ms"] + metrics["loader/augment_ms"] == pytest.approx(10_000)
    assert "decoding (and augmenting, where DALI does) is its slowest stage" in recent.summary()


def test_healing_has_its_own_figure(packed, tmp_path):
    folder = damaged_copy(packed, tmp_path / "set", {int(FIRST[3]): "garbage"})
    with build_loader(spec_of(folder)) as loader:
        loader.report = print
        loader.next()
        found = loader.figures()
    assert found.stage_s[HEAL] > 0
    assert found.left_out == 1


def test_what_costs_nothing_has_nothing_to_tell():
    assert SyntheticLoader(spec_of("synthetic")).figures() == StageFigures()
