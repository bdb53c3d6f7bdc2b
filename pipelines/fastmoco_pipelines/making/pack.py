"""A folder of images -> shuffled WebDataset shards with an index beside each, and a manifest.

Files keep their bytes unless `max_side` demands smaller ones. Every image is decoded once here, so
that what cannot be decoded is reported now and not in the middle of a training run. The same
folder, seed and options give the same bytes, tar for tar.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import tarfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from fastmoco_pipelines.errors import ImageRefusedError
from fastmoco_pipelines.files.whole import folder_for, hash_file
from fastmoco_pipelines.formats.images import (
    bytes_problem,
    check_decodes,
    image_kind,
    shrink,
    structure_fault,
)
from fastmoco_pipelines.formats.index import build_index, write_index
from fastmoco_pipelines.formats.index_file import ShardIndex
from fastmoco_pipelines.formats.manifest import one_form, own_sets, read_moving
from fastmoco_pipelines.formats.paths import MEMBER as PATHS_MEMBER
from fastmoco_pipelines.formats.paths import to_list, to_path
from fastmoco_pipelines.making.one_writer import hidden_folder, move_in, one_writer
from fastmoco_pipelines.making.sources import Source, Sources, find_sources
from fastmoco_pipelines.sampling.order_v1 import shuffled
from fastmoco_pipelines.spec import require
from fastmoco_pipelines.text import counted

Progress = Callable[[int, int], None]
Prepared = tuple[str, bytes, int, str]
"""An image to pack: its kind, bytes, label, and path below the packed folder."""
# An image above the limits of shards takes up to a gigabyte while it is shrunk: one at a time.
_LARGE = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class PackReport:
    """What `pack_folder` wrote.

    Attributes:
        pattern: the glob that names the new shards.
        samples: images packed; `classes`: their class names by label (empty: no labels).
        shards: the tars; `total_bytes`: their size.
        skipped: (path below the source folder, reason) of every file that was not packed.
        notes: what is unusual about the source folder, in sentences.
    """

    pattern: str
    samples: int
    classes: tuple[str, ...]
    shards: tuple[Path, ...]
    total_bytes: int
    skipped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Options:
    max_side: int | None
    quality: int
    shard_size_mb: int
    shard_samples: int
    seed: int

    def __post_init__(self) -> None:
        require(
            self.max_side is None or self.max_side >= 1,
            "max_side",
            self.max_side,
            "needs at least 1 pixel",
        )
        require(1 <= self.quality <= 100, "quality", self.quality, "lies in [1, 100]")
        require(self.shard_size_mb >= 1, "shard_size_mb", self.shard_size_mb, "needs at least 1")
        require(self.shard_samples >= 1, "shard_samples", self.shard_samples, "needs at least 1")


def pack_folder(
    src: Path,
    out: Path,
    *,
    prefix: str = "train",
    max_side: int | None = None,
    quality: int = 92,
    shard_size_mb: int = 256,
    shard_samples: int = 10_000,
    seed: int = 0,
    follow_links: bool = False,
    overwrite: bool = False,
    keep: Callable[[str], bool] | None = None,
    sources: Sources | None = None,
    classes: Sequence[str] | None = None,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
) -> PackReport:
    """Pack the images of `src` into `out/PREFIX-000000.tar` and so on, with indexes and
    `out/manifest.json`.

    Args:
        src: class folders (each folder directly below is a class, searched to any depth), or a flat
            folder (labels -1).
        out: created if needed. It may contain sets of other prefixes; they share the numbering of
            classes.
        prefix: name of the set: letters, digits and underscores.
        max_side: pixels. An image whose longer side (height or width) exceeds it is shrunk to that
            length and written again in its own format: a panorama of 2048 x 512 becomes 512 x 128.
            None keeps every byte.
        quality: of JPEG and WebP written again, 1 to 100.
        shard_size_mb: a new shard begins after this many million bytes of images, or
            `shard_samples` images.
        seed: of the shuffle.
        follow_links: also read symbolic links; else they are skipped and counted.
        overwrite: replace a set of the same prefix; else it is refused.
        keep: which images are packed, by their paths below `src`; None: all. The classes are those
            of all images.
        sources: what is in `src`, if that is known already; None: it is looked up.
        classes: class names by label, with which the labels must agree; None: those of the other
            sets in `out`, else the names in `src`.
        progress: called with (images done, images in all).
        tell: gets sentences: what is unusual about `src`, before it is packed; whom it waits for;
            what a killed process has left in `out`.

    One process at a time writes into a folder (`making.one_writer`).

    Raises:
        ValueError: for options out of range, a `src` without images, classes that `out` does not
            know, or while another process packs the same set into `out`.
        FileExistsError: if `out` holds that prefix already.
    """
    good_prefix = re.fullmatch(r"[A-Za-z0-9_]+", prefix) is not None
    require(good_prefix, "prefix", prefix, "letters, digits and underscores only")
    options = _Options(max_side, quality, shard_size_mb, shard_samples, seed)
    tell = tell or (lambda text: None)

    # What is refused before anything is made.
    _require_place(out)
    own_sets(out)
    if read_moving(out) is None:
        _refuse_old(out, prefix, overwrite)
    found = sources or find_sources(Path(src), follow_links=follow_links)
    for note in found.notes:
        tell(f"note: {note}")

    # From here on no other process writes into the folder.
    task = f"data pack --prefix {prefix}"
    with folder_for(out), one_writer(out, task, tell) as finished:
        job = {"src": os.path.abspath(src), "options": asdict(options), "links": follow_links}
        same = prefix in finished and finished[prefix].get("job") == job
        if same and not overwrite and keep is None and classes is None:
            return _report(out, prefix, own_sets(out)[prefix], tuple(found.notes))
        _refuse_old(out, prefix, overwrite)
        entry = _pack(found, out, prefix, options, job, progress, keep=keep, classes=classes)
    return _report(out, prefix, entry, tuple(found.notes))


def _pack(
    found: Sources,
    out: Path,
    prefix: str,
    options: _Options,
    job: dict[str, Any],
    progress: Progress | None,
    *,
    keep: Callable[[str], bool] | None,
    classes: Sequence[str] | None,
) -> dict[str, Any]:
    """Make the shards and put them in their place; returns the set's entry of the manifest."""
    # Labels by the numbering of the other sets.
    known = [
        tuple(entry["classes"])
        for name, entry in own_sets(out).items()
        if name != prefix and entry["classes"]
    ]
    if classes:
        known.insert(0, tuple(classes))
    sources, numbered = _renumber(found, known[0] if known else found.classes, out)
    sources = [source for source in sources if keep is None or keep(source.name)]
    skipped = list(found.skipped)
    others = len(skipped)

    # The new shards are made in a hidden folder and moved when all are finished.
    made = hidden_folder(out, prefix)
    try:
        order = shuffled(options.seed, len(sources))
        samples = _prepare_all([sources[i] for i in order], options, skipped, progress)
        tars = _write_tars(made, prefix, samples, options)
        if not tars:
            raise ValueError(
                f"src={job['src']!r}: none of its {counted(len(sources), 'image')} can be used: "
                f"{_first(skipped[others:])}"
            )
        entries, indexes = _index_all(tars)
    except BaseException as error:
        shutil.rmtree(made, ignore_errors=True)
        if isinstance(error, OSError) and error.filename is None and error.errno:
            raise OSError(error.errno, error.strerror, str(out)) from error
        raise

    # The set, in its place and in the manifest.
    skipped.sort()
    labels = Counter(label for index in indexes for label in index.columns["label"])
    entry = {
        "samples": sum(len(index) for index in indexes),
        "classes": list(numbered),
        "class_counts": [labels[label] for label in range(len(numbered))],
        "shards": entries,
        "skipped": skipped,
        "options": asdict(options),
    }
    move_in(out, made, prefix, entry, _tars_of(out, prefix), job=job)
    return entry


def _report(out: Path, prefix: str, entry: dict[str, Any], notes: tuple[str, ...]) -> PackReport:
    return PackReport(
        pattern=str(out / f"{prefix}-*.tar"),
        samples=entry["samples"],
        classes=tuple(entry["classes"]),
        shards=tuple(out / shard["name"] for shard in entry["shards"]),
        total_bytes=sum(shard["bytes"] for shard in entry["shards"]),
        skipped=tuple((name, reason) for name, reason in entry["skipped"]),
        notes=notes,
    )


def _require_place(out: Path) -> None:
    """Refuse a place that can hold no folder."""
    if os.path.lexists(out) and not out.is_dir():
        raise ValueError(f"out={str(out)!r}: is a file: give a folder for the shards")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(out)) and not out.parent.exists():
        raise ValueError(
            f"out={str(out)!r}: is a URL: give a folder of this machine, and copy what is in it to "
            "the server afterwards"
        )


def _refuse_old(out: Path, prefix: str, overwrite: bool) -> None:
    old = _tars_of(out, prefix)
    if old and not overwrite:
        raise FileExistsError(
            f"{out} already holds {len(old)} shard(s) {prefix}-*.tar: pack into another folder, "
            "give another prefix, or ask to overwrite them (--overwrite)"
        )


def _tars_of(out: Path, prefix: str) -> list[Path]:
    name = re.compile(rf"{prefix}-\d{{6,}}\.tar")
    return sorted(path for path in out.glob(f"{prefix}-*.tar") if name.fullmatch(path.name))


def _renumber(
    found: Sources, known: tuple[str, ...], out: Path
) -> tuple[list[Source], tuple[str, ...]]:
    """Labels by the numbering that the other sets of `out` have: a test set that lacks a class must
    not shift them."""
    numbers = {one_form(name): i for i, name in enumerate(known)}
    unknown = sorted(set(found.classes) - set(numbers))
    if unknown:
        raise ValueError(
            f"classes={unknown!r}: not among the {len(known)} classes of the sets in {out}"
            f"{_similar(unknown, known)}: pack into another folder, or pack the set with all "
            "classes first"
        )
    label = {i: numbers[name] for i, name in enumerate(found.classes)} | {-1: -1}
    images = [replace(source, label=label[source.label]) for source in found.images]
    return images, known if found.classes else ()


def _similar(unknown: Sequence[str], known: Sequence[str]) -> str:
    """Names that differ in case or spaces alone."""
    forms = {" ".join(name.casefold().split()): name for name in known}
    for name in unknown:
        if (other := forms.get(" ".join(name.casefold().split()))) is not None:
            return f" ({name!r} and {other!r} differ in case or spaces)"
    return ""


def _prepare(source: Source, options: _Options) -> tuple[str, bytes] | str:
    """(kind, bytes) of an image that can be decoded, or the reason why it is skipped."""
    try:
        with open(source.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if problem := bytes_problem(size, shrunk=options.max_side is not None):
                return problem
            data = file.read()
        if options.max_side is not None:
            with _LARGE if structure_fault(data) else nullcontext():
                data = shrink(data, max_side=options.max_side, quality=options.quality)
        check_decodes(data)
    except ImageRefusedError as refused:
        return str(refused)
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    kind = image_kind(data)
    assert kind is not None  # noqa: S101 - a type: the check above knows the kind
    return kind, data


def _prepare_all(
    sources: Sequence[Source],
    options: _Options,
    skipped: list[tuple[str, str]],
    progress: Progress | None,
) -> Iterator[Prepared]:
    """The images in order; decoded on all cores, a few images ahead."""
    workers = min(16, os.cpu_count() or 1)
    waiting: deque[tuple[Source, Future[tuple[str, bytes] | str]]] = deque()
    left = iter(sources)
    with ThreadPoolExecutor(workers) as pool:
        for done in range(len(sources)):
            while len(waiting) < 4 * workers and (source := next(left, None)) is not None:
                waiting.append((source, pool.submit(_prepare, source, options)))
            source, future = waiting.popleft()
            prepared = future.result()
            if isinstance(prepared, str):
                skipped.append((source.name, prepared))
            else:
                yield (*prepared, source.label, to_path(source.name))
            if progress is not None:
                progress(done + 1, len(sources))


def _write_tars(
    folder: Path, prefix: str, samples: Iterator[Prepared], options: _Options
) -> list[Path]:
    """webdataset's ShardWriter, on files that are opened here: its own opener may run commands from
    the environment. The last member of each tar is the list of the original files, which does not
    count towards the size of a shard: the images of each are those of a tar without the list."""
    import webdataset

    first = next(samples, None)
    if first is None:
        return []
    tars: list[Path] = []
    listed: list[tuple[str, str]] = []

    class Writer(webdataset.ShardWriter):  # type: ignore[misc]
        def finish(self) -> None:
            if self.tarstream is None:
                return
            tar = self.tarstream.tarstream
            data = to_list(listed)
            listed.clear()
            info = tarfile.TarInfo(PATHS_MEMBER)
            info.size, info.mode = len(data), 0o444
            try:
                tar.addfile(info, io.BytesIO(data))
                super().finish()
            except BaseException:
                # Else the rest is written when it is collected, and a traceback printed.
                tar.fileobj.closed = True
                raise

    with ExitStack() as files:

        def open_shard(number: str) -> BinaryIO:
            tars.append(folder / f"{prefix}-{number}.tar")
            return files.enter_context(open(tars[-1], "xb"))

        with Writer(
            "%06d",
            maxcount=options.shard_samples,
            maxsize=options.shard_size_mb * 1_000_000,
            verbose=0,
            opener=open_shard,
            post=lambda _: files.close(),
            encoder=False,
            mtime=0,  # the same images give the same bytes
        ) as writer:
            for number, (kind, data, label, path) in enumerate(_chain(first, samples)):
                key = f"{number:09d}"
                sample: dict[str, Any] = {"__key__": key, kind: data}
                writer.write(sample | ({"cls": str(label).encode()} if label >= 0 else {}))
                listed.append((key, path))  # after `write`, which may begin the next shard
    return tars


def _chain(first: Prepared, rest: Iterator[Prepared]) -> Iterator[Prepared]:
    yield first
    yield from rest


def _index_all(tars: Sequence[Path]) -> tuple[list[dict[str, Any]], list[ShardIndex]]:
    """Read every tar back, write its index, and describe it for the manifest."""
    entries = []
    indexes = []
    for tar in tars:
        index = build_index(tar)
        write_index(tar, index)
        entry = {
            "name": tar.name,
            "samples": len(index),
            "bytes": index.tar_bytes,
            "sha256": hash_file(tar),
        }
        entries.append(entry)
        indexes.append(index)
    return entries, indexes


def _first(skipped: list[tuple[str, str]]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in skipped[:3])
