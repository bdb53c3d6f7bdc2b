"""The training loader: the same batches whatever the start and the number of ranks, errors by name,
clean ends."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import queue
import subprocess
import sys
import tarfile
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco_pipelines.loading.batch import Batch
from fastmoco_pipelines.loading.loader import build_loader
from fastmoco_pipelines.sampling.order import epoch_order
from fastmoco_pipelines.sets.shard_set import ShardSet
from fastmoco_pipelines.spec import LoaderSpec, moco_v3_views
from fastmoco_pipelines.views.draws import draw_views
from fastmoco_pipelines.views.reference import reference_view

GUARD_SECONDS = 120
"""Nothing here takes so long, on a loaded machine either: what does hangs."""
STEPS = 9  # 45 images, 12 a step: 3 steps an epoch, so that three epochs are seen


def spec_of(folder: Path | str, **changes) -> LoaderSpec:
    view1, view2 = moco_v3_views(16)
    options = {
        "shards": str(folder),
        "views": (view1, view2),
        "global_batch_size": 12,
        "seed": 7,
        "threads": 1,
    }
    return LoaderSpec(**options | changes)


def take(spec: LoaderSpec, steps: int, **options) -> list[Batch]:
    with build_loader(spec, **options) as loader:
        return [loader.next() for _ in range(steps)]


@pytest.fixture(scope="module")
def whole(packed) -> list[Batch]:
    return take(spec_of(packed), STEPS)


def assert_same(got: Batch, wanted: Batch) -> None:
    assert got.step == wanted.step
    assert np.array_equal(got.sample_ids, wanted.sample_ids)
    assert torch.equal(got.views[0], wanted.views[0])
    assert torch.equal(got.views[1], wanted.views[1])


def test_batches_are_what_the_order_says(whole):
    for step, batch in enumerate(whole):
        assert batch.step == step
        assert batch.views[0].shape == batch.views[1].shape == (12, 3, 16, 16)
        assert batch.views[0].dtype == torch.float32
        assert bool(torch.isfinite(batch.views[0]).all() and torch.isfinite(batch.views[1]).all())
        start = step % 3 * 12  # 45 = 3 * 12 + 9: the ragged nine are left out
        assert np.array_equal(batch.sample_ids, epoch_order(7, step // 3, 45)[start : start + 12])


def test_views_and_epochs_differ(whole):
    assert not torch.equal(whole[0].views[0], whole[0].views[1])
    # The same image in two epochs is cut differently.
    sample = next(
        i for i in whole[0].sample_ids if any(i in batch.sample_ids for batch in whole[3:6])
    )
    again = next(batch for batch in whole[3:6] if sample in batch.sample_ids)
    first = whole[0].views[0][list(whole[0].sample_ids).index(sample)]
    assert not torch.equal(first, again.views[0][list(again.sample_ids).index(sample)])


def test_equal_specs_still_get_draws_of_their_own(packed):
    """With the same specs for both views only equal draws could make them equal."""
    view = moco_v3_views(16)[1]
    for batch in take(spec_of(packed, views=(view, view)), 4):
        differ = (batch.views[0] != batch.views[1]).flatten(1).any(1)
        assert differ.tolist() == [True] * 12
        assert not torch.equal(batch.views[0].sort(0).values, batch.views[1].sort(0).values)


def test_views_are_those_of_the_reference_by_seed_epoch_sample_and_number(packed, whole):
    """PNG files, which all decoders read alike: their views by Pillow, from the draws of their own
    place."""
    files = {}
    for path in sorted(packed.glob("*.tar")):
        with tarfile.open(path) as tar:
            images = [member for member in tar if member.name.endswith((".jpg", ".png", ".webp"))]
            files |= {
                len(files) + i: (m.name, tar.extractfile(m).read()) for i, m in enumerate(images)
            }
    specs, seen = moco_v3_views(16), 0
    for batch in whole:
        for row, sample in enumerate(batch.sample_ids.tolist()):
            name, data = files[sample]
            if not name.endswith(".png"):
                continue
            image = Image.open(io.BytesIO(data)).convert("RGB")
            seen += 1
            for number, spec, made in (
                (1, specs[0], batch.views[0]),
                (2, specs[1], batch.views[1]),
            ):
                draws = draw_views(
                    spec,
                    seed=7,
                    epoch=batch.step // 3,
                    sample_ids=np.array([sample]),
                    sizes=np.array([[image.height, image.width]], dtype=np.int32),
                    view=number,
                )
                expected = reference_view(image, spec, draws, 0)
                levels = 255 * np.array(spec.std)[:, None, None]
                assert (np.abs(made[row].numpy() - expected) * levels).max() < 1e-3
    assert seen > 20


@pytest.mark.parametrize("start", range(STEPS))
def test_a_restart_at_any_step_is_bit_identical(packed, whole, start):
    for got, wanted in zip(
        take(spec_of(packed), STEPS - start, start_step=start), whole[start:], strict=True
    ):
        assert_same(got, wanted)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_are_bit_identical_to_one(packed, whole, world_size):
    ranks = [
        take(spec_of(packed), 4, rank=rank, world_size=world_size, start_step=1)
        for rank in range(world_size)
    ]
    for i in range(4):
        parts = [batches[i] for batches in ranks]
        assert {len(part.sample_ids) for part in parts} == {12 // world_size}
        together = Batch(
            views=tuple(map(torch.cat, zip(*(part.views for part in parts), strict=True))),
            sample_ids=np.concatenate([part.sample_ids for part in parts]),
            step=parts[0].step,
        )
        assert_same(together, whole[1 + i])


def test_threads_and_prefetch_change_nothing(packed, whole):
    for got, wanted in zip(take(spec_of(packed, threads=2, prefetch=5), 4), whole[:4], strict=True):
        assert_same(got, wanted)


def test_batches_keep_their_memory(packed, whole):
    """A batch in hand is not overwritten by later ones, nor by the end of the loader."""
    with build_loader(spec_of(packed)) as loader:
        first = loader.next()
        for _ in range(5):
            loader.next()
    gc.collect()
    assert_same(first, whole[0])


def test_state_is_the_step(packed):
    with build_loader(spec_of(packed), start_step=5) as loader:
        assert (loader.steps_per_epoch, loader.local_batch_size, loader.sample_count) == (3, 12, 45)
        assert loader.digest == ShardSet.open(str(packed)).digest
        for step, batch in zip(range(5, 8), loader, strict=False):
            assert batch.step == step
            state = {
                "step": step + 1,
                "digest": loader.digest,
                "seed": 7,
                "global_batch_size": 12,
                "order_version": 2,
            }
            assert json.loads(json.dumps(loader.state_dict())) == state
            if step == 7:
                break


def test_waiting_is_measured(packed, monkeypatch):
    from fastmoco_pipelines.loading import loader as module

    render, now, asked, ready = module.Source.render, [100.0], threading.Event(), threading.Event()

    def clock() -> float:
        asked.set()
        return now[0]

    def slow(self, prepared):
        """The first batch comes five seconds, by this clock, after the trainer has asked for it."""
        if not ready.is_set():
            assert asked.wait(GUARD_SECONDS)
            now[0] += 5
            ready.set()
        return render(self, prepared)

    monkeypatch.setattr(module.Source, "render", slow)
    times = SimpleNamespace(perf_counter=clock, monotonic=time.monotonic)
    monkeypatch.setattr(module, "time", times)
    with build_loader(spec_of(packed, prefetch=1)) as loader:
        loader.next()
        assert loader.wait_seconds == 5
        wait_until(lambda: loader.resting)  # now a batch is ready
        loader.next()
        assert loader.wait_seconds == 0


def test_unexpected_errors_reach_the_trainer(packed, monkeypatch):
    from fastmoco_pipelines.loading import loader as module

    def fail(self, prepared):
        raise MemoryError("no room")

    monkeypatch.setattr(module.Source, "render", fail)
    with build_loader(spec_of(packed)) as loader, pytest.raises(MemoryError, match="no room"):
        loader.next()


@pytest.mark.parametrize("full", [False, True])
def test_close_ends_the_threads_whatever_they_do(packed, full, own_threads):
    """At once, and while a thread waits for room in a full queue: neither is left to its own
    end."""
    loader = build_loader(spec_of(packed, prefetch=1))
    if full:
        wait_until(lambda: loader.resting)
    loader.close()
    assert own_threads() == []
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        loader.next()


def test_a_forgotten_loader_ends_its_threads(packed, own_threads):
    loader = build_loader(spec_of(packed))
    loader.next()
    assert own_threads()
    del loader
    gc.collect()
    wait_until(lambda: not own_threads())


def wait_until(condition: Callable[[], bool]) -> None:
    """Return as soon as the condition holds; on any machine it does long before the guard."""
    guard = time.monotonic() + GUARD_SECONDS
    while not condition():
        assert time.monotonic() < guard
        time.sleep(0.005)


@pytest.mark.parametrize("work", ["prepare", "render"])
def test_a_loader_may_be_collected_in_its_own_threads(packed, monkeypatch, work, own_threads):
    """The garbage collector runs in any thread; there it must not wait for a thread that waits for
    this one."""
    from fastmoco_pipelines.loading import loader as module

    plain, holder, released, collected_in = getattr(module.Source, work), [], threading.Event(), []

    def forget(self, *arguments):
        if released.is_set():
            holder.clear()
            gc.collect()
        return plain(self, *arguments)

    monkeypatch.setattr(module.Source, work, forget)
    holder.append(build_loader(spec_of(packed, prefetch=1)))
    weakref.finalize(holder[0], lambda: collected_in.append(threading.current_thread().name))
    results = holder[0]._results
    results.get(timeout=GUARD_SECONDS)
    released.set()
    deadline = time.monotonic() + GUARD_SECONDS
    while (
        not collected_in and time.monotonic() < deadline
    ):  # both threads go on, until the loader is gone
        with contextlib.suppress(queue.Empty):
            results.get(timeout=0.1)
    assert collected_in[0].startswith("fastmoco")
    wait_until(lambda: not own_threads())


@pytest.mark.parametrize("hang", ["", "time.sleep(1000)"])
def test_the_interpreter_exits_without_a_close(packed, hang):
    """With both threads at work, and with a reader that hangs as on a lost network disk."""
    program = f"""
import sys, time
from fastmoco_pipelines.loading import loader
from fastmoco_pipelines.spec import LoaderSpec
prepare = loader.Source.prepare
def slow(self, places, following):
    if places.step > 3:
        {hang or "pass"}
    return prepare(self, places, following)
loader.Source.prepare = slow
kept = loader.build_loader(LoaderSpec(shards={str(packed)!r}, global_batch_size=12, threads=1))
kept.next()
sys.exit(3)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stderr) == (3, "")


def test_a_thread_that_dies_is_noticed(packed, monkeypatch):
    from fastmoco_pipelines.loading import loader as module

    monkeypatch.setattr(module, "make_batches", lambda *_: None)
    with (
        build_loader(spec_of(packed)) as loader,
        pytest.raises(RuntimeError, match="ended before step 0"),
    ):
        loader.next()


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"global_batch_size": 46}, {}, "larger than the whole set of 45 samples"),
        ({}, {"world_size": 5}, "global_batch_size=12: must be a multiple of world_size=5"),
        ({}, {"rank": 1}, "rank=1"),
        ({}, {"start_step": -1}, "step=-1"),
        ({}, {"device_id": 0}, "device_id=0"),
        ({"device": "gpu"}, {}, "device_id=None"),
        ({"shards": "/nowhere/*.tar"}, {}, "there is no file /nowhere/"),
    ],
)
def test_impossible_loaders_are_refused(packed, changes, options, words, own_threads):
    with pytest.raises(ValueError, match=words):
        build_loader(spec_of(packed, **changes), **options)
    assert own_threads() == []


def test_the_last_full_batch_may_be_the_whole_set(packed):
    (batch,) = take(spec_of(packed, global_batch_size=45), 1)
    assert sorted(batch.sample_ids.tolist()) == list(range(45))
