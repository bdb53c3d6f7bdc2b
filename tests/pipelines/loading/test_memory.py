"""How much a loader holds: by arithmetic, and by counting the batches that live."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("nvidia.dali")

from fastmoco_pipelines import LoaderSpec, build_loader, loader_bytes, moco_v3_views
from fastmoco_pipelines.loading import loader as loader_module
from fastmoco_pipelines.loading.memory import DECODER_BYTES
from fastmoco_pipelines.loading.threads import BatchPlaces
from fastmoco_pipelines.spec import DECODE_GB
from fastmoco_pipelines.views.graph import GPU_DECODER
from tests.pipelines.loading.test_loader import wait_until

VIEW1, VIEW2 = moco_v3_views()
LARGE = LoaderSpec(
    shards="x",
    views=(VIEW1, VIEW2),
    global_batch_size=4096,
    device="gpu",
    threads=14,
    view_dtype="uint8",
)


def spec_of(folder: Path, **changes) -> LoaderSpec:
    view1, view2 = moco_v3_views(16)
    options = {"views": (view1, view2), "global_batch_size": 12, "seed": 7, "threads": 1}
    return LoaderSpec(shards=str(folder), **options | changes)


@pytest.mark.parametrize("color", ["exact", "dali"])
def test_batches_of_4096_hold_two_gigabytes_beside_the_one_in_use(color) -> None:
    view1, view2 = moco_v3_views(color=color)
    held = loader_bytes(replace(LARGE, views=(view1, view2)))
    assert held.batch_bytes == held.ready_bytes == 2 * 4096 * 3 * 224 * 224
    assert held.beside_batch_bytes == held.ready_bytes + held.scratch_bytes <= 2e9
    assert held.peak_bytes == held.batch_bytes + held.beside_batch_bytes


def test_bytes_follow_the_spec() -> None:
    plain = loader_bytes(LARGE)
    floats = loader_bytes(replace(LARGE, view_dtype="float32"))
    assert floats.batch_bytes == 4 * plain.batch_bytes
    assert loader_bytes(replace(LARGE, prefetch=3)).ready_bytes == 3 * plain.batch_bytes
    assert loader_bytes(LARGE, world_size=8).batch_bytes == plain.batch_bytes / 8
    assert (
        loader_bytes(LARGE, world_size=8).scratch_bytes == plain.scratch_bytes
    )  # still 128 images a run
    assert loader_bytes(replace(LARGE, sub_batch=256)).scratch_bytes > 1.5 * plain.scratch_bytes
    # Every image of a run holds its decoded pixels, a window and a few views' worth of levels.
    assert plain.scratch_bytes > 128 * (600_000 + 2 * 324_000 + 6 * 3 * 224**2)
    sharp = replace(VIEW2, blur_probability=0)
    without, with_blur = (replace(LARGE, views=(first, sharp)) for first in (sharp, VIEW2))
    assert loader_bytes(without).scratch_bytes < loader_bytes(with_blur).scratch_bytes
    on_cpu = loader_bytes(replace(LARGE, device="cpu"))
    assert on_cpu.ready_bytes == 3 * on_cpu.batch_bytes  # two finished, one in the making
    assert on_cpu.scratch_bytes > 4096 * 600_000
    # Large images fill the budget: on a GPU that is kept free, on a CPU no more is held.
    most = replace(LARGE, decode_gb=3)
    assert loader_bytes(most).scratch_bytes > 3e9 > plain.scratch_bytes > 1e9 * DECODE_GB["gpu"]
    least = replace(LARGE, device="cpu", decode_gb=0.1)
    assert loader_bytes(least).scratch_bytes < 4096 * 600_000
    with pytest.raises(
        ValueError, match="global_batch_size=4096: must be a multiple of world_size=3"
    ):
        loader_bytes(LARGE, world_size=3)
    with pytest.raises(ValueError, match="world_size=0"):
        loader_bytes(LARGE, world_size=0)


def test_the_decoders_buffer_is_what_it_is_told() -> None:
    assert GPU_DECODER["device_memory_padding"] == DECODER_BYTES


def test_arithmetic_needs_no_torch() -> None:
    code = "import sys; from fastmoco_pipelines import loader_bytes; assert not {'torch', 'nvidia.dali'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


class Census:
    """Counts the batches that exist whenever one begins to be made, and when it is finished."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.live: list[weakref.ref[torch.Tensor]] = []
        self.most = 0
        render = loader_module.Source.render

        def counted(source, prepared):
            self._look(1)
            batch = render(source, prepared)
            self.live.append(weakref.ref(batch.views[0]))
            self._look(0)
            return batch

        monkeypatch.setattr(loader_module.Source, "render", counted)

    def _look(self, making: int) -> None:
        self.live = [ref for ref in self.live if ref() is not None]
        self.most = max(self.most, len(self.live) + making)


@pytest.mark.parametrize(
    ("count_making", "prefetch", "most"),
    # One in use beside those ahead; where the one in the making does not count, it comes on top.
    [(True, 1, 2), (True, 3, 4), (False, 1, 3), (None, 2, 4)],
)
def test_no_more_batches_live_than_the_arithmetic_says(
    packed, monkeypatch, count_making, prefetch, most
) -> None:
    census = Census(monkeypatch)
    spec = spec_of(packed, prefetch=prefetch)
    with build_loader(spec, count_making=count_making) as loader:
        batch = None
        for step in range(8):
            wait_until(lambda: loader.resting)  # as many as may are ready
            del batch
            batch = loader.next()
            assert batch.step == step
    assert census.most == most
    if count_making is not False:
        held = loader_bytes(replace(spec, device="gpu" if count_making else "cpu"))
        assert 1 + held.ready_bytes // held.batch_bytes == most


def test_the_batches_are_the_same(packed) -> None:
    def take(**options) -> list[torch.Tensor]:
        with build_loader(spec_of(packed, prefetch=1), **options) as loader:
            return [loader.next().views[1] for _ in range(5)]

    assert all(torch.equal(a, b) for a, b in zip(take(), take(count_making=True), strict=True))


def test_a_bounded_loader_ends_while_it_waits_for_a_place(packed, own_threads) -> None:
    """Closed, and forgotten: nobody takes the batch whose place the next one waits for."""
    loader = build_loader(spec_of(packed), count_making=True)
    wait_until(lambda: loader.resting)
    loader.close()
    assert not own_threads()
    forgotten = build_loader(spec_of(packed), count_making=True)
    forgotten.next()
    del forgotten
    gc.collect()
    wait_until(lambda: not own_threads())


def test_a_place_is_free_when_the_batch_before_has_been_used() -> None:
    places, stop = BatchPlaces(1), threading.Event()
    assert places.take(stop)
    places.wait()
    threading.Timer(0.3, stop.set).start()
    assert not places.take(stop)
    stop.clear()
    places.give(torch.device("cpu"))
    assert places.take(stop)
    places.wait()


@pytest.mark.gpu
def test_a_gpu_holds_one_batch_beside_the_one_in_use(packed) -> None:
    """Though the work on a batch has not ended when the next one is taken: its memory is waited
    for, not replaced."""
    view1, view2 = moco_v3_views(448)
    changes = {"views": (view1, view2), "view_dtype": "uint8", "global_batch_size": 40}
    spec = spec_of(packed, device="gpu", sub_batch=2, **changes)
    held, part = loader_bytes(spec), 2 * 3 * 448**2
    with build_loader(spec, device_id=0) as loader:
        used, batch = torch.zeros((), dtype=torch.int64, device="cuda"), None
        for step in range(9):
            if step == 3:  # the graph is built, the kernels are compiled
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                others = torch.cuda.memory_stats()["active_bytes.all.current"]
                others -= (
                    2 * held.batch_bytes
                )  # the one in hand and, in the making or ready, the next one
            batch = loader.next()
            assert batch.step == step
            torch.cuda._sleep(100_000_000)  # tens of milliseconds
            used += batch.views[0][0, 0, 0, 0] >= 0
        peak = torch.cuda.memory_stats()["active_bytes.all.peak"]
    assert int(used) == 9
    # A part of either view, and the planes and buffers of a blur, come and go.
    assert peak - max(others, 0) <= 2 * held.batch_bytes + 8 * part + (8 << 20)
