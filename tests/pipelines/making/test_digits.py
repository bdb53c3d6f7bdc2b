"""The digits: scikit-learn's pixels, split once, nothing lost and nothing in both parts."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmoco_pipelines.making.digits import pack_digits
from fastmoco_pipelines.sets.shard_set import ShardSet


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    calls: list[tuple[int, int]] = []
    folder = tmp_path_factory.mktemp("digits")
    train, test = pack_digits(folder, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i + 1, 1797) for i in range(1797)]
    return folder, train, test


def pixels_and_labels(pattern: str) -> Counter[tuple[bytes, int]]:
    with ShardSet.open(pattern) as shards:
        images = [
            Image.open(io.BytesIO(data.tobytes())) for data in shards.read(np.arange(len(shards)))
        ]
        assert {(image.format, image.mode, image.size) for image in images} == {
            ("PNG", "L", (8, 8))
        }
        return Counter(
            (image.tobytes(), label)
            for image, label in zip(images, shards.labels.tolist(), strict=True)
        )


def test_digits_are_scikit_learns_and_split_once(digits):
    from sklearn.datasets import load_digits

    _, train, test = digits
    source = load_digits()
    levels = np.rint(source.images * 255 / 16).astype(np.uint8)
    assert levels.max() == 255
    whole = Counter(
        (image.tobytes(), int(label)) for image, label in zip(levels, source.target, strict=True)
    )
    parts = pixels_and_labels(train), pixels_and_labels(test)
    assert (parts[0].total(), parts[1].total()) == (1437, 360)
    assert parts[0] + parts[1] == whole


def test_split_keeps_the_share_of_every_class(digits):
    _, train, test = digits
    for pattern, share in ((train, 0.8), (test, 0.2)):
        shards = ShardSet.open(pattern)
        assert shards.classes == tuple("0123456789")
        whole = np.bincount(ShardSet.open(train).labels) + np.bincount(ShardSet.open(test).labels)
        assert np.abs(np.bincount(shards.labels) - share * whole).max() < 1


def test_patterns_are_named_after_the_parts(digits):
    folder, train, test = digits
    assert (train, test) == (f"{folder}/train-*.tar", f"{folder}/test-*.tar")
    with pytest.raises(FileExistsError, match="already holds"):
        pack_digits(Path(folder))
