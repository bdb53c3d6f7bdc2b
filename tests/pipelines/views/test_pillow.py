"""Without DALI, Pillow decodes: the same levels and the same views; a GPU and DALI's own colors are
refused with the cure."""

from __future__ import annotations

import io
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco_pipelines import LoaderSpec, build_loader
from fastmoco_pipelines.errors import DecodeError, DecoderBrokenError
from fastmoco_pipelines.spec import EvalSpec, ViewSpec, moco_v3_views
from fastmoco_pipelines.views import runtime
from fastmoco_pipelines.views.dali import EvalPipeline, ViewPipeline
from fastmoco_pipelines.views.decoding import decode_image
from fastmoco_pipelines.views.draws import draw_batch
from tests.pipelines.image_corpus import BAD, GARBLED, GOOD, encode, ihdr, picture, png

ODD = {
    f"{mode}_{subsampling}_{quality}_{height}x{width}_{progressive}.jpg": encode(
        picture("RGB", height, width).convert(mode),
        "JPEG",
        quality=quality,
        progressive=progressive,
        **({} if subsampling is None else {"subsampling": subsampling}),
    )
    for mode, subsampling in (
        ("RGB", "4:4:4"),
        ("RGB", "4:2:2"),
        ("RGB", "4:2:0"),
        ("RGB", "4:1:1"),
        ("L", None),
        ("CMYK", None),
    )
    for quality in (10, 95)
    for height, width in ((1, 1), (7, 5), (17, 33), (101, 77))
    for progressive in (False, True)
}
"""JPEGs of odd sizes in every chroma subsampling."""
ROUNDED = {"rgb_16.png"}
"""Pillow keeps the upper byte of 16 bits, DALI rounds."""


@pytest.fixture
def without_dali(monkeypatch):
    """DALI cannot be imported."""
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    runtime.has_dali.cache_clear()
    yield
    monkeypatch.undo()
    runtime.has_dali.cache_clear()


@pytest.fixture(scope="module")
def dali_levels():
    """Every image of the corpus, decoded by DALI."""
    pytest.importorskip("nvidia.dali")
    from fastmoco_pipelines.views.decode_child import Decoder

    decoder = Decoder()
    return {name: np.array(decoder.decode(data)) for name, data in (GOOD | ODD).items()}


@pytest.mark.parametrize("name", GOOD)
def test_every_kind_has_the_levels_of_dali(name, dali_levels) -> None:
    made = decode_image(GOOD[name]).astype(int)
    assert made.shape == dali_levels[name].shape
    apart = np.abs(made - dali_levels[name]).max()
    assert apart <= (name in ROUNDED), f"{apart} levels"


def test_jpegs_of_every_subsampling_and_odd_size_have_the_levels_of_dali(dali_levels) -> None:
    differ = [name for name, data in ODD.items() if (decode_image(data) != dali_levels[name]).any()]
    assert not differ


def test_every_level_of_a_grey_png_of_16_bits_is_that_of_dali() -> None:
    pytest.importorskip("nvidia.dali")
    from fastmoco_pipelines.views.decode_child import Decoder

    levels = np.arange(65536, dtype=">u2").reshape(256, 256)
    rows = b"".join(b"\0" + row.tobytes() for row in levels)
    data = png([ihdr(256, 256, 16, 0), b"IDAT" + zlib.compress(rows), b"IEND"])
    assert np.array_equal(decode_image(data), Decoder().decode(data))


def test_damaged_pixels_are_an_error_that_names_the_row(without_dali) -> None:
    good, bad = GOOD["jpeg.jpg"], BAD["wrong_checksum.png"][0]
    pipeline = EvalPipeline(EvalSpec(size=8, resize=8), batch_size=40, threads=2)
    files = [np.frombuffer(data, np.uint8) for data in [good] * 20 + [bad, good]]
    with pytest.raises(DecodeError, match="1 of 22 images") as caught:
        pipeline.run(files)
    assert [row for row, _ in caught.value.faults] == [20]
    assert len(pipeline.run(files[:20])) == 20  # usable again


@pytest.mark.parametrize(
    "parts", [{}, {"sub_batch": 3}, {"decode_bytes": 60_000}, {"decode_bytes": 1}]
)
def test_views_are_equal_to_the_bit(parts, without_dali, monkeypatch) -> None:
    files = [np.frombuffer(GOOD[name], np.uint8) for name in sorted(GOOD) if name not in ROUNDED]
    sizes = np.array([decode_image(data.tobytes()).shape[:2] for data in files], dtype=np.int32)
    views = moco_v3_views(16)
    draws = draw_batch(
        views, seed=3, epoch=1, sample_ids=np.arange(len(files), dtype=np.int64), sizes=sizes
    )
    made = ViewPipeline(views, batch_size=len(files), **parts).run(files, draws)
    monkeypatch.undo()
    runtime.has_dali.cache_clear()
    if not runtime.has_dali():
        pytest.skip("DALI is not installed")
    by_dali = ViewPipeline(views, batch_size=len(files)).run(files, draws)
    assert all(torch.equal(mine, its) for mine, its in zip(made, by_dali, strict=True))


@pytest.mark.parametrize("size", [16, 64])
def test_knn_images_are_at_most_a_level_apart(size, without_dali, monkeypatch) -> None:
    spec = EvalSpec(size=size, resize=size + 6)
    shapes = ((64, 96), (101, 77), (300, 4), (5, 7))
    files = [np.frombuffer(encode(picture("RGB", *shape), "PNG"), np.uint8) for shape in shapes]
    made = EvalPipeline(spec, batch_size=len(files), threads=2).run(files)
    monkeypatch.undo()
    runtime.has_dali.cache_clear()
    if not runtime.has_dali():
        pytest.skip("DALI is not installed")
    by_dali = EvalPipeline(spec, batch_size=len(files), threads=2).run(files)
    levels = (made - by_dali).abs() * 255 * torch.tensor(spec.std)[None, :, None, None]
    assert levels.max() <= 1.01


def test_a_knn_image_of_its_final_size_is_equal_to_the_bit(without_dali, monkeypatch) -> None:
    spec = EvalSpec(size=64, resize=64)
    files = [np.frombuffer(encode(picture("RGB", 64, 96), "PNG"), np.uint8)]
    made = EvalPipeline(spec, batch_size=1).run(files)
    monkeypatch.undo()
    runtime.has_dali.cache_clear()
    if not runtime.has_dali():
        pytest.skip("DALI is not installed")
    assert torch.equal(made, EvalPipeline(spec, batch_size=1).run(files))


def test_a_loader_delivers_the_same_batches_without_dali(packed, without_dali, monkeypatch) -> None:
    spec = LoaderSpec(shards=str(packed), views=moco_v3_views(16), global_batch_size=15, threads=2)
    with build_loader(spec) as loader:
        mine = [loader.next() for _ in range(4)]
    monkeypatch.undo()
    runtime.has_dali.cache_clear()
    if not runtime.has_dali():
        pytest.skip("DALI is not installed")
    with build_loader(spec) as loader:
        for batch in mine:
            its = loader.next()
            assert (batch.sample_ids == its.sample_ids).all()
            assert all(torch.equal(a, b) for a, b in zip(batch.views, its.views, strict=True))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: EvalPipeline(EvalSpec(), batch_size=1, device="gpu"), r"data\.device='gpu'.*DALI"),
        (
            lambda: build_loader(
                LoaderSpec(shards="x", global_batch_size=2, device="gpu"), device_id=0
            ),
            r"data\.device='gpu'.*pip install.*--data\.device cpu",
        ),
        (
            lambda: ViewPipeline((ViewSpec(color="dali"), ViewSpec()), batch_size=1),
            r"view1\.color='dali'.*pip install.*--data\.view1\.color exact",
        ),
    ],
)
def test_what_needs_dali_is_refused_with_the_cure(make, words, without_dali) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_the_first_of_several_pictures_is_decoded() -> None:
    first, second = picture(), picture().rotate(180)
    out = io.BytesIO()
    first.save(out, "MPO", save_all=True, append_images=[second], quality=90)
    assert np.array_equal(
        decode_image(out.getvalue()),
        np.asarray(Image.open(io.BytesIO(encode(first, "JPEG", quality=90)))),
    )


@pytest.mark.parametrize("name", GARBLED)
def test_what_dali_only_warns_of_is_decoded_alike(name) -> None:
    """`data check` reports these with DALI alone (docs/data.md)."""
    pytest.importorskip("nvidia.dali")
    from fastmoco_pipelines.views.decode_child import Decoder

    assert np.array_equal(decode_image(GARBLED[name]), Decoder().decode(GARBLED[name]))


def test_a_dali_that_cannot_be_imported_is_named(monkeypatch) -> None:
    monkeypatch.setattr(runtime, "has_dali", lambda: True)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(
        DecoderBrokenError, match=r"cannot be imported .*nvidia\.dali.* fastmoco doctor"
    ):
        runtime.load_dali()
