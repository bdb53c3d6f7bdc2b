"""The recipe that is suggested fits the device, the number of images and their size."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastmoco.config import resolve
from fastmoco.config.resolve import fitting_batch
from fastmoco.recipes import get_recipe
from fastmoco.recipes.suggest import suggest


@pytest.mark.parametrize(
    ("device", "found", "words"),
    [
        ("cpu", {}, "vit_nano8_e60_b256"),
        ("cpu", {"images": 3000, "side": 512}, "vit_nano8_e60_b256"),
        ("cpu", {"images": 60}, "vit_nano8_e60_b256 --global-batch-size 16"),
        ("cpu", {"images": 300_000}, "vit_nano8_e60_b256 --epochs 10"),
        ("gpu", {}, "vit_s16_e300_b1024"),
        ("gpu", {"images": 50_000, "side": 32}, "vit_nano8_e60_b256"),
        ("gpu", {"images": 500, "side": 512}, "vit_nano8_e60_b256 --global-batch-size 128"),
        ("gpu", {"images": 3000, "side": 512}, "vit_s16_e300_b1024 --global-batch-size 512"),
        ("gpu", {"images": 1_281_167, "side": 500}, "vit_s16_e300_b1024"),
        (
            "gpu",
            {"images": 1_281_167, "side": 500, "gpus": 8},
            "vit_s16_e300_b4096 --gpus 8",
        ),
    ],
)
def test_the_command(device, found, words) -> None:
    command = suggest(device, **found).command("--data.shards", "data/train-*.tar")
    recipe, _, options = words.partition(" ")
    rest = f" {options}" if options else ""
    expected = f"fastmoco train {recipe} --data.shards 'data/train-*.tar'{rest} --out runs/first"
    assert command == expected


@pytest.mark.parametrize("images", [2, 3, 7, 60, 255, 768, 5000])
@pytest.mark.parametrize("processes", [1, 2, 6])
def test_a_fitting_batch_can_be_trained(images, processes) -> None:
    batch = fitting_batch(images, most=256, world_size=processes)
    assert batch <= 256
    if images < 2 * processes:
        assert batch > images  # no batch fits
        return
    config = replace(get_recipe("vit_nano8_e60_b256"), global_batch_size=batch)
    resolved = resolve(config, world_size=processes, sample_count=images)
    assert resolved.local_batch_size >= 1
    assert resolved.steps_per_epoch >= 3 or batch == 2 * processes or images < 6


def test_too_few_images_are_refused_with_a_batch_that_fits() -> None:
    config = get_recipe("vit_nano8_e60_b256")
    with pytest.raises(ValueError, match="the 60 training images; --global-batch-size 16 fits"):
        resolve(config, world_size=1, sample_count=60)
    with pytest.raises(ValueError, match=r"the 1 training images$"):
        resolve(config, world_size=1, sample_count=1)
