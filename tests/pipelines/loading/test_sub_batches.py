"""A batch in parts: what DALI holds is bounded, and neither bits nor errors nor the healing know of
it."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali")

from fastmoco_pipelines import Batch, LoaderSpec, build_loader, moco_v3_views
from fastmoco_pipelines.formats.headers import structure
from fastmoco_pipelines.healing.culprit import Suspects
from fastmoco_pipelines.sampling.order import epoch_order
from fastmoco_pipelines.spec import DECODE_GB, GPU_SUB_BATCH, EvalSpec
from fastmoco_pipelines.views import engine
from fastmoco_pipelines.views.dali import DecodeError, EvalPipeline, ViewPipeline
from fastmoco_pipelines.views.engine import Engine, parts_of
from fastmoco_pipelines.views.graph import GPU_DECODER
from tests.pipelines.dali_cases import draw, photographs
from tests.pipelines.damage import damaged_copy

COUNT = 11
PAIR = moco_v3_views(24)[0], moco_v3_views(24, color="dali")[1]  # one view by either hand


def pipeline(sub_batch: int | None, **options) -> ViewPipeline:
    return ViewPipeline(PAIR, batch_size=COUNT, sub_batch=sub_batch, threads=1, **options)


@pytest.fixture(scope="module")
def encoded() -> list[np.ndarray]:
    return photographs(COUNT)


@pytest.fixture(scope="module")
def draws(encoded):
    return draw(PAIR[0], encoded), draw(PAIR[1], encoded, view=2)


# Of 11 images: single ones; a ragged last part; a last part of one; all at once; more than there
# are.
@pytest.mark.parametrize("sub_batch", [1, 4, 5, 11, 40])
@pytest.mark.parametrize("view_dtype", ["float32", "uint8"])
def test_parts_change_no_bit(sub_batch: int, view_dtype, encoded, draws) -> None:
    whole = pipeline(None, view_dtype=view_dtype).run(encoded, draws)
    parts = pipeline(sub_batch, view_dtype=view_dtype)
    for _ in range(2):
        for made, wanted in zip(parts.run(encoded, draws), whole, strict=True):
            assert made.is_contiguous()
            assert made.dtype == wanted.dtype
            assert torch.equal(made, wanted)
    some = parts.run(
        encoded[:3], [each.rows(slice(3)) for each in draws]
    )  # a smaller batch than before
    assert all(torch.equal(made, wanted[:3]) for made, wanted in zip(some, whole, strict=True))


def decoded_bytes(encoded, draws) -> list[int]:
    """Of each image, with the window that DALI cuts for the second view."""
    height, width = draws[1].crop[:, 2:].astype(int).T
    sizes = [structure(image.tobytes()).decoder_bytes for image in encoded]
    return [size + 3 * int(h * w) for size, h, w in zip(sizes, height, width, strict=True)]


# Single ones, some of which are above it; two to three; all in one.
@pytest.mark.parametrize("share", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("view_dtype", ["float32", "uint8"])
def test_a_budget_of_decoded_bytes_changes_no_bit(
    share, view_dtype, encoded, draws, monkeypatch
) -> None:
    whole = pipeline(None, view_dtype=view_dtype).run(encoded, draws)
    sizes = decoded_bytes(encoded, draws)
    budget = int(share * sum(sizes))
    ran: list[slice] = []
    outputs = Engine._outputs

    def seen(self, some, named, rows, count):
        ran.append(rows)
        return outputs(self, some, named, rows, count)

    monkeypatch.setattr(Engine, "_outputs", seen)
    made = pipeline(5, view_dtype=view_dtype, decode_bytes=budget).run(encoded, draws)
    for got, wanted in zip(made, whole, strict=True):
        assert torch.equal(got, wanted)
    assert ran == list(parts_of(sizes, 5, budget))
    assert all(rows.stop - rows.start == 1 or sum(sizes[rows]) <= budget for rows in ran)
    assert (len(ran) == 11) == (share == 0.02)


def test_metadata_is_removed_part_by_part(encoded, draws, monkeypatch) -> None:
    """Or a batch would be held twice."""
    views = pipeline(4)
    whole = views.run(encoded, draws)
    long = [np.frombuffer(image.tobytes() + bytes(9), np.uint8) for image in encoded]
    made: list[int] = []
    held: list[int] = []
    really, outputs = engine.plain_image, Engine._outputs

    def plain(data, known):
        made.append(len(data))
        return really(data, known)

    def seen(self, *rest):
        held.append(len(made))
        return outputs(self, *rest)

    monkeypatch.setattr(engine, "plain_image", plain)
    monkeypatch.setattr(Engine, "_outputs", seen)
    same = views.run(long, draws)
    assert held == [4, 8, 11]
    assert made == [len(image) for image in long]
    assert all(torch.equal(one, other) for one, other in zip(same, whole, strict=True))


def test_plain_images_have_the_usual_budget(encoded, monkeypatch) -> None:
    """Of evaluation and of the search for bad images."""
    plain = EvalSpec(size=16, resize=16)
    whole = EvalPipeline(plain, batch_size=COUNT, threads=1).run(encoded)
    runs = []
    outputs = Engine._outputs
    monkeypatch.setattr(
        Engine, "_outputs", lambda *arguments: runs.append(arguments[3]) or outputs(*arguments)
    )
    monkeypatch.setitem(DECODE_GB, "cpu", 1e-6)
    assert torch.equal(EvalPipeline(plain, batch_size=COUNT, threads=1).run(encoded), whole)
    assert len(runs) == COUNT


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"decode_gb": -1.0}, "decode_gb=-1.0: a size in GB"),
        ({"decode_gb": float("nan")}, "decode_gb=nan"),
        ({"decode_gb": 1e308}, "decode_gb=1e"),
        ({"seconds_per_image": 0.0}, "seconds_per_image=0.0: needs a time above 0"),
        ({"seconds_per_image": float("inf")}, "seconds_per_image=inf"),
        ({"seconds_per_image": float("nan")}, "seconds_per_image=nan"),
    ],
)
def test_budgets_and_times_that_make_no_sense_are_refused(changes, rule) -> None:
    with pytest.raises(ValueError, match=rule):
        LoaderSpec(shards="x", global_batch_size=2, **changes)


def test_parts_are_as_large_as_they_may_be() -> None:
    def parts(sizes: list[int], most: int, budget: int) -> list[list[int]]:
        return [sizes[rows] for rows in parts_of(sizes, most, budget)]

    assert parts([4, 4, 4, 4, 4], 9, 8) == [[4, 4], [4, 4], [4]]
    assert parts([9, 1, 9, 8, 1], 9, 8) == [[9], [1], [9], [8], [1]]
    assert parts([1, 1, 1, 1, 9], 3, 8) == [[1, 1, 1], [1], [9]]
    assert parts([9], 3, 8) == [[9]]
    assert parts([0, 0, 0], 9, 1) == [[0, 0, 0]]


def test_dali_never_sees_more_than_a_part(encoded, draws, monkeypatch) -> None:
    seen = []
    outputs = Engine._outputs

    def watched(self, some, *arguments):
        seen.append(len(some))
        return outputs(self, some, *arguments)

    monkeypatch.setattr(Engine, "_outputs", watched)
    made = pipeline(4)
    made.run(encoded, draws)
    assert seen == [4, 4, 3]
    assert made._engine._options["batch_size"] == 4


def test_memory_is_asked_for_once_and_after_the_first_run(encoded, draws, monkeypatch) -> None:
    happened = []
    outputs = Engine._outputs
    monkeypatch.setattr(
        Engine, "_outputs", lambda *arguments: happened.append("run") or outputs(*arguments)
    )
    pipeline(4).run(encoded, draws, before_output=lambda: happened.append("asked"))
    assert happened == ["run", "asked", "run", "run"]


def test_a_bad_image_of_a_later_part_has_its_row_of_the_batch(encoded, draws) -> None:
    made = pipeline(4)
    before = made.run(encoded, draws)
    text = np.frombuffer(b"<html>", dtype=np.uint8)
    spoilt = [*encoded[:5], text, *encoded[6:10], text]
    with pytest.raises(
        DecodeError, match=r"2 of 11 images cannot be decoded; image 5: neither JPEG"
    ) as caught:
        made.run(spoilt, draws)
    assert [row for row, _ in caught.value.faults] == [5, 10]
    half = encoded[6][: len(encoded[6]) // 2]  # its header is whole: DALI has to notice
    with pytest.raises(
        DecodeError, match=r"the views of a batch of 11 \(images 4 to 7\)"
    ) as caught:
        made.run([*encoded[:6], half, *encoded[7:]], draws)
    assert caught.value.faults == ()
    assert all(torch.equal(a, b) for a, b in zip(made.run(encoded, draws), before, strict=True))


def test_a_decoder_that_has_failed_gives_its_memory_back(encoded, draws, monkeypatch) -> None:
    """At once: its batch is decoded again, image by image, while the error is still held."""
    built = []
    build = engine.build_pipeline

    def seen(*arguments, **options):
        made = build(*arguments, **options)
        built.append(weakref.ref(made))
        return made

    monkeypatch.setattr(engine, "build_pipeline", seen)
    half = encoded[6][: len(encoded[6]) // 2]
    suspects = Suspects(device="cpu", device_id=None, threads=1, decode_bytes=1)
    runs: list[int] = []
    outputs = Engine._outputs

    def counted(self, some, *rest):
        runs.append(len(some))
        return outputs(self, some, *rest)

    gc.disable()
    try:
        spoilt = [*encoded[:6], half, *encoded[7:]]
        with pytest.raises(DecodeError) as caught:
            pipeline(None).run(spoilt, draws)
        assert [made() for made in built] == [None]
    finally:
        gc.enable()
    # Those that are tried together have the budget of the loader, here of one image.
    monkeypatch.setattr(Engine, "_outputs", counted)
    assert list(suspects.find(caught.value, spoilt)) == [6]
    assert set(runs) == {1}


def spec_of(folder: Path, **changes) -> LoaderSpec:
    view1, view2 = moco_v3_views(16)
    options = {"views": (view1, view2), "global_batch_size": 12, "seed": 7, "threads": 1}
    return LoaderSpec(shards=str(folder), **options | changes)


def take(spec: LoaderSpec, start: int = 0) -> list[Batch]:
    with build_loader(spec, start_step=start) as loader:
        return [loader.next() for _ in range(3)]


def test_a_healed_batch_is_the_same(packed, tmp_path) -> None:
    """One image of the second part that the structure gives away, one that only DALI finds, and one
    in the last part."""
    first = epoch_order(7, 0, 45)
    kinds = {int(first[6]): "garbage", int(first[7]): "truncated", int(first[11]): "truncated"}
    folder = damaged_copy(packed, tmp_path / "set", kinds)
    wanted = take(spec_of(folder))
    for got, want in zip(take(spec_of(folder, sub_batch=5)), wanted, strict=True):
        assert np.array_equal(got.sample_ids, want.sample_ids)
        assert not set(kinds) & set(got.sample_ids.tolist())
        assert torch.equal(got.views[0], want.views[0])
        assert torch.equal(got.views[1], want.views[1])


def test_the_size_of_a_part_follows_the_device() -> None:
    spec = LoaderSpec(shards="x", global_batch_size=4096)
    on_gpu = LoaderSpec(shards="x", global_batch_size=4096, device="gpu")
    assert (spec.images_per_run(1000), on_gpu.images_per_run(1000), on_gpu.images_per_run(9)) == (
        1000,
        GPU_SUB_BATCH,
        9,
    )
    assert LoaderSpec(shards="x", global_batch_size=4096, sub_batch=7).images_per_run(1000) == 7
    for field in ("sub_batch", "prefetch"):
        with pytest.raises(ValueError, match=f"{field}=-1"):
            LoaderSpec(shards="x", global_batch_size=2, **{field: -1})
    with pytest.raises(ValueError, match="sub_batch=0: needs at least one image"):
        pipeline(0)


@pytest.mark.parametrize("view_dtype", ["float32", "uint8"])
@pytest.mark.parametrize("color", ["exact", "dali"])
def test_the_graph_for_gpus_is_defined(color: str, view_dtype) -> None:
    """As far as a machine without a GPU tells: every operator takes its options, and the views come
    out on the GPU."""
    from nvidia.dali import pipeline_def

    pair = moco_v3_views(24, color=color)
    made = ViewPipeline(
        pair, batch_size=8, sub_batch=4, device="gpu", device_id=0, view_dtype=view_dtype
    )
    graph = pipeline_def(made._engine._graph, **made._engine._options)()
    assert [output.device for output in graph._graph_out] == ["gpu", "gpu"]


def test_the_decoder_on_gpus_refuses_other_options(monkeypatch) -> None:
    """What the test above would miss if defining a graph looked at nothing."""
    from nvidia.dali import pipeline_def

    made = ViewPipeline(PAIR, batch_size=8, device="gpu", device_id=0)
    for option, value, words in (
        ("hw_decoder_load", "much", "to float: 'much'"),
        ("hw_load", 1.0, "KeyError"),
    ):
        with monkeypatch.context() as patched:
            patched.setitem(GPU_DECODER, option, value)
            with pytest.raises(Exception, match=words):
                pipeline_def(made._engine._graph, **made._engine._options)()


@pytest.mark.gpu
def test_parts_change_no_bit_on_a_gpu(encoded, draws) -> None:
    options = {"device": "gpu", "device_id": 0}
    whole = pipeline(None, **options).run(encoded, draws)
    parts = pipeline(4, **options)
    for _ in range(3):
        for made, wanted in zip(parts.run(encoded, draws), whole, strict=True):
            assert made.is_cuda
            assert torch.equal(made, wanted)


def test_batches_under_a_budget_are_the_same_from_any_step(packed) -> None:
    """With small crops too, and any number of images at once."""
    small = replace(moco_v3_views(8)[0], crop_scale=(0.05, 0.4), copies=2)
    spec = spec_of(packed, views=(*moco_v3_views(16), small))
    wanted = take(spec)
    for changes, start in (({}, 0), ({}, 2), ({"sub_batch": 3}, 1)):
        tight = replace(spec, decode_gb=3e-6, **changes)  # two images of the set, or one
        for got, want in zip(take(tight, start), wanted[start:], strict=False):
            assert np.array_equal(got.sample_ids, want.sample_ids)
            assert all(torch.equal(a, b) for a, b in zip(got.views, want.views, strict=True))
