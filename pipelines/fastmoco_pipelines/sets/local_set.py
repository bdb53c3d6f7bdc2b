"""From a pattern of local files to shards that can be read: their names, the headers of their
indexes, and their entries in the manifests."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastmoco_pipelines.errors import ShardError
from fastmoco_pipelines.files.small import UnfitFileError, open_regular
from fastmoco_pipelines.files.whole import file_state, map_file, read_at, write_new_file
from fastmoco_pipelines.formats.index import hash_ends, json_path, missing, open_index, stale
from fastmoco_pipelines.formats.index_file import (
    CURE,
    HEAD_BYTES,
    SUFFIX,
    IndexFile,
    IndexHeader,
    parse_header,
)
from fastmoco_pipelines.formats.index_json import MAX_JSON_BYTES
from fastmoco_pipelines.formats.manifest import NAME as MANIFEST
from fastmoco_pipelines.formats.manifest import FolderOfShards, check_folders, read_sets
from fastmoco_pipelines.formats.quarantine import NAME as QUARANTINE
from fastmoco_pipelines.formats.quarantine import read_list
from fastmoco_pipelines.sets.host_table import OpenedSet, once_a_host
from fastmoco_pipelines.sets.local_files import is_own_trouble, tried
from fastmoco_pipelines.sets.patterns import local_names, spells_out
from fastmoco_pipelines.sets.records import SHARD, shard_row
from fastmoco_pipelines.text import escaped

THREADS = 16
_TRIES = 3  # of an index that another process writes meanwhile
_CURE_INDEX = f"If its tar can be read, {CURE}."
_CURE_TAR = "Copy the tar again from its source, or leave it out."
_CURE_FOLDER = f"Move this folder away; where it has the name of an index, {CURE}."
_CHUNK = 128  # shards for one task of a thread: a task costs more than the header of a shard
_list_lock = threading.Lock()
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSet:
    """Local shards, sorted by name, and their indexes; see `records.Indexes`."""

    paths: list[str]
    shards: NDArray[Any]
    classes: tuple[str, ...]
    notes: list[str]
    """What a user should know, in sentences."""
    converted: dict[int, bytes] = field(default_factory=dict)
    """Indexes in the JSON form that could not be written in the binary one, converted."""

    def load(self, shard: int) -> IndexFile:
        """The whole index of a shard, memory-mapped."""
        tar = self.paths[shard]
        name = os.path.basename(tar) + SUFFIX
        data = self.converted.get(shard)
        file = IndexFile(name, *_mapped(tar)) if data is None else IndexFile(name, data)
        if file.header.seal != self.shards[shard]["seal"].tobytes():
            raise ShardError(
                f"{file.name}: was replaced while the set was open: start the command again."
            )
        return file


def open_local(pattern: str) -> LocalSet:
    """Find the shards that a pattern names, and read the headers of their indexes.

    Every header is compared with its tar, by size and by the hash of its ends. An index in the JSON
    form is converted once, beside its tar.

    Raises:
        ValueError: if the pattern names no shard.
        ShardError: if an index is missing, broken or stale, or a shard of a packed set is missing.
    """
    paths = local_names(pattern)
    explicit = spells_out(pattern)
    folders = sorted({os.path.dirname(path) for path in paths})
    notes: list[str] = []
    converted: dict[int, bytes] = {}

    def read() -> OpenedSet:
        rows = in_threads(_read_header, paths)
        shards = np.array([each.row for each in rows], dtype=SHARD)
        converted.update({i: each.converted for i, each in enumerate(rows) if each.converted})
        written = sum(each.converted == b"" for each in rows)
        notes.extend(_notes_on_converted(written, len(converted), folders))
        changed = [path for path, each in zip(paths, rows, strict=True) if each.changed]
        notes.extend(_notes_on_changed(changed))
        classes = check_folders(_folders(paths, shards["samples"].tolist(), explicit=explicit))
        return OpenedSet(shards, classes)

    seen = [*paths, *(path + SUFFIX for path in paths)]
    manifests = [
        os.path.join(folder, name) for folder in folders for name in (MANIFEST, QUARANTINE)
    ]
    opened = once_a_host(seen, manifests, str(explicit), read)
    return LocalSet(
        paths=paths,
        shards=opened.shards,
        classes=opened.classes,
        notes=notes,
        converted=converted,
    )


def in_threads(function: Callable[[str], T], items: Sequence[str]) -> list[T]:
    """The results of a function that reads files, for many of them, in order.

    Threads are used only where the first files had to be waited for, as on a network: in memory
    they would only wait for each other.

    Raises:
        Exception: the error of the first item, in order, for which the function fails.
    """
    waits = _waits()
    first = [function(item) for item in items[:_CHUNK]]
    rest = items[_CHUNK:]
    if _waits() - waits < len(first):
        return [*first, *(function(item) for item in rest)]
    chunks = [rest[start : start + _CHUNK] for start in range(0, len(rest), _CHUNK)]
    with ThreadPoolExecutor(THREADS, thread_name_prefix="fastmoco-index") as pool:
        done = pool.map(lambda chunk: [function(item) for item in chunk], chunks)
        return [*first, *(result for results in done for result in results)]


def _waits() -> int:
    """How often this thread has waited, for a disk or a server."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


class _Header(NamedTuple):
    """The row of a shard, compared with its tar.

    Attributes:
        row: of `SHARD`.
        converted: the bytes of an index that could not be written, b"" for one that was, None for
            none.
        changed: the tar has changed since it was indexed, and was checked since.
    """

    row: Any
    converted: bytes | None = None
    changed: bool = False


def _read_header(tar: str) -> _Header:
    """The header of a tar's index, compared with the tar."""
    path = Path(tar + SUFFIX)
    for _ in range(_TRIES):
        found = _binary_header(path)
        identity = _read(tar, _identity_of_tar, _CURE_TAR)
        if identity is None:
            raise ShardError(f"{os.path.basename(tar)}: is gone. {_CURE_TAR}")
        if found is not None and (found[0].tar_bytes, found[0].tar_hash) == identity:
            return _Header(shard_row(found[0]))
        if found is not None and _is_checked(tar, found[0], identity):
            return _Header(shard_row(found[0]), changed=True)

        # An earlier version of fastmoco writes the JSON form beside a binary one, which is then
        # stale.
        converted = _from_json(Path(tar), broken=found is None)
        if converted is None:
            if found is None and path.exists():
                continue  # `data index` has written it meanwhile
            raise ShardError(missing(Path(tar)) if found is None else stale(Path(tar), path.name))
        header = converted.header
        fits = (header.tar_bytes, header.tar_hash) == identity
        if not fits and (found is not None or not _is_checked(tar, header, identity)):
            raise ShardError(stale(Path(tar), converted.name if found is None else path.name))

        # A newer index is never replaced: it may have labels that the JSON form has not.
        data = bytes(converted.data)
        try:
            if write_new_file(path, data, replaces=None if found is None else found[1]):
                return _Header(shard_row(header), b"", not fits)
        except OSError:
            return _Header(shard_row(header), data, not fits)
    raise ShardError(
        f"{path.name}: cannot be opened, or changes all the time: {CURE}, and start this command "
        "when that has ended."
    )


def _is_checked(tar: str, header: IndexHeader, identity: tuple[int, str]) -> bool:
    """Whether `data check` has compared this state of a tar with this index of an earlier one: the
    list beside it has what is lost."""
    folder, name = os.path.split(tar)
    path = os.path.join(folder, QUARANTINE)
    try:
        state = file_state(os.stat(path))
    except OSError:
        return False
    with _list_lock:  # many threads ask, for many tars of one list
        checked = _checked_tars(path, state)
    return (name, *identity, header.records_hash) in checked


@lru_cache(maxsize=4)
def _checked_tars(path: str, state: tuple[int, ...]) -> Collection[tuple[str, int, str, str]]:
    """The tars of a list that were checked; `state` of its file changes with it."""
    del state
    return frozenset(read_list(Path(path))[0].checked)


def _binary_header(path: Path) -> tuple[IndexHeader, os.stat_result] | None:
    """The header of an index and the state of its file; None without one."""

    def read(descriptor: int) -> tuple[IndexHeader, os.stat_result]:
        head = read_at(descriptor, HEAD_BYTES, 0)
        info = os.fstat(descriptor)
        return parse_header(path.name, head, info.st_size), info

    return _read(str(path), read, _CURE_INDEX)


def _identity_of_tar(descriptor: int) -> tuple[int, str]:
    """Size and hash by which an index knows its tar."""
    return os.fstat(descriptor).st_size, hash_ends(descriptor)


def _from_json(tar: Path, *, broken: bool) -> IndexFile | None:
    """The index of a tar from its JSON form; None without one.

    Args:
        tar: the tar.
        broken: whether a broken one is an error, and not as good as none.
    """
    path = json_path(tar)
    try:
        text = _read(str(path), _text_of_index, _CURE_INDEX)
        return None if text is None else open_index(path.name, text)
    except ShardError:
        if broken:
            raise
        return None


def _text_of_index(descriptor: int) -> bytes:
    """The content of an index in the JSON form, or one byte more than it may have."""
    return read_at(descriptor, min(os.fstat(descriptor).st_size, MAX_JSON_BYTES + 1), 0)


def _read(path: str, use: Callable[[int], T], cure: str) -> T | None:
    """What a function finds in an open file, tried again where the file system fails; None without
    a file.

    Raises:
        ShardError: if it cannot be read, with the cure.
    """

    def attempt() -> T | None:
        try:
            descriptor = open_regular(path)
        except FileNotFoundError:
            return None
        except UnfitFileError as error:
            if os.path.isdir(path):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)) from error
            raise
        try:
            return use(descriptor)
        finally:
            os.close(descriptor)

    try:
        return tried(attempt, f"{os.path.basename(path)}: cannot be read")
    except ShardError as error:
        cause = error.__cause__
        if isinstance(cause, UnfitFileError):
            raise ShardError(f"{error} {cure}") from cause
        if not isinstance(cause, OSError):
            raise
        if is_own_trouble(cause):
            raise cause from None
        raise ShardError(f"{error} {_CURE_FOLDER if os.path.isdir(path) else cure}") from cause


def _notes_on_changed(tars: Sequence[str]) -> list[str]:
    if not tars:
        return []
    names = ", ".join(escaped(os.path.basename(tar)) for tar in tars[:3])
    few = names if len(tars) <= 3 else f"{names}, ..."
    which = f"{names}: has" if len(tars) == 1 else f"{len(tars)} tars ({few}): each has"
    return [
        f"{which} changed since it was indexed; by {QUARANTINE}, which `fastmoco data check` has "
        "written since, the images that are left are used"
    ]


def _notes_on_converted(written: int, held: int, folders: Sequence[str]) -> list[str]:
    notes = []
    if written:
        notes.append(
            f"{written} indexes in the JSON form were converted to the binary form, once, beside "
            f"the tars in {', '.join(folders[:3])}"
        )
    if held:
        notes.append(
            f"{held} indexes in the JSON form are converted at every start, because they cannot "
            f"be written beside the tars ({', '.join(folders[:3])}): run `fastmoco data index` where it can"
        )
    return notes


def _folders(
    paths: Sequence[str], samples: Sequence[int], *, explicit: bool
) -> Iterable[FolderOfShards]:
    """The shards by folder. A pattern that spells names out may leave some of the manifest's
    out."""
    pairs = zip(paths, samples, strict=True)
    for name, group in groupby(pairs, key=lambda pair: os.path.dirname(pair[0])):
        folder = Path(name)
        yield FolderOfShards(
            where=str(folder),
            sets=read_sets(folder),
            samples={os.path.basename(path): count for path, count in group},
            present=lambda name, folder=folder: explicit or (folder / name).is_file(),  # type: ignore[misc]
        )


def _mapped(tar: str) -> tuple[memoryview, tuple[int, ...]]:
    """The index file of a tar, memory-mapped, and its state, which changes with it."""

    def attempt() -> tuple[memoryview, tuple[int, ...]]:
        descriptor = open_regular(tar + SUFFIX)
        try:
            return map_file(descriptor), file_state(os.fstat(descriptor))
        finally:
            os.close(descriptor)

    return tried(attempt, f"{os.path.basename(tar)}{SUFFIX}: cannot be opened any more")
