"""The grid of views: right size, the originals untouched in it, and the views the loader would
deliver."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco_pipelines.errors import BadImageError
from fastmoco_pipelines.inspecting.preview import denormalise, save_view_grid
from fastmoco_pipelines.making.digits import pack_digits
from fastmoco_pipelines.making.indexing import index_shards
from fastmoco_pipelines.sampling.order import epoch_order
from fastmoco_pipelines.sets.shard_set import ShardSet
from fastmoco_pipelines.spec import ViewSpec


def test_denormalise_undoes_normalise() -> None:
    spec = ViewSpec()
    levels = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3), dtype=np.uint8)
    images = (levels / 255 - np.array(spec.mean)) / np.array(spec.std)
    made = denormalise(torch.tensor(images.transpose(0, 3, 1, 2), dtype=torch.float32), spec)
    assert made.dtype == np.uint8
    assert np.array_equal(made, levels)


def test_grid_of_digits(tmp_path) -> None:
    train, _ = pack_digits(tmp_path / "digits")
    # No operation but the crop, and a crop of everything: the views are the image, the third cell
    # is the mirrored one.
    still = {
        "crop_scale": (1.0, 1.0),
        "crop_ratio": (1.0, 1.0),
        "jitter_probability": 0,
        "grayscale_probability": 0,
    }
    view1 = ViewSpec(size=8, blur_probability=0, flip_probability=0, **still)
    view2 = ViewSpec(size=8, blur_probability=0, flip_probability=1, **still)
    (tmp_path / "new").mkdir()
    (tmp_path / "precious").write_text("all of it")
    (tmp_path / "new" / "views.png").symlink_to(tmp_path / "precious")
    out = save_view_grid(train, (view1, view2), tmp_path / "new" / "views.png", rows=3, seed=5)
    assert (tmp_path / "precious").read_text() == "all of it"
    grid = np.asarray(Image.open(out))
    assert grid.shape == (3 * 100 + 4, 2 * 308 - 4, 3)
    with ShardSet.open(train) as shards:
        encoded = shards.read(epoch_order(5, 0, len(shards))[:6])
    for index, data in enumerate(encoded):
        digit = np.asarray(Image.open(io.BytesIO(data.tobytes())).convert("RGB"))
        top, left = 4 + 100 * (index // 2), 4 + 308 * (index % 2)
        for column, shown in enumerate((digit, digit, digit[:, ::-1])):
            cell = grid[top : top + 96, left + 100 * column : left + 100 * column + 96]
            assert np.array_equal(cell, shown.repeat(12, axis=0).repeat(12, axis=1)), (
                index,
                column,
            )


def test_grid_follows_the_seed(tmp_path) -> None:
    train, _ = pack_digits(tmp_path / "digits")
    view = ViewSpec(size=16, crop_scale=(0.5, 1.0))
    pictures = [
        save_view_grid(
            train, (view, view), tmp_path / f"{name}.png", rows=1, seed=seed
        ).read_bytes()
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert pictures[0] == pictures[1] != pictures[2]


def test_an_image_that_cannot_be_decoded_is_named(tmp_path, noise_image, write_tar) -> None:
    good, broken = noise_image(0, format="PNG"), bytearray(noise_image(1, format="PNG"))
    broken[len(broken) // 2] ^= 255  # a wrong checksum inside a sound structure
    shards = str(write_tar(tmp_path / "x.tar", [("a.png", good), ("b.png", bytes(broken))]))
    index_shards(shards)
    view = ViewSpec(size=16)
    with pytest.raises(BadImageError, match=r"x\.tar: b\.png: it cannot be decoded"):
        save_view_grid(shards, (view, view), tmp_path / "views.png", rows=1)


def test_a_grid_of_eight_views_shows_one_image_a_row_and_all_lines_of_its_draws(tmp_path) -> None:
    train, _ = pack_digits(tmp_path / "digits")
    still = {
        "crop_scale": (1.0, 1.0),
        "crop_ratio": (1.0, 1.0),
        "jitter_probability": 0,
        "grayscale_probability": 0,
    }
    plain = ViewSpec(size=8, blur_probability=0, flip_probability=0, **still)
    views = (plain, ViewSpec(size=8, blur_probability=0, flip_probability=1, copies=7, **still))
    told: list[str] = []
    grids = [
        np.asarray(
            Image.open(
                save_view_grid(
                    train,
                    views,
                    tmp_path / "views.png",
                    rows=2,
                    seed=5,
                    parameters=shown,
                    tell=told.append,
                )
            )
        )
        for shown in (False, True)
    ]
    assert grids[0].shape == (2 * 100 + 4, 9 * 100 + 4, 3)
    height = 9 * 13 + 12  # nine lines of text are higher than a cell
    assert grids[1].shape[0] == 2 * height + 4
    with ShardSet.open(train) as shards:
        first = epoch_order(5, 0, len(shards))[:2]
        encoded = shards.read(first)
        names = [f"row {row}, image 1: {shards.path_of(i)}" for row, i in enumerate(first, start=1)]
    assert told == 2 * names
    for grid, row_height in zip(grids, (100, height), strict=True):
        for row, data in enumerate(encoded):
            digit = np.asarray(Image.open(io.BytesIO(data.tobytes())).convert("RGB"))
            top = 4 + row_height * row
            for column, shown in enumerate((digit, digit, *[digit[:, ::-1]] * 7)):
                cell = grid[top : top + 96, 4 + 100 * column : 4 + 100 * column + 96]
                assert np.array_equal(cell, shown.repeat(12, axis=0).repeat(12, axis=1)), (
                    row,
                    column,
                )
    text = grids[1][:, 904:]
    for row in range(2):
        for line in range(8):
            top = row * height + 6 + 13 * line
            assert (text[top : top + 13] < 128).any(), (row, line)
