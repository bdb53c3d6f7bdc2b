"""Figures of a set: those of its images, as Pillow sees them; and the picture, without a
display."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from fastmoco_pipelines.errors import ShardError
from fastmoco_pipelines.inspecting.stats import draw_stats, measure_shards
from fastmoco_pipelines.sets.shard_set import ShardSet


def test_figures_are_those_of_the_images(packed):
    stats = measure_shards(str(packed))
    with ShardSet.open(str(packed)) as shards:
        images = [data.tobytes() for data in shards.read(np.arange(len(shards)))]
        labels = shards.labels
    opened = [Image.open(io.BytesIO(data)) for data in images]
    assert stats.widths.tolist() == [image.width for image in opened]
    assert stats.heights.tolist() == [image.height for image in opened]
    assert stats.sizes.tolist() == [len(data) for data in images]
    assert stats.kinds == {"JPEG": 15, "PNG": 15, "WebP": 15}
    assert stats.class_counts() == [("cat", 15), ("dog", 15), ("owl", 15)]
    assert stats.labels.tolist() == labels.tolist()
    assert (len(stats), stats.shards, stats.skipped) == (45, 3, 0)
    assert stats.tar_bytes == sum(path.stat().st_size for path in packed.glob("*.tar"))


def test_quantiles_are_ordered_and_carry_units(packed):
    for name, values in measure_shards(str(packed)).quantiles().items():
        numbers = [values[word] for word in ("smallest", "5 %", "median", "95 %", "largest")]
        assert numbers == sorted(numbers), name
        assert numbers[0] <= values["mean"] <= numbers[-1]


def test_a_set_without_an_index_says_how_to_get_one(tmp_path, write_tar, noise_image):
    with pytest.raises(ShardError, match="fastmoco data index"):
        measure_shards(str(write_tar(tmp_path / "x.tar", [("a.jpg", noise_image(0))])))


@pytest.mark.parametrize("many", [1, 5])
def test_the_picture_is_drawn_without_a_display(
    packed, tmp_path, write_tar, noise_image, monkeypatch, many
):
    pytest.importorskip("matplotlib")
    monkeypatch.delenv("DISPLAY", raising=False)
    from fastmoco_pipelines.making.indexing import index_shards

    path = write_tar(
        tmp_path / "x.tar", [(f"{i}.jpg", noise_image(0)) for i in range(many)]
    )  # all of one size
    index_shards(str(path))
    for pattern, name in ((str(packed), "a.png"), (str(path), "b.png")):
        picture = Image.open(draw_stats(measure_shards(pattern), tmp_path / "pictures" / name))
        assert picture.width > 1000
