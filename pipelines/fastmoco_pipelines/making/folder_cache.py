"""Shards made from a folder of images once, and found again as long as the folder is the same.

    ROOT/NAME-KEY/          train-000000.tar ..., test-000000.tar ..., indexes, manifest.json
    ROOT/NAME-KEY/source.json   the folder, its state, the options

The key is a hash of the folder's path, of the name, size and time of every image in it, and of the
options. A set is made in a hidden folder and renamed when it is complete, so that one that was
interrupted is made again. Processes that want the same set wait for the one that makes it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fastmoco_pipelines.files.small import open_regular, read_json
from fastmoco_pipelines.files.whole import folder_for, is_named, try_lock, write_json
from fastmoco_pipelines.making.holdout import also_in, held_out_names
from fastmoco_pipelines.making.pack import PackReport, Progress, pack_folder
from fastmoco_pipelines.making.sources import Source, find_sources, has_images
from fastmoco_pipelines.spec import require

FORMAT = "fastmoco-images"
VERSION = 1
NAME = "source.json"
QUALITY = 92
_POLL_SECONDS = 0.5
_COUNTS = ("samples", "held_out", "total_bytes")
_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "int | None": (int, type(None)),
    "float": (float, int),
    "tuple[str, ...]": (tuple,),
}
"""Types of the fields of a packed folder, and those of their values in JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderState:
    """What a folder of images holds now.

    Attributes:
        path: of the folder, absolute.
        images: their number; `total_bytes`: their size.
        classes: names of its class folders, empty for a folder of images alone.
        digest: of the name, size and time of every image.
    """

    path: str
    images: int
    total_bytes: int
    classes: tuple[str, ...]
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PackOptions:
    """How a folder is packed.

    Attributes:
        max_side: pixels; the longer side of larger images is shrunk to it. None: every byte is
            kept.
        holdout: share of each class that is held out, as set `test`; 0: none.
        seed: of the draw of the held-out images.
        prefix: name of the set.
        classes: class names by label of the set that it is compared with; empty: the folder's own.
        apart_from: another folder; images with the same bytes as one of its images are left out.
    """

    max_side: int | None = None
    holdout: float = 0.0
    seed: int = 0
    prefix: str = "train"
    classes: tuple[str, ...] = ()
    apart_from: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedFolder:
    """A packed folder.

    Attributes:
        folder: of the shards.
        state: of the folder of images when it was packed.
        options: it was packed with.
        samples: images of the set; `held_out`: of the set `test`.
        total_bytes: size of the shards.
        skipped: (name, reason) of the files that are in neither set, in a set that was just made.
        seconds: that packing took; 0: it was packed before.
    """

    folder: Path
    state: FolderState
    options: PackOptions
    samples: int
    held_out: int
    total_bytes: int
    skipped: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0

    @property
    def pattern(self) -> str:
        """The shards of the set."""
        return str(self.folder / f"{self.options.prefix}-*.tar")

    @property
    def test_pattern(self) -> str:
        """The shards of the held-out images; empty without them."""
        return str(self.folder / "test-*.tar") if self.held_out else ""


def max_side_of(view_size: int) -> int:
    """Pixels to which longer sides are shrunk for views of a size.

    16/7 of it, 512 for 224, in whole 32s: a crop of half of an image's sides is not enlarged.
    """
    return max(64, -(-view_size * 16 // (7 * 32)) * 32)


def folder_state(src: Path) -> FolderState:
    """The state of a folder of images. Reads names, sizes and times, no content.

    Raises:
        ValueError: if there is no such folder, or it holds no images, or is mixed.
    """
    found = find_sources(src, follow_links=False)
    sources, classes = found.images, found.classes
    digest = hashlib.sha256()
    total = 0
    for source in sources:
        info = source.path.stat()
        total += info.st_size
        name = source.name.encode("utf-8", "surrogateescape")
        digest.update(b"%d/%d/%d/%s\0" % (len(name), info.st_size, info.st_mtime_ns, name))
    return FolderState(
        path=os.path.realpath(src),
        images=len(sources),
        total_bytes=total,
        classes=classes,
        digest=digest.hexdigest(),
    )


def packed_name(state: FolderState, options: PackOptions) -> str:
    """The name of the folder of shards: that of the images, and the key."""
    content = {"state": asdict(state), "options": asdict(options), "version": VERSION}
    text = json.dumps(content, sort_keys=True).encode("ascii")
    shown = re.sub(r"[^A-Za-z0-9_.-]", "_", os.path.basename(state.path)).strip("._-")[:40]
    return f"{shown or 'images'}-{hashlib.sha256(text).hexdigest()[:12]}"


def read_packed(folder: Path) -> PackedFolder | None:
    """The packed folder of images at a place; None where none is complete there."""
    try:
        content = read_json(folder / NAME)
        if content["format"] != FORMAT or content["version"] != VERSION:
            return None
        packed = PackedFolder(
            folder=folder,
            state=FolderState(**_typed(FolderState, content["state"])),
            options=PackOptions(**_typed(PackOptions, content["options"])),
            **_typed(PackedFolder, {name: content[name] for name in _COUNTS}),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return packed if re.fullmatch(r"[A-Za-z0-9_]+", packed.options.prefix) else None


def _typed(kind: type, content: Any) -> dict[str, Any]:
    """The fields of a dataclass from JSON, each of its own type.

    Raises:
        TypeError, ValueError, KeyError: for one of another type, or a negative number.
    """
    if not isinstance(content, dict):
        raise TypeError("no object")
    kinds = {one.name: _KINDS[str(one.type)] for one in fields(kind) if one.name in content}
    typed = {name: tuple(v) if isinstance(v, list) else v for name, v in content.items()}
    for name, value in typed.items():
        if type(value) not in kinds[name]:
            raise TypeError(f"{name}={value!a:.40}")
        if isinstance(value, tuple) and not all(isinstance(item, str) for item in value):
            raise TypeError(f"{name}: not all are texts")
        if isinstance(value, int | float) and not 0 <= value < 2**64:
            raise ValueError(f"{name}={value!a:.40}")
    return typed


def pack_once(
    src: Path,
    root: Path,
    options: PackOptions,
    *,
    state: FolderState | None = None,
    begin: Callable[[FolderState, Path], None] | None = None,
    wait: Callable[[Path], None] | None = None,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
) -> PackedFolder:
    """Pack a folder of images into `root`, unless it was packed there in its present state.

    Args:
        src: the folder of images.
        root: the cache; made if absent.
        options: how to pack.
        state: of `src`, if it is known already.
        begin: called before packing, with the state and the folder to be made.
        wait: called once if another process makes this set, with its folder.
        progress: called with (images done, images in all).
        tell: gets sentences: what is unusual about `src`, before it is packed.

    Raises:
        ValueError: if `src` has no image that can be used.
        OSError: if `root` cannot be written.
    """
    state = state or folder_state(src)
    require(0 <= options.holdout < 1, "holdout", options.holdout, "a share is in [0, 1)")
    out = root / packed_name(state, options)
    if (found := read_packed(out)) is not None:
        return found
    with (
        folder_for(root, mode=0o700),
        _locked(out.with_name(f".{out.name}.lock"), lambda: wait and wait(out)),
    ):
        if (found := read_packed(out)) is not None:
            return found
        for left in root.glob(f".{out.name}.*.making"):  # by a killed process
            shutil.rmtree(left, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)  # incomplete: without its last file
        if begin is not None:
            begin(state, out)
        making = out.with_name(f".{out.name}.{os.getpid()}.making")
        try:
            return _pack(src, making, out, state, options, progress, tell)
        finally:
            shutil.rmtree(making, ignore_errors=True)


def _pack(
    src: Path,
    making: Path,
    out: Path,
    state: FolderState,
    options: PackOptions,
    progress: Progress | None,
    tell: Callable[[str], None] | None,
) -> PackedFolder:
    """Make the set, and its held-out images as set `test`, and move the whole to its place."""
    began = time.monotonic()
    found = find_sources(src, follow_links=False)
    sources, classes = found.images, found.classes
    if tell is not None:
        for note in found.notes:
            tell(f"note: {note}")
    excluded: frozenset[str] = frozenset()
    if options.apart_from:
        others = find_sources(Path(options.apart_from), follow_links=False).images
        excluded = also_in(sources, others)
    held_out: frozenset[str] = frozenset()
    if options.holdout and classes:
        held_out = held_out_names(sources, share=options.holdout, seed=options.seed)
        if not held_out:
            raise ValueError(
                f"holdout={options.holdout}: no class of {str(src)!r} has two different images"
            )

    # Both sets count as one for the progress.
    reports: list[PackReport] = []
    parts: list[tuple[str, Callable[[Source], bool]]] = [
        (options.prefix, lambda source: source.name not in held_out | excluded)
    ]
    if held_out:
        parts.append(("test", lambda source: source.name in held_out))
    counts = [sum(map(wanted, sources)) for _, wanted in parts]
    for number, (prefix, wanted) in enumerate(parts):
        names = {source.name for source in sources if wanted(source)}
        before = sum(counts[:number])
        if not names:
            raise ValueError(
                f"{str(src)!r}: each of its images ({len(sources)}) is one of "
                f"{options.apart_from!r} too, byte for byte"
            )
        reports.append(
            pack_folder(
                src,
                making,
                prefix=prefix,
                max_side=options.max_side,
                quality=QUALITY,
                seed=options.seed,
                keep=names.__contains__,
                sources=found,
                classes=options.classes or None,
                progress=_shifted(progress, before, sum(counts)),
            )
        )

    # Complete with its last file.
    skipped = dict(pair for report in reports for pair in report.skipped)
    skipped |= dict.fromkeys(excluded, f"the same bytes as an image of {options.apart_from}")
    packed = PackedFolder(
        folder=out,
        state=state,
        options=options,
        samples=reports[0].samples,
        held_out=reports[1].samples if held_out else 0,
        total_bytes=sum(report.total_bytes for report in reports),
        skipped=tuple(sorted(skipped.items())),
        seconds=time.monotonic() - began,
    )
    write_json(making / NAME, _content(packed))
    os.rename(making, out)
    return packed


def _content(packed: PackedFolder) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "state": asdict(packed.state),
        "options": asdict(packed.options),
        "samples": packed.samples,
        "held_out": packed.held_out,
        "total_bytes": packed.total_bytes,
    }


def _shifted(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Progress of one part of several."""
    if progress is None:
        return None
    return lambda done, _: progress(before + done, total)


@contextmanager
def _locked(path: Path, wait: Callable[[], object]) -> Iterator[None]:
    """Hold the lock of a file, which exists only while a process holds it or waits for it.

    Args:
        path: of the file.
        wait: called once if another process holds it.
    """
    told = False
    while True:
        descriptor = open_regular(path, os.O_RDWR | os.O_CREAT, 0o600, follow=False)
        try:
            while not try_lock(descriptor, fcntl.LOCK_EX):
                if not told:
                    wait()
                    told = True
                time.sleep(_POLL_SECONDS)
            if is_named(descriptor, str(path)):  # else the holder before has removed it
                break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def holds_images_alone(folder: Path) -> bool:
    """Whether a folder has no tars, but images: what is packed where shards were asked for."""
    return folder.is_dir() and not any(folder.glob("*.tar")) and has_images(folder)


def changes(before: FolderState, now: FolderState) -> Sequence[str]:
    """What differs between two states of a folder, for people."""
    words = []
    if before.images != now.images:
        words.append(f"{before.images} images then, {now.images} now")
    elif before.digest != now.digest:
        words.append("names, sizes or times of images differ")
    if before.classes != now.classes:
        words.append(f"{len(before.classes)} classes then, {len(now.classes)} now")
    return words


def of_field(error: ValueError, name: str) -> ValueError:
    """An error about the folder `src`, with the name of the field that the user gave."""
    text = str(error)
    return ValueError(
        name + text.removeprefix("src") if text.startswith("src=") else f"{name}: {text}"
    )
