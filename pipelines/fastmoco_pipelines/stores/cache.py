"""Shards from a server, kept in a folder of bounded size that all processes of this machine share.

    KEY.tar         a whole, checked shard; a reader holds a shared lock, so that it is not evicted
    KEY.SIZE.part   a shard in transfer; its process holds the lock, released if that process dies
    KEY.from        the validator of the .part, by which an interrupted download is continued
    KEY.doc         a small file (an index) with its validator and its own SHA-256
    .KEY.doc.*.tmp  a small file that is being written
    lock            held for the moment in which room is made

KEY is a hash of the URL and the content of a shard. Final names are only given by renaming, so a
file under its final name is whole. Links are never followed, and files of other users are not read.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fastmoco_pipelines.errors import NoRoomError
from fastmoco_pipelines.files.small import UnfitFileError, open_regular, read_small
from fastmoco_pipelines.files.whole import (
    OPEN_FLAGS,
    is_free,
    is_named,
    lock_path,
    map_file,
    own_folder,
    remove,
    remove_if_free,
    try_lock,
    user_cache,
    write_file,
)
from fastmoco_pipelines.formats.index_file import MAX_INDEX_BYTES
from fastmoco_pipelines.spec import CacheSpec

_NAME = re.compile(r"([0-9a-f]{64})\.(?:(tar)|(\d{1,15})\.(part)|(from)|(doc))")
_UNFINISHED = re.compile(r"\.[0-9a-f]{64}\.doc\.[0-9a-f]{8}\.tmp")
_ABANDONED_SECONDS = 24 * 3600.0
_DOCUMENT_HEAD = 4096  # validator and hash of a small file are shorter
_DOCUMENT_BYTES = MAX_INDEX_BYTES + _DOCUMENT_HEAD  # the largest small file is an index
_LOCK_SECONDS = 30.0
_SPARE_BYTES = 64 << 20  # left free on the disk


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    path: str
    key: str
    kind: str
    size: int
    used: float


class Part:
    """A shard in transfer into the cache; this process holds its lock. See transfer.PartFile."""

    def __init__(self, descriptor: int, path: str, notes: str) -> None:
        self.descriptor = descriptor
        self.path = path
        self._notes = notes

    def resume_point(self) -> tuple[int, str]:
        """Bytes received, and the validator of their file; (0, "") where there is nothing to
        continue."""
        length = os.fstat(self.descriptor).st_size
        if length == 0:
            return 0, ""
        try:
            validator = read_small(self._notes, 1024, follow=False).decode("ascii")
        except (OSError, ValueError):
            validator = ""
        return (length, validator) if validator else (0, "")

    def restart(self, validator: str) -> None:
        """Discard the bytes received, and start again with a file of this validator."""
        os.ftruncate(self.descriptor, 0)
        # Before the first byte is written, so that a note never belongs to the bytes of another
        # file.
        remove(self._notes)
        if validator:
            with open(
                os.open(self._notes, os.O_WRONLY | os.O_CREAT | os.O_EXCL | OPEN_FLAGS, 0o600), "w"
            ) as file:
                file.write(validator)

    def close(self) -> None:
        """Release it; another process may continue it."""
        os.close(self.descriptor)


class ShardCache:
    """The folder. Every method may be called from any thread of any number of processes.

    Args:
        folder: exists, and belongs to this user alone.
        limit: bytes that it may hold.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        # Of files under their final names, by name and inode.
        self._sizes: dict[tuple[str, int], int] = {}
        self._turn = threading.Lock()

    @classmethod
    def open(cls, spec: CacheSpec) -> Self:
        """The cache of a spec; its folder is made if absent, and what killed processes left long
        ago is removed.

        Raises:
            ValueError: if the folder is a link, another user's, or open to others.
            OSError: if it can be neither found nor made.
        """
        folder = Path(spec.cache_dir).expanduser() if spec.cache_dir else user_cache() / "shards"
        if not own_folder(folder):
            raise ValueError(
                f"cache_dir={str(folder)!r}: must be a folder of your own that only you can write "
                "to, and no link: chmod 700 it, or choose another"
            )
        cache = cls(folder, spec.cache_bytes)
        entries = cache._entries()
        held = sum(entry.size for entry in entries)
        cache.limit = min(spec.cache_bytes, int(0.8 * (shutil.disk_usage(folder).free + held)))
        parts = {entry.key for entry in entries if entry.kind == "part"}
        for entry in entries:
            old = entry.kind == "part" and time.time() - entry.used > _ABANDONED_SECONDS
            if old or (entry.kind == "from" and entry.key not in parts):
                remove_if_free(entry.path)
        cache._remove_unfinished()
        return cache

    def lookup(self, key: str, size: int) -> int | None:
        """A descriptor of a whole shard, which holds it in the cache until it is closed; None if
        there is none."""
        try:
            descriptor = open_regular(self.folder / f"{key}.tar", follow=False)
        except UnfitFileError:  # a link, a pipe: not made by this program
            self.discard(key)
            return None
        except OSError:
            return None
        info = os.fstat(descriptor)
        good = info.st_uid == os.geteuid() and info.st_size == size
        try:
            locked = good and try_lock(descriptor, fcntl.LOCK_SH)
        except OSError:  # a file system without locks: `claim` says so
            locked = False
        if not locked or os.fstat(descriptor).st_nlink == 0:
            os.close(descriptor)
            if not good:
                self.discard(key)
            return None
        with suppress(OSError):  # a folder that can only be read still serves
            os.utime(descriptor)  # Its age by use: the least recently used shard is evicted first.
        return descriptor

    def holds(self, key: str) -> bool:
        """Whether a whole shard is there, this moment."""
        try:
            return stat.S_ISREG(os.lstat(self.folder / f"{key}.tar").st_mode)
        except OSError:
            return False

    def claim(self, key: str, size: int, keep: Collection[str] = ()) -> Part | None:
        """The right and the room to fetch a shard; None while another thread or process fetches it,
        or has just done so.

        Args:
            key: of the shard.
            size: in bytes.
            keep: keys of shards that are not evicted for it, even if no process reads them at this
                moment.

        Raises:
            NoRoomError: if there is no room and none can be made.
        """
        path = str(self.folder / f"{key}.{size}.part")
        notes = str(self.folder / f"{key}.from")
        try:
            with self._making_room():
                descriptor = _opened(path)
                mine = try_lock(descriptor, fcntl.LOCK_EX) and is_named(descriptor, path)
                if not mine or self.holds(key):
                    if mine:  # it was completed this moment, and opening has made an empty file
                        remove(path)
                    os.close(descriptor)
                    return None
                try:
                    self._make_room(key, size, have=os.fstat(descriptor).st_size, keep={key, *keep})
                except NoRoomError:
                    if os.fstat(descriptor).st_size == 0:
                        remove(path)
                    os.close(descriptor)
                    raise
                return Part(descriptor, path, notes)
        except UnfitFileError as error:
            raise NoRoomError(str(error)) from error
        except OSError as error:
            raise NoRoomError(f"{self.folder}: {error.strerror}") from error

    def abandon(self, part: Part) -> None:
        """Remove a shard in transfer that cannot be continued."""
        remove(part.path)

    def finish(self, key: str, part: Part) -> None:
        """Give a whole, checked shard its name.

        Raises:
            OSError, NoRoomError: if that is not possible.
        """
        os.utime(part.descriptor)
        # Locked, because a count at this moment would find neither the old name nor the new one.
        with self._making_room():
            os.rename(part.path, self.folder / f"{key}.tar")
        remove(str(self.folder / f"{key}.from"))

    def discard(self, key: str) -> None:
        """Discard a shard that has proved to be damaged. Open descriptors of it stay valid."""
        remove(str(self.folder / f"{key}.tar"))

    def read_document(self, key: str) -> tuple[str, bytes]:
        """(validator, content) of a small file; ("", b"") if there is none."""
        try:
            text = read_small(self.folder / f"{key}.doc", _DOCUMENT_BYTES, follow=False)
            validator, digest, content = text.split(b"\n", 2)
        except (OSError, ValueError):
            return "", b""
        # A damaged copy would be used indefinitely: the server reports that the file is unchanged.
        whole = hashlib.sha256(content).hexdigest().encode() == digest
        return (validator.decode("latin-1"), content) if whole else ("", b"")

    def map_document(self, key: str) -> memoryview | None:
        """The content of a small file, memory-mapped and not checked; None if there is none."""
        try:
            descriptor = open_regular(self.folder / f"{key}.doc", follow=False)
        except (OSError, UnfitFileError):
            return None
        try:
            content = map_file(descriptor)
        except OSError:
            return None
        finally:
            os.close(descriptor)
        head = bytes(content[:_DOCUMENT_HEAD])
        return content[head.find(b"\n", head.find(b"\n") + 1) + 1 :]

    def write_document(self, key: str, validator: str, content: bytes) -> None:
        """Keep a small file, if there is room."""
        digest = hashlib.sha256(content).hexdigest()
        text = f"{validator}\n{digest}\n".encode("latin-1") + content
        with suppress(OSError):
            write_file(self.folder / f"{key}.doc", text, mode=0o600)

    def size(self) -> int:
        """Bytes that the cache holds; shards in transfer count with their full size."""
        with self._making_room():
            return sum(entry.size for entry in self._entries())

    def _entries(self) -> list[_Entry]:
        entries = []
        for item in os.scandir(self.folder):
            match = _NAME.fullmatch(item.name)
            try:
                info = item.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if match is None or not stat.S_ISREG(info.st_mode):
                continue
            kind = next(group for group in (match[2], match[4], match[5], match[6]) if group)
            size = info.st_size
            if kind == "part" and not is_free(item.path):
                size = max(size, int(match[3]))
            entries.append(
                _Entry(path=item.path, key=match[1], kind=kind, size=size, used=info.st_mtime)
            )
        return entries

    def _held(self, key: str) -> int:
        """Bytes that the cache holds besides one shard in transfer: the sum of `_entries`, without
        a look at files that are known."""
        known: dict[tuple[str, int], int] = {}
        held = 0
        for item in os.scandir(self.folder):
            place = (item.name, item.inode())
            size = self._sizes.get(place)
            if size is None:
                match = _NAME.fullmatch(item.name)
                if match is None or (match[4] and match[1] == key):
                    continue
                try:
                    info = item.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                size = info.st_size if stat.S_ISREG(info.st_mode) else 0
                if match[4] and not is_free(item.path):
                    size = max(size, int(match[3]))
            if item.name.endswith((".tar", ".doc")):
                known[place] = size
            held += size
        self._sizes = known
        return held

    def _remove_unfinished(self) -> None:
        """Remove small files whose process was killed while it wrote them, long ago."""
        for item in os.scandir(self.folder):
            if _UNFINISHED.fullmatch(item.name) is None:
                continue
            with suppress(FileNotFoundError):  # renamed or removed at this moment
                written = item.stat(follow_symlinks=False).st_mtime
                if time.time() - written > _ABANDONED_SECONDS:
                    remove(item.path)

    def _make_room(self, key: str, size: int, *, have: int, keep: set[str]) -> None:
        """Evict the least recently used shards until `size` more bytes fit; none if that does not
        suffice."""
        usage = shutil.disk_usage(self.folder)
        lacking = size - have - max(0, usage.free - _SPARE_BYTES)
        if max(self._held(key) + size - self.limit, lacking) <= 0:
            return
        entries = [
            entry for entry in self._entries() if not (entry.kind == "part" and entry.key == key)
        ]
        over = max(sum(entry.size for entry in entries) + size - self.limit, lacking)
        # Left-over parts first: they may never be continued. Small files last.
        known = (entry for entry in entries if entry.key not in keep and entry.kind != "from")
        last = {"part": 0, "tar": 1, "doc": 2}  # an index is small, and needed as long as its set
        candidates = sorted(known, key=lambda entry: (last[entry.kind], entry.used))
        chosen: list[tuple[_Entry, int]] = []
        try:
            for entry in candidates:
                if over <= 0:
                    break
                descriptor = lock_path(entry.path)
                if descriptor is not None:
                    chosen.append((entry, descriptor))
                    over -= entry.size
            if over > 0:
                raise NoRoomError(
                    f"{self.folder}: {size} bytes do not fit: all else in it is in use"
                )
            for entry, _ in chosen:
                remove(entry.path)
        finally:
            for _, descriptor in chosen:
                os.close(descriptor)

    @contextmanager
    def _making_room(self) -> Iterator[None]:
        """One process at a time; a stopped process does not block the others indefinitely."""
        # The threads of a process take turns, and do not ask for the file again and again.
        if not self._turn.acquire(timeout=_LOCK_SECONDS):
            raise NoRoomError(f"{self.folder / 'lock'}: was held for {_LOCK_SECONDS:g} s")
        try:
            with self._locked():
                yield
        finally:
            self._turn.release()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            descriptor = _opened(str(self.folder / "lock"))
        except UnfitFileError as error:
            raise NoRoomError(str(error)) from error
        try:
            until = time.monotonic() + _LOCK_SECONDS
            while not try_lock(descriptor, fcntl.LOCK_EX):
                if time.monotonic() > until:
                    raise NoRoomError(
                        f"{self.folder / 'lock'}: another process has held it for "
                        f"{_LOCK_SECONDS:g} s"
                    )
                time.sleep(0.01)
            yield
        finally:
            os.close(descriptor)


def _opened(path: str) -> int:
    """A descriptor of a file of the cache, made if absent; a link or pipe in its place, which this
    program has not made, is removed.

    Raises:
        OSError, UnfitFileError: if that is not possible.
    """
    flags = os.O_RDWR | os.O_CREAT
    try:
        return open_regular(path, flags, 0o600, follow=False)
    except UnfitFileError:
        remove(path)
        return open_regular(path, flags, 0o600, follow=False)
