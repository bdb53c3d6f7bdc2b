"""Held-out images: a share of each class, the same for the same seed, and never a file whose bytes
are also trained on."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastmoco_pipelines.making.holdout import also_in, held_out_names, same_bytes
from fastmoco_pipelines.making.sources import Source


def write(folder: Path, **classes: int) -> list[Source]:
    """Files of different content and equal length, so many in each class."""
    sources = []
    for label, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            path = folder / name / f"{i:03d}.jpg"
            path.write_bytes(f"{name:>9} {i:03d}".encode())
            sources.append(Source(path, f"{name}/{i:03d}.jpg", label))
    return sources


def by_class(names: frozenset[str]) -> dict[str, int]:
    classes = [name.split("/")[0] for name in names]
    return {name: classes.count(name) for name in set(classes)}


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.1, {"a": 10, "b": 3, "c": 1}),
        (0.5, {"a": 50, "b": 15, "c": 1}),
        (0.001, dict.fromkeys("abc", 1)),
    ],
)
def test_the_share_is_that_of_each_class(tmp_path, share, expected) -> None:
    """A class of one image is not held out, and each class keeps one to train on."""
    sources = write(tmp_path, a=100, b=30, c=2, d=1)
    assert by_class(held_out_names(sources, share=share, seed=0)) == expected


def test_the_draw_depends_on_seed_and_name_alone(tmp_path) -> None:
    sources = write(tmp_path, a=40, b=40)
    first = held_out_names(sources, share=0.25, seed=0)
    assert held_out_names(sources[::-1], share=0.25, seed=0) == first
    assert held_out_names(sources, share=0.25, seed=1) != first
    more = [*sources, *write(tmp_path / "later", a=4)]
    moved = first ^ held_out_names(more, share=0.25, seed=0)
    assert len(moved) <= 2  # the share of a grown class grows by one


@pytest.mark.parametrize("same", [("a/000.jpg", "a/001.jpg"), ("a/003.jpg", "b/002.jpg")])
@pytest.mark.parametrize("seed", range(8))
def test_equal_files_are_in_one_part(tmp_path, seed, same) -> None:
    sources = write(tmp_path, a=8, b=8)
    (tmp_path / same[1]).write_bytes((tmp_path / same[0]).read_bytes())
    held_out = held_out_names(sources, share=0.5, seed=seed)
    assert (same[0] in held_out) == (same[1] in held_out)
    assert sorted(map(len, same_bytes(sources))) == [1] * 14 + [2]


def test_images_of_another_folder_are_found_by_their_bytes(tmp_path) -> None:
    trained, held_out = write(tmp_path / "x", a=3), write(tmp_path / "y", b=3)
    held_out[1].path.write_bytes(trained[2].path.read_bytes())
    assert also_in(held_out, trained) == {"b/001.jpg"}


def test_only_files_of_equal_size_are_read(tmp_path, monkeypatch) -> None:
    sources = write(tmp_path, a=3)
    for number, source in enumerate(sources):
        source.path.write_bytes(bytes(number + 1))
    monkeypatch.setattr("fastmoco_pipelines.making.holdout.hash_file", None)
    assert len(same_bytes(sources)) == 3
