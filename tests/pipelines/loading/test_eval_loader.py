"""The evaluation loader: every image once, in manifest order, on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastmoco_pipelines.errors import TooManyBadSamplesError
from fastmoco_pipelines.loading.eval_loader import Augmented, build_eval_loader
from fastmoco_pipelines.loading.loader import build_loader
from fastmoco_pipelines.sets.shard_set import ShardSet
from fastmoco_pipelines.spec import EvalLoaderSpec, EvalSpec, LoaderSpec, ViewSpec
from tests.pipelines.damage import damaged_copy

SPEC = EvalSpec(size=16, resize=18)


PLACE = ("rank", "world_size", "device_id", "sample_ids")


def build(shards, **options):
    """A loader by its options: those of a place in the world, and those of the spec."""
    place = {name: options.pop(name) for name in PLACE if name in options}
    defaults = {"batch_size": 16, "threads": 1, "image": SPEC}
    return build_eval_loader(EvalLoaderSpec(shards=str(shards), **defaults | options), **place)


def take(packed, **options):
    with build(packed, **options) as loader:
        batches = list(loader)
    ids = (
        np.concatenate([batch.sample_ids for batch in batches])
        if batches
        else np.array([], np.int64)
    )
    return ids, batches


def test_every_image_comes_once_in_order(packed):
    ids, batches = take(packed)
    assert np.array_equal(ids, np.arange(45))
    assert [tuple(batch.images.shape) for batch in batches] == [(16, 3, 16, 16)] * 2 + [
        (13, 3, 16, 16)
    ]
    labels = np.concatenate([batch.labels for batch in batches])
    assert np.array_equal(labels, ShardSet.open(str(packed)).labels)


def test_given_images_come_in_their_order(packed):
    wanted = np.array([*range(30, 41), 2, 7])
    ids, batches = take(packed, sample_ids=wanted, batch_size=8)
    assert np.array_equal(ids, wanted)
    assert [len(batch.labels) for batch in batches] == [8, 5]
    _, whole = take(packed, batch_size=45)
    assert torch.equal(torch.cat([batch.images for batch in batches]), whole[0].images[wanted])


def test_it_can_be_iterated_again_and_left_early(packed):
    with build(packed) as loader:
        assert (len(loader), loader.classes) == (45, ("cat", "dog", "owl"))
        next(iter(loader))
        first, second = list(loader), list(loader)
        assert all(torch.equal(a.images, b.images) for a, b in zip(first, second, strict=True))
        assert len(first) == 3


def test_a_set_that_is_open_serves_several_loaders(packed, monkeypatch):
    """Its files are closed with each loader and opened again by the next."""
    spec = EvalLoaderSpec(shards=str(packed), batch_size=16, threads=1, image=SPEC)
    with ShardSet.open(str(packed)) as shards:
        monkeypatch.setattr(ShardSet, "open", None)
        for rank, part in ((0, 22), (1, 23)):
            with build_eval_loader(spec, rank=rank, world_size=2, shards=shards) as loader:
                assert loader.part == part
                assert len(loader) == 45
                ids = np.concatenate([batch.sample_ids for batch in loader])
            assert np.array_equal(ids, np.arange(22) if rank == 0 else np.arange(22, 45))
            assert not shards._files._open


@pytest.mark.parametrize("world_size", [2, 4, 50])
def test_ranks_share_the_set(packed, world_size):
    parts = [take(packed, rank=rank, world_size=world_size) for rank in range(world_size)]
    sizes = [len(ids) for ids, _ in parts]
    assert max(sizes) - min(sizes) <= 1
    assert np.array_equal(np.concatenate([ids for ids, _ in parts]), np.arange(45))
    if world_size == 2:
        whole = torch.cat([batch.images for batch in take(packed)[1]])
        assert torch.equal(
            torch.cat([batch.images for _, batches in parts for batch in batches]), whole
        )


def test_limit_takes_images_from_everywhere(packed):
    assert take(packed, limit=5)[0].tolist() == [0, 9, 18, 27, 36]
    assert len(build(packed, batch_size=4, limit=5, world_size=2)) == 5
    assert len(take(packed, limit=1000)[0]) == 45


def test_bad_images_are_left_out_and_named(packed, tmp_path):
    bad = {0: "garbage", 20: "changed", 21: "truncated", 44: "empty"}
    folder = damaged_copy(packed, tmp_path / "set", bad)
    clean = torch.cat([batch.images for batch in take(packed)[1]])
    wanted = [i for i in range(45) if i not in bad]
    told: list[str] = []
    with build(folder) as loader:
        loader.report = told.append
        for _ in range(2):  # the second time it is known
            batches = list(loader)
            assert np.concatenate([batch.sample_ids for batch in batches]).tolist() == wanted
            assert torch.equal(torch.cat([batch.images for batch in batches]), clean[wanted])
            labels = np.concatenate([batch.labels for batch in batches])
            assert np.array_equal(labels, ShardSet.open(str(packed)).labels[wanted])
        assert (len(loader), loader.left_out) == (45, 4)
    assert len(told) == 4
    assert told[0].startswith("left out train-000000.tar: ")
    # Ranks part the set as without the bad images; and a batch of bad ones alone is no batch.
    parts = [take(folder, rank=rank, world_size=3, batch_size=1)[0] for rank in range(3)]
    assert [len(part) for part in parts] == [14, 13, 14]
    assert np.concatenate(parts).tolist() == wanted


def test_too_many_bad_images_end_it(packed, tmp_path):
    folder = damaged_copy(packed, tmp_path / "set", {3: "changed"})
    with pytest.raises(
        TooManyBadSamplesError, match="1 of 45 images cannot be used, 0 are allowed"
    ):
        take(folder, max_bad_share=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"rank": 2, "world_size": 2}, "rank=2"),
        ({"world_size": 0}, "world_size=0"),
        ({"limit": 0}, "limit=0"),
        ({"device_id": 0}, "device_id=0"),
        ({"device": "gpu"}, "device_id=None"),
    ],
)
def test_impossible_numbers_are_refused(packed, options, words):
    with pytest.raises(ValueError, match=words):
        build(packed, **options)


def test_an_augmented_image_is_the_first_view_of_a_training_epoch(packed):
    """So features of copies are those of the training that they stand for."""
    view = ViewSpec(size=16, blur_probability=0.0)
    spec = LoaderSpec(shards=str(packed), views=(view,), global_batch_size=15, seed=5)
    with build_loader(spec, start_step=3) as loader:  # the second epoch, of three steps
        batches = [loader.next() for _ in range(3)]
    trained = {
        int(sample): image
        for batch in batches
        for sample, image in zip(batch.sample_ids, batch.views[0], strict=True)
    }
    assert sorted(trained) == list(range(45))

    shown = np.array([44, 3, 17])
    evaluated = EvalLoaderSpec(shards=str(packed), image=SPEC, batch_size=2, threads=1)
    augmented = Augmented(view=view, seed=5, epoch=1)
    with build_eval_loader(evaluated, sample_ids=shown, augmented=augmented) as images:
        found = list(images)
    assert np.array_equal(np.concatenate([batch.sample_ids for batch in found]), shown)
    for sample, image in zip(shown, torch.cat([batch.images for batch in found]), strict=True):
        assert torch.equal(image, trained[int(sample)])
