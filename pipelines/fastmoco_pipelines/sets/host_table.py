"""One set opened once a host: the headers of a set with many shards, kept for the other processes
of this machine and for the next start.

The copy is in the user's cache folder. Its name is a hash of the host, and one of the path, size,
inode and times of every tar, index and manifest, so a set that has changed in any way is read again.
Without a folder that can be used, every process reads the headers itself.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastmoco_pipelines.files.small import UnfitFileError, json_of, open_regular
from fastmoco_pipelines.files.whole import (
    file_state,
    is_named,
    own_folder,
    remove,
    try_lock,
    user_cache,
    write_file,
)
from fastmoco_pipelines.sets.records import SHARD

FEWEST_SHARDS = 1024
"""Sets with fewer are opened in less time than this would save."""
_MOST_BYTES = 256 << 20  # three million shards
_KEPT = 8  # sets of one host
_KEPT_SECONDS = 30 * 86400.0  # without use, also of other hosts
_WAIT_SECONDS = 120.0
_POLL_SECONDS = 0.05


class OpenedSet(NamedTuple):
    """What opening a set finds out."""

    shards: NDArray[Any]
    """[shards] `SHARD`."""
    classes: tuple[str, ...]


def once_a_host(
    files: Sequence[str], manifests: Sequence[str], options: str, read: Callable[[], OpenedSet]
) -> OpenedSet:
    """What `read` returns, or what it has returned for the very same files on this machine.

    Args:
        files: tars and indexes that `read` looks at, as many of both.
        manifests: further files, which may be absent.
        options: anything else that the result depends on.
        read: opens the set.
    """
    if len(files) < 2 * FEWEST_SHARDS:
        return read()
    key = _identity(files, manifests, options)
    try:
        folder = user_cache() / "sets"
        usable = key is not None and own_folder(folder)
    except OSError:
        usable = False
    if not usable:
        return read()

    # One process reads; the others wait for it.
    path = folder / f"{_host()}-{key}.set"
    known = _load(path, len(files) // 2)
    if known is not None:
        return known
    lock_name = path.with_suffix(".lock")
    lock = _wait_for_lock(lock_name)
    try:
        known = _load(path, len(files) // 2)
        if known is not None:
            return known
        found = read()
        # a file that has changed meanwhile, or was converted, has another identity
        if _identity(files, manifests, options) == key:
            _store(path, found)
        return found
    finally:
        if lock is not None:
            remove(str(lock_name))
            os.close(lock)


def _host() -> str:
    """The name of this machine as part of the name of a file: homes are shared."""
    return hashlib.sha256(platform.node().encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _identity(files: Sequence[str], manifests: Sequence[str], options: str) -> str | None:
    """A hash of the state of all files; None if a tar, an index or the working folder is absent."""
    try:
        where = f"fastmoco-set {SHARD.descr} {options} {os.getcwd()}"
        digest = hashlib.sha256(where.encode("utf-8", "surrogateescape"))
        for name in files:
            digest.update(_state(name))
    except OSError:
        return None
    for name in manifests:
        with suppress(FileNotFoundError):
            digest.update(_state(name))
    return digest.hexdigest()


def _state(name: str) -> bytes:
    return f"{name}\0{file_state(os.stat(name))}\n".encode("utf-8", "surrogateescape")


def _wait_for_lock(path: Path) -> int | None:
    """A descriptor that holds the lock of a set, whose file its holder removes at the end; None
    where that is not possible in time."""
    until = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            descriptor = open_regular(path, os.O_RDWR | os.O_CREAT, 0o600, follow=False)
        except (OSError, UnfitFileError):
            return None
        mine = False
        try:
            mine = try_lock(descriptor, fcntl.LOCK_EX) and is_named(descriptor, str(path))
            if mine:
                return descriptor
        except OSError:
            return None
        finally:
            if not mine:
                os.close(descriptor)
        if time.monotonic() > until:
            return None
        time.sleep(_POLL_SECONDS)


def _load(path: Path, count: int) -> OpenedSet | None:
    """A kept set of `count` shards; None if there is none, or a damaged one."""
    try:
        with open(open_regular(path, follow=False), "rb") as file:
            info = os.fstat(file.fileno())
            if info.st_uid != os.geteuid() or info.st_size > _MOST_BYTES:
                return None
            digest, _, content = file.read().partition(b"\n")
        if hashlib.sha256(content).hexdigest().encode() != digest:
            return None
        head, _, rows = content.partition(b"\n")
        classes = json_of(head, path)
        shards = np.frombuffer(rows, dtype=SHARD)
    except (OSError, ValueError):
        return None
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if not named or len(shards) != count:
        return None
    with suppress(OSError):
        os.utime(path)  # the sets that were not used for longest are removed first
    return OpenedSet(shards, tuple(classes))


def _store(path: Path, found: OpenedSet) -> None:
    """Keep a set, and remove the oldest ones of this host, and what was not used for long. Without
    room, none is kept."""
    content = json.dumps(found.classes).encode("ascii") + b"\n" + found.shards.tobytes()
    digest = hashlib.sha256(content).hexdigest().encode()
    with suppress(OSError):
        write_file(path, digest + b"\n" + content, mode=0o600)
        used = {one: one.stat().st_mtime for one in path.parent.iterdir()}
        mine = [one for one in used if one.match(f"{_host()}-*.set")]
        surplus = sorted(mine, key=lambda one: -used[one])[_KEPT:]
        unused = [one for one in used if used[one] < time.time() - _KEPT_SECONDS]
        for old in {*surplus, *unused}:
            remove(str(old))
