"""One process at a time writes into a folder of shards, and a killed one leaves nothing that the
next one does not finish or remove.

New shards are made in a hidden folder, `.packing-SET-XXXX`. Then a list of what to move,
`manifest.MOVING`, is written: from there on the set is finished by whichever process comes next,
before that list the hidden folder is rubbish. Loaders refuse a set that is on such a list.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastmoco_pipelines.files.small import open_regular
from fastmoco_pipelines.files.whole import is_named, remove, try_lock, write_json
from fastmoco_pipelines.formats.index import index_path, json_path
from fastmoco_pipelines.formats.manifest import (
    HIDDEN,
    MOVING,
    NAME,
    own_sets,
    read_moving,
    write_sets,
)
from fastmoco_pipelines.text import counted, escaped

LOCK = ".fastmoco-lock"
"""Name of the file in a folder of shards whose lock the process that writes there holds."""
_POLL_SECONDS = 0.1
_STALE_SECONDS = 60.0
"""Files that are written beside shards without the lock live for less."""

Tell = Callable[[str], None]


@contextmanager
def one_writer(
    folder: Path, task: str, tell: Tell | None = None
) -> Iterator[dict[str, dict[str, Any]]]:
    """Write into a folder of shards alone; wait while another process does.

    Args:
        folder: exists.
        task: what is done there; a second process with the same one is refused at once.
        tell: gets sentences about waiting, and about what a killed process has left.

    Yields:
        By name the sets that a killed process had begun and that were finished now: the lists of
        what was moved.

    Raises:
        ValueError: if another process does the same there.
        OSError: if the folder cannot be written.
    """
    tell = tell or (lambda text: None)
    task = escaped(task)  # it may name a folder whose bytes are no text
    lock = folder / LOCK
    descriptor = _take(folder, lock, task, tell)
    try:
        yield _clear(folder, tell)
    finally:
        # The name goes while the lock is held: who waits for it finds that the file has none.
        if descriptor is not None:
            remove(str(lock))
            os.close(descriptor)


def hidden_folder(folder: Path, name: str) -> Path:
    """A new folder for the shards of a set; `move_in` empties it."""
    path = folder / f"{HIDDEN}{name}-{os.urandom(4).hex()}"
    path.mkdir()
    return path


def move_in(
    folder: Path, made: Path, name: str, entry: dict[str, Any], old: Sequence[Path], **more: Any
) -> None:
    """Put finished shards in their place, and the set in the manifest; a kill at any moment leaves
    a list by which it is finished.

    Args:
        folder: of the shards.
        made: hidden folder, with the shards and their indexes.
        name: of the set; `entry`: of the manifest.
        old: shards that are replaced.
        more: kept in the list.
    """
    listed = {"folder": made.name, "set": name, "entry": entry, "old": [tar.name for tar in old]}
    try:
        write_json(folder / MOVING, {**listed, **more})
    except BaseException:
        if not (folder / MOVING).exists():
            shutil.rmtree(made, ignore_errors=True)
        raise
    _finish(folder, {**listed, **more})


def _take(folder: Path, lock: Path, task: str, tell: Tell) -> int | None:
    """A descriptor with the lock; None where the file system has no locks."""
    told = False
    while True:
        descriptor = _open(folder, lock)
        try:
            if try_lock(descriptor, fcntl.LOCK_EX):
                if is_named(descriptor, str(lock)):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, f"{os.getpid()}\n{task}".encode(), 0)
                    return descriptor
            else:
                owner, _, other = (
                    os.pread(descriptor, 4096, 0).decode(errors="replace").partition("\n")
                )
                if other == task:
                    os.close(descriptor)
                    descriptor = -1
                    raise ValueError(
                        f"{folder}: process {owner} does this already ({task}): wait for it, or "
                        "choose another folder or prefix"
                    )
                if not told and owner:
                    told = True
                    tell(f"waiting for process {owner} ({other}), which writes into {folder}")
                time.sleep(_POLL_SECONDS)
        except OSError:  # a file system without locks
            os.close(descriptor)
            remove(str(lock))
            return None
        except BaseException:
            if descriptor >= 0:
                os.close(descriptor)
            raise
        os.close(descriptor)


def _open(folder: Path, lock: Path) -> int:
    try:
        return open_regular(lock, os.O_RDWR | os.O_CREAT, follow=False)
    except FileNotFoundError:  # another process has removed the empty folder
        folder.mkdir(parents=True, exist_ok=True)
        return open_regular(lock, os.O_RDWR | os.O_CREAT, follow=False)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise OSError(error.errno, error.strerror, str(folder)) from error
        raise


def _clear(folder: Path, tell: Tell) -> dict[str, dict[str, Any]]:
    """Finish or remove what a killed process has left."""
    finished = {}
    moving = read_moving(folder)
    if moving is not None:
        try:
            _finish(folder, moving)
        except FileNotFoundError as error:
            remove(str(folder / MOVING))
            tell(
                f"{folder}: a killed process has left the set {moving['set']!r} incomplete "
                f"({error.filename} is gone): pack it again with --overwrite"
            )
        else:
            finished[moving["set"]] = moving
            tell(
                f"{folder}: the set {moving['set']!r}, which a killed process had begun to move "
                "to its place, is complete now"
            )
    else:
        remove(str(folder / MOVING))

    left = [path for path in folder.glob(f"{HIDDEN}*-*") if path.is_dir() and not path.is_symlink()]
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    halves = [*folder.glob(f".{NAME}.*.tmp"), *folder.glob(f".{MOVING}.*.tmp")]
    halves += [path for path in folder.glob(".*.tar.index*.tmp") if _is_stale(path)]
    for path in halves:
        remove(str(path))
    if left or halves:
        files = counted(len(left) + len(halves), "unfinished file")
        tell(f"{folder}: removed {files}, left by a killed process")
    return finished


def _finish(folder: Path, moving: dict[str, Any]) -> None:
    """Move what is listed; what was moved already is in its place.

    Raises:
        FileNotFoundError: if a shard is in neither place.
    """
    made = folder / moving["folder"]
    names = [shard["name"] for shard in moving["entry"]["shards"]]
    for name in names:
        if not (made / name).exists() and not (folder / name).exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)

    # Old shards go with their indexes; of a shard that is replaced the index comes first.
    for name in set(moving["old"]) - set(names):
        for path in (folder / name, index_path(folder / name), json_path(folder / name)):
            path.unlink(missing_ok=True)
    for name in names:
        if (made / name).exists():
            json_path(folder / name).unlink(missing_ok=True)
            with suppress(FileNotFoundError):
                os.replace(index_path(made / name), index_path(folder / name))
            os.replace(made / name, folder / name)

    write_sets(folder, own_sets(folder) | {moving["set"]: moving["entry"]})
    shutil.rmtree(made, ignore_errors=True)
    remove(str(folder / MOVING))


def _is_stale(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > _STALE_SECONDS
    except OSError:
        return False
