"""The original files of packed images: their paths below the packed folder, as bytes and as text.

A path is the bytes that the file system has, with `/` between folders, e.g. `cat/IMG_1.jpg`. As
text it is UTF-8 with Python's `surrogateescape`: each byte that is no UTF-8 becomes one of U+DC80
to U+DCFF, so that the way back gives the same bytes, whatever they are. Text that is shown goes
through `text.escaped` first, because a name may contain anything but a zero byte. Nothing here, and
no reader of an index, opens such a path.

`pack_folder` writes the list of a shard as the last member of its tar, so that `index_shards` finds
the paths again where the indexes are lost. Readers of webdataset tars skip a member whose name
begins with a dot, DALI's own too; it counts one without an extension as a sample.

    fastmoco paths 1 SHA256     of what follows, in hexadecimal digits; a newline ends the line
    KEY <tab> PATH <zero>       one for each sample, in the order of the tar
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable

MEMBER = ".fastmoco_paths"
"""Name of the list in a tar."""
MAX_LIST_BYTES = 256 << 20
MAX_FILE_NAME = 255
"""Longest name of a file, in characters: no file system has longer ones."""
DAMAGED = "its list of original files is damaged: the images go by their names in the tar"
_MARK = b"fastmoco paths 1 "


def is_file_name(name: object) -> bool:
    """Whether a value from a file is the name of a file in a folder: text, and no path into another
    folder."""
    if not isinstance(name, str) or name in ("", ".", ".."):
        return False
    try:
        path_bytes(name)
    except UnicodeEncodeError:  # half of a pair, which stands for no byte
        return False
    return len(name) <= MAX_FILE_NAME and "/" not in name and "\0" not in name


def to_path(name: str) -> str:
    """A file's name from the operating system as the text of a path, whatever the locale is."""
    return path_text(os.fsencode(name))


def path_bytes(path: str) -> bytes:
    """The bytes of a path from its text."""
    return path.encode("utf-8", "surrogateescape")


def path_text(data: bytes) -> str:
    """The text of a path from its bytes."""
    return data.decode("utf-8", "surrogateescape")


def to_list(entries: Iterable[tuple[str, str]]) -> bytes:
    """The content of the member, from (key, path) of each sample; a key has no tab."""
    body = b"".join(b"%b\t%b\0" % (key.encode(), path_bytes(path)) for key, path in entries)
    return _MARK + hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def parse_list(data: bytes) -> dict[str, str] | None:
    """Paths by key; None if the content is not a list, or a damaged one."""
    head, _, body = data.partition(b"\n")
    if head != _MARK + hashlib.sha256(body).hexdigest().encode():
        return None
    pairs = (entry.partition(b"\t") for entry in body.split(b"\0") if entry)
    return {path_text(key): path_text(path) for key, _, path in pairs}
