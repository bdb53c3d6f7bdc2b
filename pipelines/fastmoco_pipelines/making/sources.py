"""Which files of a folder are images, and of which class: by their names, and where these say
nothing, by their first bytes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastmoco_pipelines.formats.images import EXTENSIONS, image_kind
from fastmoco_pipelines.formats.manifest import one_form
from fastmoco_pipelines.making.layout import (
    BROKEN_LINK,
    CIRCLE,
    HIDDEN,
    LINK,
    LITTER,
    NO_FILE,
    OTHER_NAME,
    Layout,
    describe_layout,
    nothing_found,
)
from fastmoco_pipelines.text import counted

_LITTER = {
    "@eaDir",
    "__MACOSX",
    "#recycle",
    "@Recycle",
    "$RECYCLE.BIN",
    "System Volume Information",
    "lost+found",
    "__pycache__",
}
"""Folders that systems make beside photographs: thumbnails, deleted files."""
_OTHER = re.compile(
    # Texts, tables and programs; archives and sets; other images and films.
    r".*\.(txt|md|rst|html?|json|jsonl|xml|xmp|csv|tsv|ya?ml|ini|cfg|log|db|py|ipynb|sh|pdf|docx?"
    r"|index|tar|zip|t?gz|bz2|xz|zst|7z|rar|parquet|arrow|tfrecords?|lmdb|mdb|h5|hdf5|npy|npz|mat"
    r"|pth?|safetensors|gif|tiff?|bmp|heic|heif|avif|jp2|jxl|p[gnpb]m|svg|ico|psd|dng|raw|mp4|mov|avi"
    # Copies of editors, and downloads that are not complete.
    r"|bak|old|orig|tmp|temp|swp|part|partial|crdownload|download|aria2)|.*~",
    re.IGNORECASE | re.DOTALL,
)
"""Names of files that are not opened to find an image in them."""


@dataclass(frozen=True, slots=True)
class Source:
    """One image file: `name` is its path below the source folder, `label` -1 where there are no
    classes."""

    path: Path
    name: str
    label: int


@dataclass(frozen=True, slots=True)
class Sources:
    """The images of a folder.

    Attributes:
        images: sorted by name.
        classes: their class names by label, in NFC; empty for a flat folder.
        skipped: (name, reason) of all other files.
        notes: what is unusual about the folder, in sentences.
    """

    images: list[Source]
    classes: tuple[str, ...]
    skipped: list[tuple[str, str]]
    notes: list[str]


def find_sources(src: Path, *, follow_links: bool) -> Sources:
    """The image files below a folder.

    Raises:
        ValueError: if `src` is no folder, holds no image, or holds images both beside and inside
            class folders.
        OSError: if a folder in it cannot be read.
    """
    _require_folder(src)
    skipped: list[tuple[str, str]] = []
    names = []
    folders: list[str] = []
    for name, reason in _walk(src, follow_links, folders):
        if reason is None:
            names.append(name)
        else:
            skipped.append((name, reason))
    names.sort(key=lambda name: (one_form(name), name))
    layout = Layout(src, tuple(names), tuple(sorted(folders)), tuple(skipped))
    if not names:
        raise ValueError(nothing_found(layout))

    # A class is a folder directly below; two Unicode forms of one name are one class.
    flat = [name for name in names if "/" not in name]
    classes = tuple(sorted({_class_of(name) for name in names if "/" in name}))
    if flat and classes:
        raise ValueError(
            f"src={str(src)!r}: holds {counted(len(flat), 'image')} of its own ({flat[0]!r}, ...) "
            f"beside folders with images ({classes[0]!r}, ...): move them into class folders, or "
            "all into one flat folder"
        )
    label = {name: i for i, name in enumerate(classes)}
    images = [Source(src / name, name, label.get(_class_of(name), -1)) for name in names]
    return Sources(images, classes, skipped, [*describe_layout(layout), *_unnamed_note(names)])


def _unnamed_note(names: Sequence[str]) -> Iterator[str]:
    """Images that only their content shows."""
    unnamed = [name for name in names if not _has_image_name(name)]
    if unnamed:
        yield (
            f"{counted(len(unnamed), 'image')} by content, whose "
            f"{'name has' if len(unnamed) == 1 else 'names have'} no ending of an image "
            f"({unnamed[0]!r}{', ...' if len(unnamed) > 1 else ''}): packed too"
        )


def _class_of(name: str) -> str:
    """The class of an image: its first folder, in one Unicode form, whatever the locale."""
    folder = name.partition("/")[0]
    if folder.isascii():
        return folder
    return one_form(os.fsencode(folder).decode("utf-8", "surrogateescape"))


def _require_folder(src: Path) -> None:
    if src.is_dir():
        return
    if not os.path.lexists(src):
        hint = ": a URL; give a folder of this machine" if ":/" in str(src) else ""
        raise ValueError(f"src={str(src)!r}: there is no such folder{hint}")
    if src.is_symlink() and not src.exists():
        raise ValueError(f"src={str(src)!r}: is a link to {os.readlink(src)!r}, which is not there")
    cure = "give the folder of the images"
    if src.suffix.lower() == ".tar":
        cure = "unpack it, or index it as it is: fastmoco data index"
    elif src.suffix.lower() in (".zip", ".gz", ".tgz", ".7z", ".rar", ".bz2", ".xz", ".zst"):
        cure = "unpack it first"
    raise ValueError(f"src={str(src)!r}: is a file, not a folder: {cure}")


def _walk(src: Path, follow_links: bool, folders: list[str]) -> Iterator[tuple[str, str | None]]:
    """(name, reason to skip it or None) of every file; `folders` gets the folders that are read.

    A link is not followed into a folder that it is in.
    """
    stack: list[tuple[str, str, frozenset[str]]] = [(str(src), "", frozenset())]
    while stack:
        here, prefix, above = stack.pop()
        if follow_links:
            real = os.path.realpath(here)
            if real in above:
                yield prefix.rstrip("/"), CIRCLE
                continue
            above = above | {real}
        if prefix:
            folders.append(prefix[:-1])
        with os.scandir(here) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.is_symlink() and not follow_links:
                    yield name, LINK
                elif entry.name.startswith("."):
                    yield name, HIDDEN
                elif _is_folder(entry):
                    if entry.name in _LITTER:
                        yield name, LITTER
                    else:
                        stack.append((entry.path, name + "/", above))
                elif not _is_plain(entry):
                    yield name, BROKEN_LINK if entry.is_symlink() else NO_FILE
                elif not _has_image_name(entry.name) and not _begins_as_image(entry):
                    yield name, OTHER_NAME
                else:
                    yield name, None


def _has_image_name(name: str) -> bool:
    return name.rpartition(".")[2].lower() in EXTENSIONS


def _begins_as_image(entry: os.DirEntry[str]) -> bool:
    """Whether a file whose name says nothing (`photo.jpg.1`, `photo.jpg?width=300`, `0a1b2c`) begins
    as an image."""
    if _OTHER.fullmatch(entry.name):
        return False
    try:
        with open(entry.path, "rb") as file:
            return image_kind(file.read(16)) is not None
    except OSError:
        return False


def has_images(src: Path) -> bool:
    """Whether there is an image file below a folder."""
    return any(reason is None for _, reason in _walk(src, False, []))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle
        return False


def _is_plain(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False
