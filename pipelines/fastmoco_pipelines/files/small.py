"""Small files of any origin: what is read of them is a regular file, of a bounded size, UTF-8, JSON
of a bounded depth, or it is refused with its name and the place.

A file beside data or in the folder of a run may come from anybody. A FIFO would block its reader for
ever, a link to /dev/zero fill the memory, deep nesting end the interpreter's stack.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SMALL_BYTES = 64 << 20
"""Largest file that is read as a whole, unless its reader says otherwise."""
JSON_DEPTH = 32
"""Deepest nesting of lists and objects in a file of JSON. fastmoco writes at most a third of it."""

HOLLOW_BYTES = 1 << 30
"""A smaller file may consist of holes."""
_PARTS = 10_000

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class UnfitFileError(ValueError):
    """A file that is not of the form that is due. Names the file, what it is or the place where it
    is wrong, and the cure."""


def reason_of(error: UnfitFileError, name: Path | str) -> str:
    """What is wrong with a file, without its name, for messages that name it themselves."""
    return str(error).removeprefix(f"{_plain(str(name))}: ")


def open_regular(
    path: Path | str,
    flags: int = os.O_RDONLY,
    mode: int = 0o666,
    *,
    follow: bool = True,
    limit: int | None = None,
) -> int:
    """A descriptor of a regular file. Never waits, as an open of a named pipe would.

    Args:
        path: its name.
        flags: of os.open; O_CLOEXEC is added. With O_TRUNC a file of another kind is still refused
            before anything is changed.
        mode: permissions of a new file, less the umask.
        follow: whether a symbolic link may stand for the file. False in folders that another user
            may have filled: a link there chooses what is read or overwritten. A file to write to
            must then have no second name either (a hard link), which would change with it.
        limit: largest size in bytes; None: any.

    Raises:
        UnfitFileError: if it is no regular file, or larger.
        OSError: if it cannot be opened.
    """
    cut = flags & os.O_TRUNC
    flags = flags & ~os.O_TRUNC | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    if not follow and os.path.islink(path):
        raise UnfitFileError(_link(path))
    try:
        descriptor = os.open(path, flags, mode)
    except OSError:
        _require_regular(path, follow)  # e.g. a named pipe that nobody reads, opened for writing
        raise
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise UnfitFileError(_other_kind(path, found.st_mode))
        if not follow and flags & (os.O_WRONLY | os.O_RDWR) and found.st_nlink > 1:
            raise UnfitFileError(_second_name(path))
        if limit is not None and found.st_size > limit:
            raise UnfitFileError(_too_large(path, found.st_size, limit))
        os.set_blocking(descriptor, True)
        if cut:
            os.ftruncate(descriptor, 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_small(path: Path | str, limit: int = SMALL_BYTES, *, follow: bool = True) -> bytes:
    """All bytes of a regular file.

    Args:
        path: its name.
        limit: bytes; one more is refused.
        follow: as in `open_regular`.

    Raises:
        UnfitFileError: if it is no regular file, or larger.
        OSError: if it cannot be read.
    """
    descriptor = open_regular(path, follow=follow, limit=limit)
    parts = []
    length = 0
    try:
        size = os.fstat(descriptor).st_size  # in /proc a file may say 0 and go on
        while length <= limit:
            part = os.read(descriptor, min(limit + 1 - length, max(size + 1, 1 << 16)))
            if not part:
                break
            parts.append(part)
            length += len(part)
    finally:
        os.close(descriptor)
    if length > limit:
        raise UnfitFileError(_too_large(path, length, limit))
    return b"".join(parts)


def require_solid(descriptor: int, name: Path | str) -> None:
    """Refuse a large file of which less than a sixteenth takes room on the disk: the rest are holes,
    which are read as zeros, so that a few kilobytes ask for terabytes of memory or hours of hashing.

    Args:
        descriptor: of a regular file. Its position stays.
        name: of the file, for messages.

    Raises:
        UnfitFileError: if it is such a file. Where the file system knows no holes there are none.
    """
    size = os.fstat(descriptor).st_size
    if size <= HOLLOW_BYTES:
        return
    place = os.lseek(descriptor, 0, os.SEEK_CUR)
    solid = end = 0
    try:
        for _ in range(_PARTS):
            begin = os.lseek(descriptor, end, os.SEEK_DATA)
            end = os.lseek(descriptor, begin, os.SEEK_HOLE)
            solid += end - begin
            if end >= size or solid * 16 >= size:
                break
    except OSError as error:
        if error.errno != errno.ENXIO:  # else no data follow
            return
        end = size
    finally:
        os.lseek(descriptor, place, os.SEEK_SET)
    if solid * 16 < end:
        raise UnfitFileError(
            f"{_plain(str(name))}: has {size:,} bytes, of which nearly all are holes: it is not what "
            "its name says; move it away"
        )


def text_of(content: bytes, name: Path | str) -> str:
    """Content of a file as text.

    Args:
        content: UTF-8, also with a byte order mark.
        name: of the file, for messages.

    Raises:
        UnfitFileError: names the line and the byte that is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig" if content[:3] == b"\xef\xbb\xbf" else "utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UnfitFileError(
            f"{_plain(str(name))}: line {line}, byte {error.start}: {content[error.start]:#04x} is "
            "not UTF-8 text"
        ) from None


def json_of(
    content: bytes, name: Path | str, *, depth: int = JSON_DEPTH, strict: bool = False
) -> Any:
    """Content of a file of JSON, or of one line of it.

    Args:
        content: UTF-8.
        name: of the file, for messages; `FILE: line 7` for a line.
        depth: deepest nesting of lists and objects.
        strict: also refuse what fastmoco never writes: NaN, infinities, and two values of one name,
            of which another reader would take the other.

    Raises:
        UnfitFileError: if it is not UTF-8 or JSON, or nested deeper; names the place.
    """
    text = text_of(content, name)
    try:
        found = json.loads(text, **(_STRICT if strict else {}))
    except UnfitFileError as error:
        raise UnfitFileError(f"{_plain(str(name))}: {error}") from None
    except json.JSONDecodeError as error:
        raise UnfitFileError(
            f"{_plain(str(name))}: line {error.lineno}, column {error.colno}: not JSON: {error.msg}"
        ) from None
    except RecursionError:
        raise UnfitFileError(_too_deep(name, depth)) from None
    except ValueError:  # a whole number with more digits than Python converts
        raise UnfitFileError(f"{_plain(str(name))}: not JSON: a number is too long") from None
    # A walk is due only where there are enough brackets for the depth.
    if text.count("[") + text.count("{") > depth and _is_deeper(found, depth):
        raise UnfitFileError(_too_deep(name, depth))
    return found


def read_json(
    path: Path | str,
    limit: int = SMALL_BYTES,
    *,
    depth: int = JSON_DEPTH,
    follow: bool = True,
    strict: bool = False,
) -> Any:
    """Content of a small file of JSON; `read_small` and `json_of` in one.

    Raises:
        UnfitFileError: if it is no regular file, too large, not UTF-8, not JSON or too deep.
        OSError: if it cannot be read.
    """
    return json_of(read_small(path, limit, follow=follow), path, depth=depth, strict=strict)


def lines_of(
    path: Path | str, longest: int = 1 << 20, *, follow: bool = True, limit: int | None = None
) -> Iterator[tuple[int, bytes]]:
    """(byte, line) of a regular file of any size, one after the other; lines keep their end. Of a
    file that grows, those that had begun when it was opened.

    Of a line beyond `longest` bytes, only the first `longest` are returned, and the rest is skipped:
    the parser of the line refuses it. `follow` and `limit` as in `open_regular`.

    Raises:
        UnfitFileError: if it is no regular file, or larger.
        OSError: if it cannot be read.
    """
    with open(open_regular(path, follow=follow, limit=limit), "rb") as file:
        at, size = 0, os.fstat(file.fileno()).st_size
        while at < size and (line := file.readline(longest)):
            yield at, line
            at += len(line)
            while len(line) == longest and not line.endswith(b"\n"):
                line = file.readline(longest)
                at += len(line)


def linked_to(folder: Path) -> str:
    """Where a folder lies whose name is a link of this user's or of root's, e.g. one on another
    disk; empty for a folder, and where there is nothing yet.

    Raises:
        UnfitFileError: if the link is another user's or leads nowhere, or this is no folder.
    """
    try:
        found = os.lstat(folder)
    except FileNotFoundError:
        return ""
    name = _plain(str(folder))
    link = stat.S_ISLNK(found.st_mode)
    if link and found.st_uid not in (0, os.geteuid()):
        raise UnfitFileError(
            f"{name}: is a symbolic link of another user, who chooses by it where is written; "
            "remove it, or make it yourself"
        )
    if not os.path.isdir(folder):
        what = "leads to no folder" if link else "is a file where a folder is due"
        raise UnfitFileError(f"{name}: {what}; move it away")
    return os.path.realpath(folder) if link else ""


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twin = max(counts, key=counts.__getitem__)
        raise UnfitFileError(f"{_plain(twin[:200])} has two values")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise UnfitFileError(f"{text[:40]} is no finite number")
    return number


_STRICT: dict[str, Any] = {
    "object_pairs_hook": _without_twins,
    "parse_constant": _finite,
    "parse_float": _finite,
}


def _plain(name: str) -> str:
    """A name that cannot steer a terminal, as `text.escaped` makes it."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def _is_deeper(content: Any, depth: int) -> bool:
    level = [content] if isinstance(content, dict | list) else []
    for _ in range(depth):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    return bool(level)


def _require_regular(path: Path | str, follow: bool) -> None:
    try:
        kind = os.stat(path, follow_symlinks=follow).st_mode
    except OSError:
        return
    if stat.S_ISLNK(kind):
        raise UnfitFileError(_link(path))
    if not stat.S_ISREG(kind):
        raise UnfitFileError(_other_kind(path, kind))


def _link(path: Path | str) -> str:
    return (
        f"{_plain(str(path))}: is a symbolic link where a file is due, and is not followed: it "
        "could choose any file; remove it, or put the file itself in its place"
    )


def _second_name(path: Path | str) -> str:
    return (
        f"{_plain(str(path))}: has a second name (a hard link), and a write would change that one "
        "too; replace it by a copy of its own"
    )


def _too_large(path: Path | str, size: int, limit: int) -> str:
    return (
        f"{_plain(str(path))}: has {size:,} bytes, a file of this kind at most {limit:,}: it is "
        "not what its name says; move it away"
    )


def _other_kind(path: Path | str, kind: int) -> str:
    what = next((name for test, name in _KINDS if test(kind)), "no regular file")
    return f"{_plain(str(path))}: is {what} where a file is due; move it away"


def _too_deep(name: Path | str, depth: int) -> str:
    return f"{_plain(str(name))}: lists and objects are nested deeper than {depth}"
