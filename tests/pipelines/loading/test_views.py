"""Batches of any number of views: groups, copies and sizes, and that no view depends on the
others."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmoco_pipelines.loading.batch import Batch
from fastmoco_pipelines.loading.loader import build_loader
from fastmoco_pipelines.loading.memory import loader_bytes
from fastmoco_pipelines.loading.source import Prepared, Source
from fastmoco_pipelines.loading.synthetic import SyntheticLoader
from fastmoco_pipelines.sampling.order import epoch_order
from fastmoco_pipelines.spec import LoaderSpec, ViewSpec, each_view, moco_v3_views
from tests.pipelines.damage import damaged_copy

STEPS = 4  # 45 images, 12 a step: 3 steps an epoch, so that two epochs are seen
PAIR = moco_v3_views(16)
SMALL = ViewSpec(size=8, crop_scale=(0.05, 0.4), color="exact", copies=2, interpolation="bicubic")
BY_DALI = replace(SMALL, color="dali", copies=1, blur_probability=0.5, solarize_probability=0.5)
GROUPS = (*PAIR, SMALL, BY_DALI)
SIZES = [16, 16, 8, 8, 8]
FIRST = epoch_order(7, 0, 45)
BAD = {int(FIRST[0]): "garbage", int(FIRST[1]): "truncated", int(FIRST[20]): "changed"}


def spec_of(folder: Path, **changes) -> LoaderSpec:
    options = {
        "shards": str(folder),
        "views": GROUPS,
        "global_batch_size": 12,
        "seed": 7,
        "threads": 1,
    }
    return LoaderSpec(**options | changes)


def take(spec: LoaderSpec, steps: int = STEPS, **options) -> list[Batch]:
    with build_loader(spec, **options) as loader:
        return [loader.next() for _ in range(steps)]


def assert_same(got: Batch, wanted: Batch) -> None:
    assert got.step == wanted.step
    assert np.array_equal(got.sample_ids, wanted.sample_ids)
    for view, other in zip(got.views, wanted.views, strict=True):
        assert torch.equal(view, other)


@pytest.fixture(scope="module")
def whole(packed) -> list[Batch]:
    return take(spec_of(packed))


def test_views_come_in_the_order_of_their_groups_and_all_differ(whole) -> None:
    for batch in whole:
        assert [tuple(view.shape) for view in batch.views] == [
            (12, 3, size, size) for size in SIZES
        ]
        assert all(view.dtype == torch.float32 for view in batch.views)
        for one, other in itertools.combinations(batch.views, 2):
            assert one.shape != other.shape or not any(map(torch.equal, one, other))


def test_a_view_does_not_depend_on_the_others_of_its_batch(packed, whole) -> None:
    """The pair alone is the pair among five; a group of one copy less leaves the first copy as it
    was."""
    for got, wanted in zip(take(spec_of(packed, views=PAIR)), whole, strict=True):
        assert_same(got, replace(wanted, views=wanted.views[:2]))
    single = spec_of(packed, views=(*PAIR, replace(SMALL, copies=1)))
    for got, wanted in zip(take(single), whole, strict=True):
        assert_same(got, replace(wanted, views=wanted.views[:3]))


def test_copies_are_groups_of_one(packed, whole) -> None:
    """Two copies are the views of two groups, by number and to the bit."""
    one = replace(SMALL, copies=1)
    for got, wanted in zip(
        take(spec_of(packed, views=(*PAIR, one, one, BY_DALI))), whole, strict=True
    ):
        assert_same(got, wanted)


def test_a_group_without_copies_is_left_out(packed, whole) -> None:
    """Views are numbered as if the group were not there: the batch of a single view is view 1."""
    spec = spec_of(packed, views=(PAIR[0], replace(PAIR[1], copies=0)))
    for got, wanted in zip(take(spec), whole, strict=True):
        assert_same(got, replace(wanted, views=wanted.views[:1]))
    empty = replace(SMALL, size=24, copies=0)
    for got, wanted in zip(
        take(spec_of(packed, views=(PAIR[0], empty, *GROUPS[1:]))), whole, strict=True
    ):
        assert_same(got, wanted)


@pytest.mark.parametrize("start", range(1, STEPS))
def test_a_restart_at_any_step_is_bit_identical(packed, whole, start) -> None:
    for got, wanted in zip(
        take(spec_of(packed), STEPS - start, start_step=start), whole[start:], strict=True
    ):
        assert_same(got, wanted)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_together_are_bit_identical_to_one(packed, whole, world_size) -> None:
    ranks = [
        take(spec_of(packed), 2, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    for parts, wanted in zip(zip(*ranks, strict=True), whole, strict=False):
        views = tuple(map(torch.cat, zip(*(part.views for part in parts), strict=True)))
        ids = np.concatenate([part.sample_ids for part in parts])
        assert_same(Batch(views=views, sample_ids=ids, step=parts[0].step), wanted)


def test_parts_of_a_batch_threads_and_prefetch_change_nothing(packed, whole) -> None:
    changed = spec_of(packed, sub_batch=5, threads=2, prefetch=4)
    for got, wanted in zip(take(changed), whole, strict=True):
        assert_same(got, wanted)


def test_levels_of_every_view_normalise_to_its_numbers(packed, whole) -> None:
    from fastmoco_pipelines.views.levels import normalise

    spec = spec_of(packed, view_dtype="uint8")
    for got, wanted in zip(take(spec, 2), whole, strict=False):
        assert all(view.dtype == torch.uint8 for view in got.views)
        assert not got.normalised
        pairs = zip(got.views, spec.each_view, strict=True)
        assert_same(replace(got, views=tuple(normalise(view, of) for view, of in pairs)), wanted)


def test_a_bad_image_is_replaced_in_all_views(packed, whole, tmp_path) -> None:
    faulty = damaged_copy(packed, tmp_path / "set", BAD)
    replaced = Counter()
    for got, wanted in zip(take(spec_of(faulty)), whole, strict=True):
        bad = np.isin(wanted.sample_ids, list(BAD))
        assert np.array_equal(got.sample_ids != wanted.sample_ids, bad)
        assert not np.isin(got.sample_ids, list(BAD)).any()
        for number, (view, other) in enumerate(zip(got.views, wanted.views, strict=True), start=1):
            same = (view == other).flatten(1).all(1).numpy()
            assert np.array_equal(same, ~bad), number
            replaced[number] += int(bad.sum())
    expected = sum(
        int(i) in BAD
        for epoch, steps in ((0, 3), (1, 1))
        for i in epoch_order(7, epoch, 45)[: 12 * steps]
    )
    assert expected >= 3
    assert replaced == dict.fromkeys(range(1, 6), expected)


def test_the_synthetic_loader_has_the_same_views(packed, whole) -> None:
    with SyntheticLoader(spec_of(packed), world_size=2) as loader:
        batch = loader.next()
    assert [tuple(view.shape[1:]) for view in batch.views] == [
        tuple(view.shape[1:]) for view in whole[0].views
    ]
    assert {len(view) for view in batch.views} == {6}
    assert not torch.equal(batch.views[2], batch.views[3])


def test_the_memory_of_a_loader_counts_every_view(packed, whole) -> None:
    held = loader_bytes(spec_of(packed))
    assert held.batch_bytes == sum(view.numel() * view.element_size() for view in whole[0].views)
    assert held.ready_bytes == 3 * held.batch_bytes  # two finished, one in the making
    single = replace(spec_of(packed, device="gpu", global_batch_size=512), views=PAIR)
    many = replace(single, views=(*PAIR, replace(SMALL, copies=8)))
    small = 3 * 8 * 8
    assert loader_bytes(many).batch_bytes == loader_bytes(single).batch_bytes + 8 * 512 * small * 4
    # On a GPU one run of DALI holds the levels of all views at once.
    assert loader_bytes(many).scratch_bytes > loader_bytes(single).scratch_bytes + 8 * 128 * small


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ((), r"views=\(\): copies of each group: there is no view, give one group a copy"),
        ((replace(SMALL, copies=0),), r"views=\(0,\): copies of each group: there is no view"),
        (
            (replace(SMALL, copies=256),),
            r"views=\(256,\): copies of each group: at most 255 views in all",
        ),
        (
            (PAIR[0], SMALL, PAIR[1]),
            r"views=\(16, 8, 16\): sizes of the groups: those of one size must be neighbours",
        ),
    ],
)
def test_groups_that_make_no_batch_are_refused(views, message) -> None:
    with pytest.raises(ValueError, match=message):
        LoaderSpec(shards="x", global_batch_size=2, views=views)


def test_negative_copies_are_refused() -> None:
    with pytest.raises(ValueError, match="copies=-1: counts views; 0 leaves them out"):
        ViewSpec(copies=-1)


def test_single_views_stay_as_they_are() -> None:
    assert each_view(PAIR) == PAIR
    assert each_view(each_view(GROUPS)) == each_view(GROUPS)
    assert [view.size for view in each_view(GROUPS)] == SIZES


def test_twenty_pairs_of_the_digits_keep_their_bits(tmp_path, monkeypatch) -> None:
    """Draws, levels and samples, by digests taken when a batch held two views and no other number,
    and the order was version 1."""
    pytest.importorskip("sklearn")
    from fastmoco_pipelines.making.digits import pack_digits

    train, _ = pack_digits(tmp_path, seed=0)
    render, rendered = Source.render, []

    def keep(self: Source, prepared: Prepared) -> Batch:
        rendered.append(prepared)
        return render(self, prepared)

    monkeypatch.setattr(Source, "render", keep)
    draws, levels, ids = (hashlib.sha256() for _ in range(3))
    spec = LoaderSpec(
        shards=train, views=PAIR, global_batch_size=48, seed=11, threads=1, view_dtype="uint8"
    )
    for batch in take(spec, 20, order_version=1):
        for drawn in rendered[batch.step].draws:
            assert not drawn.corner.any()  # the digests are older than this field
            for field in (field for field in fields(drawn) if field.name != "corner"):
                draws.update(np.ascontiguousarray(getattr(drawn, field.name)).tobytes())
        for view in batch.views:
            levels.update(view.contiguous().numpy().tobytes())
        ids.update(batch.sample_ids.tobytes())
    assert [digest.hexdigest()[:16] for digest in (draws, levels, ids)] == [
        "69f6fc2b7ce440db",
        "0a2211d602c183ac",
        "52da29ce2935d4ed",
    ]
