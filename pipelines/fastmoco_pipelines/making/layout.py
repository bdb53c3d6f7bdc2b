"""What is unusual about a folder of images: links, parts of a set taken for classes, folders around
the class folders, formats that are left out. In sentences with the cure."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fastmoco_pipelines.formats.images import EXTENSIONS
from fastmoco_pipelines.formats.manifest import one_form
from fastmoco_pipelines.sets.folder_sets import is_part, is_training_part
from fastmoco_pipelines.text import counted

# Reasons for which a file is skipped.
LINK = "a symbolic link"
BROKEN_LINK = "a broken link"
CIRCLE = "a link to a folder that is read already"
HIDDEN = "hidden"
LITTER = "a folder that a system makes, not of photographs"
NO_FILE = "no plain file"
OTHER_NAME = "no image by its name"

_ARCHIVES = ("zip", "tgz", "gz", "7z", "rar", "bz2", "xz", "zst")
_OTHER_IMAGES = (
    *("heic", "heif", "avif", "gif", "tif", "tiff", "bmp", "jp2", "jxl", "ppm", "pgm", "pnm"),
    *("raw", "dng", "cr2", "cr3", "nef", "arw", "orf", "rw2", "psd", "svg", "ico", "tga"),
    *("exr", "hdr", "dcm", "nii", "npy"),
)
_OTHER_SETS = ("parquet", "tfrecord", "tfrecords", "arrow", "lmdb", "mdb", "h5", "hdf5", "beton")
_ANNOTATIONS = re.compile(
    r"(label|annotation|mask|segmentation|ground[-_ ]?truth|gt|depth|semantic)s?([-_ ]?\w*)?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Layout:
    """What is in a folder.

    Attributes:
        src: the folder.
        names: of the image files, below it; sorted.
        folders: names of the folders that were read, below it; sorted.
        skipped: (name, reason) of all other files.
    """

    src: Path
    names: tuple[str, ...]
    folders: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]

    @cached_property
    def reasons(self) -> Counter[str]:
        """How many files were skipped for each reason."""
        return Counter(reason for _, reason in self.skipped)

    @cached_property
    def endings(self) -> Counter[str]:
        """Endings of the files that are no images by their names, without the dot; "" for none."""
        names = (name for name, reason in self.skipped if reason == OTHER_NAME)
        return Counter(_ending(name) for name in names)

    @cached_property
    def holders(self) -> Counter[str]:
        """Images directly in each folder; "" is the folder itself."""
        return Counter(name.rpartition("/")[0] for name in self.names)

    @cached_property
    def tops(self) -> list[str]:
        """The folders directly below, with images in them or deeper; sorted."""
        return sorted({name.partition("/")[0] for name in self.holders if name})


def nothing_found(layout: Layout) -> str:
    """The error for a folder without images: what is there, and the cure."""
    kinds = [f".{kind}" for kind in EXTENSIONS]
    found = []
    labels = {
        LINK: "symbolic link",
        BROKEN_LINK: "broken link",
        CIRCLE: "link to a folder above",
        HIDDEN: "hidden file",
        LITTER: "system folder",
        NO_FILE: "device or pipe",
    }
    for reason, label in labels.items():
        if layout.reasons[reason]:
            found.append(counted(layout.reasons[reason], label))
    if layout.reasons[OTHER_NAME]:
        found.append(
            f"{counted(layout.reasons[OTHER_NAME], 'other file')}: {_list_endings(layout)}"
        )
    inside = ", ".join(found) or (
        f"{counted(len(layout.folders), 'empty folder')}" if layout.folders else "it is empty"
    )
    cures = list(_cures(layout))
    return (
        f"src={str(layout.src)!r}: holds no {', '.join(kinds)} ({inside})"
        + (": " if cures else "")
        + "; ".join(cures)
    )


def describe_layout(layout: Layout) -> list[str]:
    """Notes about a folder with images, which is packed as it is."""
    notes = [*_split_notes(layout), *_twins(layout)]
    notes = notes or [*_wrapper_notes(layout)]
    return [*notes, *_annotation_notes(layout), *_empty_notes(layout), *_left_out(layout)]


def _cures(layout: Layout) -> Iterator[str]:
    if layout.reasons[LINK]:
        yield "`fastmoco data pack --follow-links` reads what symbolic links point to"
    if layout.reasons[BROKEN_LINK]:
        yield "broken links: get the files that they point to"
    if tars := layout.endings["tar"]:
        pattern = shlex.quote(f"{layout.src}/*.tar")
        what = (
            "the tar, or index it as it is" if tars == 1 else "the tars, or index them as they are"
        )
        yield f"unpack {what}: fastmoco data index {pattern}"
    if archives := sum(layout.endings[kind] for kind in _ARCHIVES):
        yield "unpack the archive first" if archives == 1 else "unpack the archives first"
    other = [f".{kind}" for kind in _OTHER_IMAGES if layout.endings[kind]]
    if other:
        yield f"convert {', '.join(other)} to JPEG or PNG first"
    if any(layout.endings[kind] for kind in _OTHER_SETS):
        yield "write the images out as files, or as tars for fastmoco data index"


def _split_notes(layout: Layout) -> Iterator[str]:
    """Parts of a set, such as train and val, that are taken for classes."""
    for base in ("", *_wrappers(layout)):
        start = f"{base}/" if base else ""
        below = _below(layout, start)
        parts = [name for name in below if is_part(name)]
        if len(parts) < 2 and not (
            parts and len(below) == 1 and _has_folders(layout, start, parts)
        ):
            continue
        if len(parts) == 1:
            place = shlex.quote(str(layout.src / start / parts[0]))
            yield (
                f"all images are in the folder {start + parts[0]!r}, which is one class: if its "
                f"folders are the classes, pack that: fastmoco data pack {place} OUT"
            )
            return
        parts.sort(key=lambda name: (not is_training_part(name), name))
        commands = [
            f"fastmoco data pack {shlex.quote(str(layout.src / start / name))} OUT --prefix "
            + (re.sub(r"\W", "_", name, flags=re.ASCII))
            for name in parts
        ]
        what = "classes" if not base else f"one class, {base.partition('/')[0]!r},"
        yield (
            f"the folders {_named(parts)} look like parts of a set, but are taken for {what} here, "
            f"so that held-out images would be trained on. Pack each by itself: "
            f"{'; '.join(commands[:6])}. Or train on one of them alone, with --data.images "
            f"{shlex.quote(str(layout.src / start / parts[0]))}"
        )
        return


def _wrapper_notes(layout: Layout) -> Iterator[str]:
    """Folders around the class folders."""
    if len(layout.tops) == 1:
        wrappers = _wrappers(layout)
        base = wrappers[-1] if wrappers else layout.tops[0]
        below = _below(layout, f"{base}/")
        place = shlex.quote(str(layout.src / base))
        if len(below) > 1:
            yield (
                f"all images are in the folder {base!r}, so that there is one class. If its "
                f"{counted(len(below), 'folder')} ({_named(below)}) are the classes, pack that: "
                f"fastmoco data pack {place} OUT"
            )
        else:
            yield (
                f"all images are in the folder {layout.tops[0]!r}, so that there is one class. "
                f"For images without labels give that folder: fastmoco data pack {place} OUT"
            )
    elif layout.tops and not any(name in layout.holders for name in layout.tops):
        deeper = sorted({"/".join(name.split("/")[:2]) for name in layout.holders})
        if len(deeper) > len(layout.tops):
            yield (
                f"the classes are the {counted(len(layout.tops), 'folder')} {_named(layout.tops)}; "
                f"the images are in {counted(len(deeper), 'folder')} below them "
                f"({_named(deeper)}). If those are the classes, move them directly into one "
                "folder and pack that"
            )


def _annotation_notes(layout: Layout) -> Iterator[str]:
    """Pictures of masks and labels, which are no photographs."""
    odd = [name for name in layout.tops if _ANNOTATIONS.fullmatch(name)]
    if odd and len(odd) < len(layout.tops):
        others = [name for name in layout.tops if name not in odd]
        yield (
            f"the folder {_named(odd)} is named like annotations, but is packed as images of a "
            f"class; to leave it out, pack {_named(others)} by itself"
        )


def _empty_notes(layout: Layout) -> Iterator[str]:
    """Class folders without an image."""
    empty = [name for name in layout.folders if "/" not in name and name not in layout.tops]
    empty = [name for name in empty if not _ANNOTATIONS.fullmatch(name)]
    if layout.tops and empty:
        verb = "holds" if len(empty) == 1 else "hold"
        noun = "folder" if len(empty) == 1 else "folders"
        yield f"the {noun} {_named(empty)} {verb} no image: no class of this name"


def _twins(layout: Layout) -> Iterator[str]:
    """Class folders whose names are one name for a reader."""
    forms: dict[str, list[str]] = {}
    alike: dict[str, set[str]] = {}
    for name in layout.tops:
        form = one_form(name)
        forms.setdefault(form, []).append(name)
        alike.setdefault(" ".join(form.casefold().split()), set()).add(form)
    for names in forms.values():
        if len(names) > 1:
            yield (
                f"{counted(len(names), 'folder')} are named {names[0]!r}, in different Unicode "
                "forms: they are one class"
            )
    for same in alike.values():
        if len(same) > 1:
            yield (
                f"the folders {_named(sorted(same))} differ in case or spaces alone: they are "
                f"{len(same)} classes"
            )


def _left_out(layout: Layout) -> Iterator[str]:
    """Images that are left out: links, and other formats."""
    if links := layout.reasons[LINK]:
        yield (
            f"{counted(links, 'symbolic link')} left out: `fastmoco data pack --follow-links` "
            f"reads what {'it points' if links == 1 else 'they point'} to"
        )
    images = {kind: layout.endings[kind] for kind in _OTHER_IMAGES if layout.endings[kind]}
    if images:
        shown = ", ".join(f"{count} .{kind}" for kind, count in images.items())
        yield (
            f"{counted(sum(images.values()), 'image')} of other formats left out ({shown}): taken "
            f"are .{', .'.join(EXTENSIONS)}"
        )
    if archives := sum(layout.endings[kind] for kind in ("tar", *_ARCHIVES)):
        yield f"{counted(archives, 'archive')} left out: what is in them is not looked at"


def _wrappers(layout: Layout) -> list[str]:
    """The folders that contain all images and nothing beside them, from above."""
    found: list[str] = []
    base = ""
    while "" not in layout.holders and base.rstrip("/") not in layout.holders:
        below = _below(layout, base)
        if len(below) != 1:
            break
        found.append(base + below[0])
        base = f"{base}{below[0]}/"
    return found


def _below(layout: Layout, start: str) -> list[str]:
    """The folders with images directly below one; `start` ends with a slash or is empty."""
    inside = (name[len(start) :] for name in layout.holders if name.startswith(start))
    return sorted({name.partition("/")[0] for name in inside} - {""})


def _has_folders(layout: Layout, start: str, parts: Sequence[str]) -> bool:
    return any(_below(layout, f"{start}{part}/") for part in parts)


def _ending(name: str) -> str:
    last = name.rpartition("/")[2]
    return last.rpartition(".")[2].lower() if "." in last[1:] else ""


def _list_endings(layout: Layout) -> str:
    shown = [f"{n} .{kind}" if kind else f"{n} without" for kind, n in layout.endings.most_common()]
    return ", ".join([*shown[:6], "..."] if len(shown) > 7 else shown)


def _named(names: Sequence[str]) -> str:
    """A few names: 'a', 'b', 'c', ... and 'z'."""
    shown = [repr(name) for name in names]
    if len(shown) > 5:
        return ", ".join(shown[:3]) + f", ... and {shown[-1]}"
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
