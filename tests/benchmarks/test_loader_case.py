"""The loader case: every feed delivers pictures, ours are Pillow's, and one that delivers nothing
is not compared."""

from __future__ import annotations

import dataclasses
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.cases import loader
from benchmarks.loading import Feed, Job, pillow_feed, random_draws
from benchmarks.photos import cut_photos
from fastmoco_pipelines.making.pack import pack_folder

SMALL = {
    "size": 32,
    "batch": 4,
    "batches": 1,
    "rounds": 1,
    "workers": 1,
    "memory": 5,
    "device": "cpu",
}


def _photo(seed: int, width: int, height: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("loader")
    (folder / "images").mkdir()
    for i in range(8):
        _photo(i, 64, 48).save(folder / "images" / f"{i}.jpg", quality=92)
    return pack_folder(folder / "images", folder / "shards").pattern


@pytest.fixture
def job(shards) -> Job:
    return Job(shards=shards, size=32, batch=4, device=torch.device("cpu"), threads=1)


def test_every_feed_is_checked_timed_and_compared(shards):
    result = loader.run(
        loader.DEFAULTS | SMALL | {"shards": shards, "packed256": shards, "threads": "1,2"}
    )
    feeds = {"fastmoco exact", "fastmoco dali", "pillow", "dali stock", "webdataset"}
    assert result["failed"] == {}
    assert set(result["checked"]) == feeds
    assert result["checked"]["pillow"]["levels"] < 0.001
    assert result["checked"]["fastmoco exact"]["levels"] < 1.5
    assert set(result["speedup"]) == feeds - {"fastmoco exact"}
    assert set(result["speedup_dali"]) == feeds - {"fastmoco dali"}
    assert set(result["packed"]) == {"packed256 exact", "packed256 dali"}
    assert set(result["scaling"]) == {"2 threads"}
    assert all(0 < x < math.inf for values in result["images_per_cpu_s"].values() for x in values)
    assert len(result["memory"]["resident_mb"]) == 5
    assert result["stages"]["fastmoco exact"]["loader/decode_ms"] > 0


@pytest.mark.parametrize(
    ("views", "reason"),
    [
        (None, "no pair"),
        ((torch.zeros(4, 3, 32, 32), torch.zeros(4, 3, 32, 32)), "not those of pictures"),
        ((torch.full((4, 3, 32, 32), math.nan),) * 2, "not finite"),
        ((torch.randn(4, 3, 32, 16),) * 2, "not float32"),
        ((torch.randn(4, 3, 32, 32).double(),) * 2, "not float32"),
        ((torch.randn(1, 3, 32, 32).expand(4, -1, -1, -1),) * 2, "same picture"),
    ],
)
def test_a_feed_that_delivers_no_pictures_fails(job, views, reason):
    checked, failed = loader.check([Feed(name="broken", next=lambda: views)], job)
    assert reason in failed["broken"]
    assert not checked.get("broken")


def test_without_our_own_pictures_nothing_is_compared(shards, monkeypatch):
    monkeypatch.setitem(loader.LIMITS["cpu"], "fastmoco exact", -1.0)
    result = loader.run(loader.DEFAULTS | SMALL | {"shards": shards})
    assert "from Pillow" in result["failed"]["fastmoco exact"]
    assert result["speedup"] == {}
    assert "images_per_cpu_s" not in result


def test_pictures_of_other_draws_are_not_taken_for_pillows(job):
    real = pillow_feed(job)

    def swapped():
        view1, view2 = real.next()
        return view2, view1

    _, failed = loader.check([dataclasses.replace(real, name="fastmoco exact", next=swapped)], job)
    assert "levels from Pillow" in failed["fastmoco exact"]


def test_a_user_s_random_draws_lie_inside_the_image(job):
    spec = job.views("exact")[0]
    for _ in range(50):
        top, left, height, width = random_draws(spec, _photo(0, 64, 48)).crop[0].tolist()
        assert 0 <= top <= 48 - height
        assert 0 <= left <= 64 - width
        assert min(height, width) > 0


def test_photographs_are_cut_to_the_size_of_a_data_set(tmp_path):
    (tmp_path / "src").mkdir()
    for name in ("a.jpg", "copy_of_a.jpg"):
        _photo(0, 1400, 1050).save(tmp_path / "src" / name)
    _photo(1, 300, 200).save(tmp_path / "src" / "small.jpg")
    assert cut_photos(tmp_path / "src", tmp_path / "out", cuts=2, flat_bytes=0) == 2
    for path in (tmp_path / "out").rglob("*.jpg"):
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            assert sorted(image.size) in ([375, 500], [334, 500], [480, 640])
    with pytest.raises(ValueError, match="flat"):
        cut_photos(tmp_path / "src", tmp_path / "flat", cuts=1, flat_bytes=10**7)
    with pytest.raises(ValueError, match="no JPEG photograph"):
        cut_photos(tmp_path / "out", tmp_path / "again")


def test_a_device_that_is_none_is_refused():
    with pytest.raises(ValueError, match="device='tpu'"):
        loader.run(loader.DEFAULTS | {"device": "tpu"})
