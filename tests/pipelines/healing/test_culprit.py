"""Who is blamed for a failed batch: the image that fails alone, and nobody where DALI itself is at
fault."""

from __future__ import annotations

import numpy as np
import pytest

from fastmoco_pipelines.errors import BadImageError
from fastmoco_pipelines.healing.culprit import raise_bad_image
from fastmoco_pipelines.sets.shard_set import ShardSet
from fastmoco_pipelines.views import dali
from fastmoco_pipelines.views.dali import DecodeError

ERROR = DecodeError("the batch failed")


def blame(packed, damage: dict[int, bytes]) -> Exception:
    """The error raised for a batch of samples 5, 20, 40, some replaced by other bytes."""
    ids = np.array([5, 20, 40])
    with ShardSet.open(str(packed)) as shards:
        encoded = [
            np.frombuffer(damage.get(i, data.tobytes()), np.uint8)
            for i, data in zip(ids, shards.read(ids), strict=True)
        ]
        with pytest.raises(RuntimeError) as raised:
            raise_bad_image(
                ERROR, shards=shards, sample_ids=ids, encoded=encoded, device="cpu", device_id=None
            )
    return raised.value


def test_the_image_that_fails_is_named(packed, noise_image):
    error = blame(packed, {20: noise_image(0, 64, 64)[:-30]})
    assert isinstance(error, BadImageError)
    assert str(error).startswith("train-000001.tar: 000000020.")
    assert "truncated" in str(error)
    assert "more images" not in str(error)
    assert error.__cause__ is ERROR


def test_further_ones_are_counted(packed):
    error = blame(packed, {5: b"<html>", 40: b""})
    assert str(error).startswith("train-000000.tar: 000000005.")
    assert "and 1 more images of this batch" in str(error)


def test_nobody_is_blamed_when_all_decode(packed):
    assert blame(packed, {}) is ERROR


def test_nobody_is_blamed_when_dali_fails_at_everything(packed, monkeypatch):
    def fail(self, encoded):
        raise DecodeError("out of memory")

    monkeypatch.setattr(dali.EvalPipeline, "run", fail)
    assert blame(packed, {}) is ERROR
    assert isinstance(blame(packed, {20: b"<html>"}), BadImageError)
