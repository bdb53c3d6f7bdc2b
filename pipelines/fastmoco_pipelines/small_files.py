"""Small files of any origin: what is read of them is a regular file, of a bounded size, UTF-8, JSON
of a bounded depth, or it is refused with its name and the place.

A file beside data or in the folder of a run may come from anybody. A FIFO would block its reader for
ever, a link to /dev/zero fill the memory, deep nesting end the interpreter's stack.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastmoco_pipelines.text import escaped

SMALL_BYTES = 64 << 20
"""Largest file that is read as a whole, unless its reader says otherwise."""
JSON_DEPTH = 32
"""Deepest nesting of lists and objects in a file of JSON. fastmoco writes at most a third of it."""

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
    return str(error).removeprefix(f"{escaped(str(name))}: ")


def open_regular(
    path: Path | str, flags: int = os.O_RDONLY, mode: int = 0o666, *, follow: bool = True
) -> int:
    """A descriptor of a regular file. Never waits, as an open of a named pipe would.

    Args:
        path: its name.
        flags: of os.open; O_CLOEXEC is added. With O_TRUNC a file of another kind is still refused
            before anything is changed.
        mode: permissions of a new file, less the umask.
        follow: whether a symbolic link may stand for the file. False in folders that another user
            may have filled: a link there chooses what is read or overwritten.

    Raises:
        UnfitFileError: if it is no regular file.
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
        kind = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(kind):
            raise UnfitFileError(_other_kind(path, kind))
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
    with open(open_regular(path, follow=follow), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > limit else file.read(limit + 1)
    if max(size, len(content)) > limit:
        raise UnfitFileError(
            f"{escaped(str(path))}: has {max(size, len(content)):,} bytes, a file of this kind at "
            f"most {limit:,}: it is not what its name says; move it away"
        )
    return content


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
            f"{escaped(str(name))}: line {line}, byte {error.start}: {content[error.start]:#04x} is "
            "not UTF-8 text"
        ) from None


def json_of(content: bytes, name: Path | str, *, depth: int = JSON_DEPTH) -> Any:
    """Content of a file of JSON, or of one line of it.

    Args:
        content: UTF-8.
        name: of the file, for messages; `FILE: line 7` for a line.
        depth: deepest nesting of lists and objects.

    Raises:
        UnfitFileError: if it is not UTF-8 or JSON, or nested deeper; names the place.
    """
    text = text_of(content, name)
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise UnfitFileError(
            f"{escaped(str(name))}: line {error.lineno}, column {error.colno}: not JSON: "
            f"{error.msg}"
        ) from None
    except RecursionError:
        raise UnfitFileError(_too_deep(name, depth)) from None
    except ValueError:  # a whole number with more digits than Python converts
        raise UnfitFileError(f"{escaped(str(name))}: not JSON: a number is too long") from None
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
) -> Any:
    """Content of a small file of JSON; `read_small` and `json_of` in one.

    Raises:
        UnfitFileError: if it is no regular file, too large, not UTF-8, not JSON or too deep.
        OSError: if it cannot be read.
    """
    return json_of(read_small(path, limit, follow=follow), path, depth=depth)


def lines_of(
    path: Path | str, longest: int = 1 << 20, *, follow: bool = True
) -> Iterator[tuple[int, bytes]]:
    """(byte, line) of a regular file of any size, one after the other; lines keep their end.

    Of a line beyond `longest` bytes, only the first `longest` are returned, and the rest is skipped:
    the parser of the line refuses it.

    Raises:
        UnfitFileError: if it is no regular file.
        OSError: if it cannot be read.
    """
    with open(open_regular(path, follow=follow), "rb") as file:
        at = 0
        while line := file.readline(longest):
            yield at, line
            at += len(line)
            while len(line) == longest and not line.endswith(b"\n"):
                line = file.readline(longest)
                at += len(line)


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
        f"{escaped(str(path))}: is a symbolic link where a file is due, and is not followed: it "
        "could choose any file; remove it, or put the file itself in its place"
    )


def _other_kind(path: Path | str, kind: int) -> str:
    what = next((name for test, name in _KINDS if test(kind)), "no regular file")
    return f"{escaped(str(path))}: is {what} where a file is due; move it away"


def _too_deep(name: Path | str, depth: int) -> str:
    return f"{escaped(str(name))}: lists and objects are nested deeper than {depth}"
