"""Files written whole or not at all, their hashes, and locks that are released when their owner
dies.

flock belongs to the open file, not to the process: two descriptors opened apart exclude each other
even in one thread.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import mmap
import os
import secrets
import stat
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from fastmoco_pipelines.files.small import open_regular

_LIBC = ctypes.CDLL(None, use_errno=True)
_mmap = _LIBC.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_madvise = _LIBC.madvise
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MADV_DONTNEED = 4
_munmap = _LIBC.munmap
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

OPEN_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW
OWN_TROUBLE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors of this process (files or memory that it may have), not of a file."""


def try_lock(descriptor: int, how: int) -> bool:
    """Whether the lock (fcntl.LOCK_SH or LOCK_EX) was free and is held now.

    Raises:
        OSError: where the file system knows no locks.
    """
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EINTR):
            return False
        raise
    return True


def lock_path(path: str) -> int | None:
    """A descriptor that holds a file's exclusive lock; None while another descriptor holds any
    lock, or without such a file."""
    try:
        # NFS gives an exclusive lock only to descriptors that may write
        descriptor = os.open(path, os.O_RDWR | OPEN_FLAGS)
    except OSError:
        return None
    mine = False
    try:
        mine = try_lock(descriptor, fcntl.LOCK_EX)
    finally:
        if not mine:
            os.close(descriptor)
    return descriptor if mine else None


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Bytes of a file, fewer only where it ends: file systems on a network may return less than was
    requested."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more
    return data


def map_file(descriptor: int) -> memoryview:
    """All of an open file, memory-mapped for reading; the descriptor may be closed afterwards.

    `mmap.mmap` keeps a descriptor for every mapping, of which a process has about a thousand. The
    file must be replaced as a whole, as `write_file` does, and not be cut while it is mapped.

    Raises:
        OSError: if it cannot be mapped; also if it is empty.
    """
    size = os.fstat(descriptor).st_size
    address = _mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    # Whole pages, as the kernel maps them: ctypes keeps a type for every length.
    content = (ctypes.c_char * (-(-size // mmap.PAGESIZE) * mmap.PAGESIZE)).from_address(address)
    weakref.finalize(content, _munmap, address, size).atexit = False
    return memoryview(content).cast("B").toreadonly()[:size]


def drop_pages(content: memoryview) -> None:
    """Take the pages of a mapped file out of this process's memory; a later use brings them back
    from the system's cache."""
    address = np.frombuffer(content, dtype=np.uint8).ctypes.data
    _madvise(address, len(content), _MADV_DONTNEED)


def file_state(info: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is written or replaced: device, inode, size and times."""
    return (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)


def user_cache() -> Path:
    """fastmoco's part of the user's cache folder (XDG_CACHE_HOME or ~/.cache).

    Raises:
        OSError: if the user has no home folder, as a user of a container without an entry.
    """
    return _user_folder("XDG_CACHE_HOME", ".cache")


def user_state() -> Path:
    """fastmoco's part of the user's state folder (XDG_STATE_HOME or ~/.local/state).

    Raises:
        OSError: as for `user_cache`.
    """
    return _user_folder("XDG_STATE_HOME", ".local/state")


def _user_folder(variable: str, default: str) -> Path:
    given = os.environ.get(variable)
    try:
        return (Path(given) if given else Path.home() / default) / "fastmoco"
    except RuntimeError as error:
        raise OSError(
            errno.ENOENT, f"this user has no home folder: set HOME or {variable}"
        ) from error


def at_home(path: str) -> str:
    """A path with `~` or `~user` at its beginning replaced, as a shell does outside quotes; as it is
    if it exists, or its folder does.

    Raises:
        ValueError: if there is no such user, or the user has no home folder.
    """
    if not path.startswith("~") or os.path.lexists(path) or os.path.isdir(os.path.dirname(path)):
        return path
    found = os.path.expanduser(path)
    if found == path:
        user = path.partition("/")[0]
        raise ValueError(
            f"{path!r}: {user!r} is the home folder of no user of this machine: write the whole "
            "path, or ./ before a name that begins with ~"
        )
    return found


@contextmanager
def utf8_name(path: Path) -> Iterator[str]:
    """A name of an existing file or folder for libraries that take UTF-8 only: names of other bytes
    are legal, and the kernel knows what is open by a number too."""
    name = str(path)
    if name.isascii() or name.encode(errors="replace") == os.fsencode(name):
        yield name
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def own_folder(folder: Path) -> bool:
    """Whether a folder, which is made if absent, is this user's alone to write to, and no link.

    Raises:
        OSError: if it can be neither found nor made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not os.path.lexists(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
    info = os.lstat(folder)
    mine = info.st_uid == os.geteuid() and not info.st_mode & 0o022
    return stat.S_ISDIR(info.st_mode) and mine


def is_free(path: str) -> bool:
    """Whether a file's lock is free at this moment."""
    descriptor = lock_path(path)
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is not None


def is_named(descriptor: int, path: str) -> bool:
    """Whether a descriptor is still the file of this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def remove(path: str) -> None:
    """Remove a file, if that is possible."""
    try:
        os.unlink(path)
    except OSError:
        return


def remove_if_free(path: str) -> None:
    """Remove a file unless its lock is held."""
    descriptor = lock_path(path)
    if descriptor is not None:
        remove(path)
        os.close(descriptor)


@contextmanager
def folder_for(path: Path, *, mode: int = 0o777) -> Iterator[Path]:
    """A folder in which something is made: created if absent, and removed again if that fails and
    the folder is still empty."""
    made = missing_folders(path)
    path.mkdir(parents=True, exist_ok=True, mode=mode)
    try:
        yield path
    except BaseException:
        remove_empty(made)
        raise


def missing_folders(path: Path) -> list[Path]:
    """A folder and those above it that do not exist, the deepest first."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders that hold nothing."""
    for folder in folders:
        with suppress(OSError):  # it holds something, or is gone
            folder.rmdir()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A new name beside `path`, which takes the place of `path` when the block ends.

    A reader of `path` sees the old file or the new one, never half of it. On an error the new file
    is removed.
    """
    fresh = _beside(path)
    try:
        yield fresh
        os.replace(fresh, path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        if error.errno and error.filename in (None, str(fresh)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def write_file(path: Path, content: bytes, *, mode: int = 0o666, durable: bool = False) -> Path:
    """Write a file whole or not at all; returns `path`.

    Args:
        path: a file of this name is replaced.
        content: all of it.
        mode: permissions of the file, less the umask.
        durable: push the bytes through to the disk before the file gets its name.

    Raises:
        OSError: if it cannot be written; an older file stays as it was.
    """
    with whole_file(path) as fresh:
        _write(fresh, content, mode, durable)
    return path


def write_new_file(path: Path, content: bytes, *, replaces: os.stat_result | None = None) -> bool:
    """Write a file whole, unless there is one of this name already; whether it was written.

    Args:
        path: a file of this name stays as it is.
        content: all of it.
        replaces: the state of a file of this name: if it is still in that state, it is replaced.

    Raises:
        OSError: if it cannot be written, or the file system has no hard links.
    """
    fresh = _beside(path)
    try:
        _write(fresh, content)
        if replaces is not None:
            _remove_only(path, replaces)
        os.link(fresh, path)
    except FileExistsError:
        return False
    finally:
        remove(str(fresh))
    return True


def _write(fresh: Path, content: bytes, mode: int = 0o666, durable: bool = False) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | OPEN_FLAGS
    with open(os.open(fresh, flags, mode), "wb") as file:
        file.write(content)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def _remove_only(path: Path, state: os.stat_result) -> None:
    """Remove a file in this state, and no other one that has taken its name meanwhile."""
    aside = _beside(path)
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    if not _is_unchanged(os.lstat(aside), state):
        try:
            os.link(aside, path)
        except FileExistsError:  # a still newer one
            pass
        except OSError:  # a file system without links
            os.rename(aside, path)
    remove(str(aside))


def _is_unchanged(now: os.stat_result, before: os.stat_result) -> bool:
    """Whether a file is the same one, whatever its name."""
    times = now.st_mtime_ns == before.st_mtime_ns and now.st_size == before.st_size
    return times and os.path.samestat(now, before)


def _beside(path: Path) -> Path:
    """A new name in the folder of a file, for a moment."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


SEAL = b',"content_hash":"'
"""What is before the hash at the end of a sealed JSON file."""


def sealed_json(content: dict[str, Any]) -> bytes:
    """JSON with a last field, `content_hash`: SHA-256 (hex) of the text as it would be without
    it."""
    text = json.dumps(content, separators=(",", ":")).encode("ascii")
    return text[:-1] + SEAL + hashlib.sha256(text).hexdigest().encode() + b'"}'


def is_sealed(text: bytes) -> bool:
    """Whether the hash at the end of a JSON text is there and right."""
    head, _, end = text.rpartition(SEAL)
    return end == hashlib.sha256(head + b"}").hexdigest().encode() + b'"}'


def write_json(path: Path, content: dict[str, Any], *, sealed: bool = False) -> Path:
    """Write a JSON file whole or not at all, as `sealed_json` if asked; returns `path`."""
    plain = json.dumps(content, separators=(",", ":")).encode("ascii")
    return write_file(path, sealed_json(content) if sealed else plain)


def hash_file(source: Path | int) -> str:
    """SHA-256 (hex) of a whole file: of a path, or of an open descriptor, which stays open.

    Raises:
        UnfitFileError: if the path is no regular file.
        OSError: if it cannot be read.
    """
    own = not isinstance(source, int)
    with open(source, "rb", closefd=own, opener=lambda path, _: open_regular(path)) as file:
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()
