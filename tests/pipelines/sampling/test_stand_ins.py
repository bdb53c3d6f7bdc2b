"""Who stands in for a bad sample: a function of the place alone, at hand, and never from the same
batch."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from fastmoco_pipelines.sampling.order import epoch_order
from fastmoco_pipelines.sampling.stand_ins import REFILL_TAG, WINDOW_ATTEMPTS, Plan
from fastmoco_pipelines.sampling.window import ShardWindows
from fastmoco_pipelines.spec import ViewSpec
from fastmoco_pipelines.views.draws import draw_views


def plan_of(
    shards: int = 1, samples: int = 100, *, window: int = 0, batch: int = 12, **options
) -> Plan:
    first = np.arange(shards + 1, dtype=np.int64) * (samples // shards)
    return Plan(
        seed=5, windows=ShardWindows(first=first, window=window), global_batch_size=batch, **options
    )


def candidates(plan: Plan, step: int, row: int, count: int) -> list[int]:
    places = plan.places(step)
    return [plan.advance(places, row) for _ in range(count)]


@pytest.mark.parametrize("version", [1, 2])
def test_it_is_numpys_philox_over_the_order_without_the_batch(version):
    plan = plan_of(order_version=version)
    places = plan.places(9)  # 8 steps an epoch: the second batch of epoch 1
    assert (places.epoch, places.batch_start, places.first) == (1, 12, 12)
    order = epoch_order(5, 1, 100, version=version)
    assert np.array_equal(places.ids, order[12:24])
    for attempt in (1, 2, 7):
        counter = np.array([attempt, 15, 1, 0], dtype=np.uint64)
        word = int(
            np.random.Philox(
                counter=counter, key=np.array([5, REFILL_TAG], dtype=np.uint64)
            ).random_raw()
        )
        drawn = word % 88
        assert plan.candidate(places, 15, attempt) == order[drawn if drawn < 12 else drawn + 12]


def test_candidates_come_from_the_window_and_not_from_the_batch():
    from hypothesis import given, settings  # here: importing it takes all workers a second
    from hypothesis import strategies as st

    @settings(max_examples=60, deadline=None)
    @given(
        step=st.integers(0, 60),
        row=st.integers(0, 11),
        window=st.integers(0, 5),
        batch=st.sampled_from([12, 24, 36, 100]),
    )
    def check(step, row, window, batch):
        plan = plan_of(5, 100, window=window, batch=batch)
        places = plan.places(step)
        order, bounds = (
            epoch_order(5, places.epoch, 100, plan.windows),
            plan.windows.bounds(5, places.epoch),
        )
        number = int(np.searchsorted(bounds, places.first + row, side="right")) - 1
        inside = set(order[bounds[number] : bounds[number + 1]].tolist())
        others = inside - set(order[places.batch_start : places.batch_start + batch].tolist())
        found = candidates(plan, step, row, 30)
        assert set(found) <= (others or inside)
        if len(others) > 1:
            assert len(set(found)) > 1

    check()


def test_a_window_without_any_good_sample_is_left_at_last():
    plan = plan_of(5, 100, window=1)
    places = plan.places(3)
    order, bounds = (
        epoch_order(5, places.epoch, 100, plan.windows),
        plan.windows.bounds(5, places.epoch),
    )
    number = int(np.searchsorted(bounds, places.first, side="right")) - 1
    window = set(order[bounds[number] : bounds[number + 1]].tolist())
    found = candidates(plan, 3, 0, WINDOW_ATTEMPTS + 200)
    assert set(found[:WINDOW_ATTEMPTS]) <= window
    others = set(range(100)) - set(order[places.batch_start : places.batch_start + 12].tolist())
    assert set(found[WINDOW_ATTEMPTS:]) <= others
    assert len(set(found[WINDOW_ATTEMPTS:])) > 70  # of 88, by 200 draws


@pytest.mark.parametrize("world_size", [2, 3, 4, 12])
def test_the_number_of_ranks_does_not_matter(world_size):
    whole = plan_of()
    for step in (0, 11):
        for row in range(12):
            rank, own = divmod(row, 12 // world_size)
            part = plan_of(rank=rank, world_size=world_size)
            assert part.places(step).first + own == whole.places(step).first + row
            assert candidates(part, step, own, 3) == candidates(whole, step, row, 3)


def test_candidates_are_spread_evenly():
    plan = plan_of(samples=40, batch=10)
    counts = np.bincount(
        [i for step in range(40) for row in range(10) for i in candidates(plan, step, row, 10)]
    )
    assert counts.sum() == 4000
    assert counts.min() > 60  # 100 expected
    assert counts.max() < 140


def test_a_stand_in_of_a_billion_images_costs_one_number():
    plan = plan_of(40_000, 10**9, batch=4096)
    places = plan.places(10**6)
    tracemalloc.start()
    found = [plan.advance(places, row) for row in range(20)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2e6
    assert len(set(found)) == 20
    assert 0 <= min(found) < max(found) < 10**9


def test_a_place_tells_the_draws_who_stands_in():
    plan = plan_of(rank=1, world_size=2)
    places = plan.places(1)
    plan.advance(places, 2)
    assert places.streams.tolist() == [0, 0, 12 + 6 + 2 + 1, 0, 0, 0]
    assert places.attempts.tolist() == [0, 0, 1, 0, 0, 0]
    assert np.array_equal(np.delete(places.ids, 2), np.delete(epoch_order(5, 0, 100)[18:24], 2))


def test_draws_without_a_place_are_the_usual_ones():
    ids, sizes = np.arange(50), np.full((50, 2), 100, dtype=np.int32)
    plain = draw_views(ViewSpec(), seed=1, epoch=2, sample_ids=ids, sizes=sizes, view=1)
    placed = np.zeros(50, dtype=np.int64)
    placed[7] = 3
    other = draw_views(
        ViewSpec(), seed=1, epoch=2, sample_ids=ids, sizes=sizes, view=1, places=placed
    )
    differs = (plain.crop != other.crop).any(axis=1)
    assert np.flatnonzero(differs).tolist() == [7]
    with pytest.raises(ValueError, match="places="):
        draw_views(
            ViewSpec(), seed=1, epoch=2, sample_ids=ids, sizes=sizes, view=1, places=placed[:3]
        )
