"""The synthetic loader has the surface of the real one and hands out the same tensors for ever."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch

from fastmoco_pipelines.loading.loader import Loader
from fastmoco_pipelines.loading.synthetic import SyntheticLoader
from fastmoco_pipelines.spec import LoaderSpec, moco_v3_views

VIEW1, VIEW2 = moco_v3_views(8)
SPEC = LoaderSpec(shards="unused", views=(VIEW1, VIEW2), global_batch_size=12, seed=3)


def test_batches_are_constant_and_counted():
    with SyntheticLoader(SPEC, rank=1, world_size=3, start_step=5, sample_count=100) as loader:
        assert (loader.local_batch_size, loader.steps_per_epoch, loader.sample_count) == (4, 8, 100)
        first, second = next(loader), loader.next()
        assert (first.step, second.step, loader.state_dict()["step"]) == (5, 6, 7)
        assert first.views[0].shape == first.views[1].shape == (4, 3, 8, 8)
        assert first.views[0].dtype == torch.float32
        assert first.views[0] is second.views[0]
        assert not torch.equal(first.views[0], first.views[1])
        assert loader.wait_seconds == 0
        assert first.labels is None
    for start in (0, 5):
        labelled = SyntheticLoader(
            replace(SPEC, classes=3), rank=1, world_size=3, start_step=start, sample_count=100
        )
        assert labelled.next().labels.tolist() == labelled.next().labels.tolist() == [1, 2, 0, 1]


def test_it_stands_in_for_the_real_loader():
    public = [name for name, _ in inspect.getmembers(Loader, callable) if not name.startswith("_")]
    assert public == ["begin", "close", "figures", "has_digest", "next", "state_dict"]
    loader = SyntheticLoader(SPEC, sample_count=100)
    for name in [
        *public,
        "steps_per_epoch",
        "local_batch_size",
        "sample_count",
        "digest",
        "wait_seconds",
    ]:
        assert hasattr(loader, name)
    assert loader.state_dict() == {
        "step": 0,
        "digest": "synthetic",
        "seed": 3,
        "global_batch_size": 12,
        "order_version": 2,
    }


def test_it_refuses_what_the_real_loader_refuses():
    with pytest.raises(ValueError, match="multiple of world_size=5"):
        SyntheticLoader(SPEC, world_size=5)
    with pytest.raises(ValueError, match="whole set of 11 samples"):
        SyntheticLoader(SPEC, sample_count=11)
