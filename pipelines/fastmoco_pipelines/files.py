"""Files written whole or not at all, and locks on them that fall free when their owner dies, for threads and processes.

flock belongs to the open file, not to the process: two descriptors opened apart exclude each other even in one thread.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any

OPEN_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW


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
    """A descriptor that holds a file's exclusive lock; None while somebody else holds any, or without such a file."""
    try:
        descriptor = os.open(path, os.O_RDWR | OPEN_FLAGS)  # NFS gives an exclusive lock to those alone who may write
    except OSError:
        return None
    mine = False
    try:
        mine = try_lock(descriptor, fcntl.LOCK_EX)
    finally:
        if not mine:
            os.close(descriptor)
    return descriptor if mine else None


def is_free(path: str) -> bool:
    """Whether nobody holds a file's lock, this moment."""
    descriptor = lock_path(path)
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is not None


def is_named(descriptor: int, path: str) -> bool:
    """Whether a descriptor still is what stands under a name."""
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
    """Remove a file unless somebody holds its lock."""
    descriptor = lock_path(path)
    if descriptor is not None:
        remove(path)
        os.close(descriptor)


SEAL = b',"content_hash":"'


def write_json(path: Path, content: dict[str, Any], *, sealed: bool = False) -> Path:
    """Write a JSON file so that a reader sees the old one or the new one, never half of it.

    ``sealed`` adds a last field, ``content_hash``: SHA-256 (hex) of the file as it would be without that field.
    """
    text = json.dumps(content, separators=(",", ":")).encode("ascii")
    if sealed:
        text = text[:-1] + SEAL + hashlib.sha256(text).hexdigest().encode() + b'"}'
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
