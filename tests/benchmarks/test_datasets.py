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
