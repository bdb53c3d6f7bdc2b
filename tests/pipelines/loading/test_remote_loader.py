"""The loaders over shards on a server: the same batches as from the disk, whatever the server
does."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from fastmoco_pipelines.loading.eval_loader import build_eval_loader
from fastmoco_pipelines.loading.loader import build_loader
from fastmoco_pipelines.sets.shard_set import ShardSet
from fastmoco_pipelines.spec import CacheSpec, EvalLoaderSpec, EvalSpec, LoaderSpec, moco_v3_views
from fastmoco_pipelines.stores.retries import Limits
from tests.pipelines.http_fault_server import HOLD_SECONDS, drop, hold, stall, status
from tests.pipelines.loading.test_loader import wait_until
from tests.pipelines.stores.test_http_faults import QUICK, require_no_threads


@pytest.fixture
def spec(tmp_path):
    return CacheSpec(cache_dir=str(tmp_path / "cache"))


VIEW1, VIEW2 = moco_v3_views(16)


def loader_spec(shards: object, spec: CacheSpec, **changes: object) -> LoaderSpec:
    options = {
        "views": (VIEW1, VIEW2),
        "global_batch_size": 8,
        "seed": 3,
        "threads": 1,
        "shuffle_window": 1,
    }
    cache = {"cache_dir": spec.cache_dir, "cache_size_gb": spec.cache_size_gb}
    return LoaderSpec(shards=str(shards), **options | cache | changes)  # type: ignore[arg-type]


def test_the_loader_delivers_the_same_batches_from_a_failing_server(
    server, packed, spec, monkeypatch
):
    """Connections that drop, a cache smaller than the set, two ranks: bit for bit the local
    batches, over two epochs."""
    monkeypatch.setattr("fastmoco_pipelines.sets.shard_set.Limits", lambda: QUICK)
    small = CacheSpec(cache_dir=spec.cache_dir, cache_size_gb=1e-4)
    for path in packed.glob("*.tar"):
        server.script[path.name] = [drop(7000), drop(20_000), status(503)] * 3
    with build_loader(loader_spec(packed, spec)) as local:
        expected = [local.next() for _ in range(11)]
        assert (local.shuffle_window, len(local.order_digest)) == (1, 64)
    parts = []
    for rank in range(2):
        with build_loader(loader_spec(f"{server.url}/", small), rank=rank, world_size=2) as loader:
            parts.append([loader.next() for _ in range(11)])
            assert loader.state_dict()["shuffle_window"] == 1
            assert (loader.digest, loader.order_digest) == (local.digest, local.order_digest)
    for batch, *halves in zip(expected, *parts, strict=True):
        assert np.array_equal(
            batch.sample_ids, np.concatenate([half.sample_ids for half in halves])
        )
        for view, *parts_of_view in zip(batch.views, *(half.views for half in halves), strict=True):
            assert np.array_equal(view, np.concatenate(parts_of_view))
    require_no_threads()


def test_windows_follow_the_kind_of_set(server, packed, spec):
    with (
        ShardSet.open(f"{server.url}/", cache=spec, limits=QUICK) as shards,
        ShardSet.open(str(packed)) as local,
    ):
        assert local.windows(None).window == 0
        assert local.windows(2).window == 2
        assert (
            shards.windows(None, spec).window == 0
        )  # 64 shards and more are the whole of this set
        size = shards._largest
        assert shards.windows(None, CacheSpec(cache_size_gb=4 * size / 1e9)).window == 2
        assert shards.windows(0, CacheSpec(cache_size_gb=4 * size / 1e9)).window == 0
        assert shards.windows(2).digest == local.windows(2).digest != ""


def test_evaluation_reads_a_remote_set(server, packed, spec):
    options = {"batch_size": 10, "threads": 1, "image": EvalSpec(size=16, resize=16)}
    remote = EvalLoaderSpec(shards=f"{server.url}/", cache_dir=spec.cache_dir, **options)
    with (
        build_eval_loader(remote) as loader,
        build_eval_loader(EvalLoaderSpec(shards=str(packed), **options)) as local,
    ):
        for ours, theirs in zip(loader, local, strict=True):
            assert np.array_equal(ours.images, theirs.images)
            assert np.array_equal(ours.labels, theirs.labels)


PATIENT = Limits(min_bytes_per_s=0, deadline_seconds=90)
"""Limits that end no transfer before a server that holds its answer back does."""
STUBBORN = Limits(read_seconds=1, attempts=1000, max_delay_seconds=1, deadline_seconds=600)
"""Limits under which a silent server is asked again for ten minutes."""


def test_leaving_an_evaluation_does_not_wait_for_a_server(server, packed, spec, monkeypatch):
    """As by an interrupt; and it can be begun again."""
    monkeypatch.setattr("fastmoco_pipelines.sets.shard_set.Limits", lambda: PATIENT)
    image = EvalSpec(size=16, resize=16)
    options = {"batch_size": 16, "threads": 1, "cache_dir": spec.cache_dir}
    with build_eval_loader(
        EvalLoaderSpec(shards=f"{server.url}/", image=image, **options)
    ) as loader:
        server.always["train-000001.tar"] = hold()
        iteration = iter(loader)
        next(iteration)
        wait_until(lambda: server.held)
        left = []

        def leave() -> None:
            with pytest.raises(KeyboardInterrupt):
                iteration.throw(KeyboardInterrupt())
            left.append(True)

        thread = threading.Thread(target=leave, daemon=True)
        thread.start()
        thread.join(HOLD_SECONDS)  # a guard: it ends with the next byte
        assert left == [True]
        assert server.given_up == []
        del server.always["train-000001.tar"]
        assert sum(len(batch.labels) for batch in loader) == 45


@pytest.mark.parametrize(
    ("fault", "limits"), [(hold(), PATIENT), (stall(0), STUBBORN)], ids=["slow", "silent"]
)
def test_closing_does_not_wait_for_a_server(server, spec, monkeypatch, fault, limits):
    monkeypatch.setattr("fastmoco_pipelines.sets.shard_set.Limits", lambda: limits)
    for name in ("train-000000.tar", "train-000001.tar", "train-000002.tar"):
        server.always[name] = fault
    loader = build_loader(loader_spec(f"{server.url}/", spec))
    wait_until(lambda: any(name.endswith(".tar") for name, *_ in server.requests))
    loader.close()
    require_no_threads()
    assert server.given_up == []
