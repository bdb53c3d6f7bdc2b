"""The real sets are unpacked as their files say, and no pixel is in both halves of a photograph."""

from __future__ import annotations

import gzip

import numpy as np
from PIL import Image

from benchmarks import datasets


def test_idx_files_become_pngs_by_class(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 28, 28), dtype=np.uint8)
    labels = np.array([0, 9, 3, 3, 1], dtype=np.uint8)
    for prefix in ("train", "t10k"):
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(bytes(16) + images.tobytes())
        )
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(
            gzip.compress(bytes(8) + labels.tobytes())
        )
    assert datasets.fashion(tmp_path, tmp_path / "out") == 10
    with Image.open(tmp_path / "out" / "train" / "boot" / "00001.png") as image:
        assert np.array_equal(np.asarray(image), images[1])
    assert len(list((tmp_path / "out" / "test" / "dress").iterdir())) == 2


def test_windows_are_grey_and_not_flat_and_of_one_photograph_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "TRAIN_WINDOWS", 8)
    monkeypatch.setattr(datasets, "TEST_WINDOWS", 4)
    rough = np.random.default_rng(0).integers(0, 256, (90, 160, 3), dtype=np.uint8)
    rough = rough.repeat(8, axis=0).repeat(8, axis=1)
    half = rough.copy()
    half[:, 800:] = 90  # nothing to see on the right, where held-out windows come from
    tall = np.ascontiguousarray(rough.transpose(1, 0, 2))
    photos = tmp_path / "photos"
    for folder, name, pixels in (
        ("a", "1.jpg", tall),
        ("a", "2.jpg", rough),
        ("a", "3.jpg", rough[::-1]),
        ("b", "1.jpg", half),
        ("c", "1.png", rough),
    ):
        (photos / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(photos / folder / name)
    assert datasets.windows(photos, tmp_path / "out") == 12
    made = sorted(path.relative_to(tmp_path / "out") for path in tmp_path.glob("out/*/*/*.png"))
    assert {path.parts[:2] for path in made} == {("train", "a"), ("test", "a")}
    for path in made:
        with Image.open(tmp_path / "out" / path) as window:
            assert (window.size, window.mode) == ((32, 32), "L")
            assert np.asarray(window, np.float32).std() >= datasets.MIN_STD


def test_patches_of_the_two_sides_share_no_pixel(tmp_path, monkeypatch):
    """Left of 60 % is red, right of 65 % blue, between them green: a patch may hold its own colour
    only."""
    monkeypatch.setattr(datasets, "TRAIN_PATCHES", 20)
    monkeypatch.setattr(datasets, "TEST_PATCHES", 10)
    photo = np.zeros((720, 1000, 3), np.uint8)
    photo[:, :600, 0], photo[:, 600:650, 1], photo[:, 650:, 2] = 255, 255, 255
    (tmp_path / "photos").mkdir()
    for name in ("a.png", "copy_of_a.png"):
        Image.fromarray(photo).save(tmp_path / "photos" / name)
    Image.fromarray(photo[:100]).save(tmp_path / "photos" / "too_small.png")
    assert datasets.patches(tmp_path / "photos", tmp_path / "out") == 30
    for split, channel in (("train", 0), ("test", 2)):
        for path in (tmp_path / "out" / split).rglob("*.png"):
            with Image.open(path) as patch:
                pixels = np.asarray(patch)
            assert pixels.shape == (32, 32, 3)
            assert (pixels[..., channel] == 255).all()
            assert pixels.sum() == pixels[..., channel].astype(int).sum()
