"""The case of many crops: ours are the reference's to the bit, and torchvision may be absent."""

from __future__ import annotations

from benchmarks.cases import multi_crop

SMALL = {"size": 24, "local_size": 8, "local_copies": 2, "batch": 4, "batches": 1, "rounds": 1}


def test_every_crop_is_checked_and_the_stand_in_is_named(monkeypatch) -> None:
    def absent(job: object) -> None:
        raise ImportError("no torchvision here")

    monkeypatch.setattr(multi_crop, "torchvision_feed", absent)
    result = multi_crop.run(multi_crop.DEFAULTS | SMALL | {"parts": 0})
    assert result["failed"] == {}
    assert result["crops"] == [24, 24, 8, 8]
    assert round(result["checked"][multi_crop.SUBJECT]) == 0
    assert set(result["speedup"]) == {"pillow"}
    assert "pillow is its stand-in" in result["skipped"]["torchvision"]


def test_a_loader_with_other_crops_is_not_compared(monkeypatch) -> None:
    original = multi_crop.fastmoco_feed

    def shifted(job, color):
        feed = original(job, color)
        following = feed.next
        object.__setattr__(feed, "next", lambda: tuple(view + 0.05 for view in following()))
        return feed

    monkeypatch.setattr(multi_crop, "fastmoco_feed", shifted)
    result = multi_crop.run(multi_crop.DEFAULTS | SMALL | {"parts": 0})
    assert "all must be equal" in result["failed"][multi_crop.SUBJECT]
    assert result["speedup"] == {}
