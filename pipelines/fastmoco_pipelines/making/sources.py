"""Which files of a folder are images, and of which class. Nothing is opened here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastmoco_pipelines.formats.images import EXTENSIONS


@dataclass(frozen=True, slots=True)
class Source:
    """One image file: `name` is its path below the source folder, `label` -1 where there are no
    classes."""

    path: Path
    name: str
    label: int


def find_sources(
    src: Path, *, follow_links: bool
) -> tuple[list[Source], tuple[str, ...], list[tuple[str, str]]]:
    """The image files below `src`, sorted by name.

    Returns:
        (sources, classes, skipped): class names by label, empty for a flat folder; skipped holds
        (name, reason).

    Raises:
        ValueError: if `src` is no folder, holds no image, or holds images both beside and inside
            class folders.
    """
    if not src.is_dir():
        raise ValueError(f"src={str(src)!r}: there is no such folder")
    skipped: list[tuple[str, str]] = []
    names = []
    for name, reason in _walk(src, "", follow_links):
        if reason is None:
            names.append(name)
        else:
            skipped.append((name, reason))
    names.sort()
    flat = [name for name in names if "/" not in name]
    classes = tuple(sorted({name.split("/", 1)[0] for name in names if "/" in name}))
    if not names:
        raise ValueError(
            f"src={str(src)!r}: holds no .{', .'.join(EXTENSIONS)} ({len(skipped)} other files)"
        )
    if flat and classes:
        raise ValueError(
            f"src={str(src)!r}: holds {len(flat)} images of its own beside folders with images "
            f"({classes[0]!r}, ...): move them into class folders, or all into one flat folder"
        )
    label = {name: i for i, name in enumerate(classes)}
    return (
        [Source(src / name, name, label.get(name.split("/", 1)[0], -1)) for name in names],
        classes,
        skipped,
    )


def _walk(folder: Path, below: str, follow_links: bool) -> Iterator[tuple[str, str | None]]:
    """(name, reason to skip it or None) of every file; links are followed at most once into the
    same folder."""
    seen: set[str] = set()
    stack = [(folder, below)]
    while stack:
        here, prefix = stack.pop()
        real = os.path.realpath(here)
        if real in seen:  # a link back to a folder above
            yield prefix.rstrip("/"), "a link to a folder that is read already"
            continue
        seen.add(real)
        with os.scandir(here) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.is_symlink() and not follow_links:
                    yield name, "a symbolic link"
                elif entry.name.startswith("."):
                    yield name, "hidden"
                elif entry.is_dir():
                    stack.append((Path(entry.path), name + "/"))
                elif not entry.is_file():
                    yield name, "a broken link" if entry.is_symlink() else "no plain file"
                elif entry.name.rpartition(".")[2].lower() not in EXTENSIONS:
                    yield name, "no image by its name"
                else:
                    yield name, None


def has_images(src: Path) -> bool:
    """Whether there is an image file below a folder, by names."""
    return any(reason is None for _, reason in _walk(src, "", False))
