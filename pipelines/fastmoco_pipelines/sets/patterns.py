"""Shard patterns: which local files, or which URLs, a pattern names. Nothing here ever starts a
process.

The schemes are an allow-list: local paths, `file:`, and those of `text.STORES`. A URL is only ever
shown without user, password and query: these may hold tokens.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from urllib.parse import unquote, urlsplit

from fastmoco_pipelines.formats.manifest import read_sets
from fastmoco_pipelines.text import AUTHORITY, SCHEME, STORES, redact

MAX_SHARDS = 1_000_000
_BRACES = re.compile(r"\{([^{}]*)\}")


def expand_shards(pattern: str) -> list[Path]:
    """The local shard tars that a pattern names, sorted; see `local_names`."""
    return [Path(name) for name in local_names(pattern)]


def local_names(pattern: str) -> list[str]:
    """The local shard tars that a pattern names, sorted by folder and name.

    Args:
        pattern: a tar, a folder of tars, a glob (`train-*.tar`), a brace pattern
            (`train-{000000..000099}.tar` or `{a,b}.tar`), or one of these after `file:`.

    Raises:
        ValueError: naming the pattern, if it names no file, one of the files it spells out is
            missing, the folder holds several sets, or its scheme is not supported; also for a URL,
            which is no local file.
    """
    if is_remote(pattern):
        raise ValueError(
            f"shards={redact(pattern)!r}: this needs local files: run it where the shards are "
            "stored, and copy what it writes to the server too"
        )
    plain = without_scheme(pattern)
    if os.path.isdir(plain):
        return _tars_of_folder(pattern, Path(plain))
    paths: set[str] = set()
    for name in [plain] if os.path.exists(plain) else expand_braces(pattern, plain):
        if os.path.isfile(name):
            paths.add(name)
        elif glob.has_magic(name):
            paths.update(_matches(name))
        else:
            raise ValueError(f"shards={redact(pattern)!r}: there is no file {redact(name)}")
    if not paths:
        raise ValueError(
            f"shards={redact(pattern)!r}: no file has such a name (folder searched: "
            f"{redact(str(Path(plain).parent))})"
        )
    return _sorted(paths)


def is_remote(pattern: str) -> bool:
    """Whether a pattern names URLs that are read over a network; refuses schemes that are not read
    at all.

    Raises:
        ValueError: for a scheme outside the allow-list, or a URL that is broken.
    """
    if pattern.startswith("{") and "://" in pattern:
        kinds = {is_remote(name) for name in expand_braces(pattern, pattern)}
        if len(kinds) > 1:
            raise ValueError(
                f"shards={redact(pattern)!r}: names both local files and URLs: copy all to one side"
            )
        return True in kinds
    match = SCHEME.match(pattern)
    if match is None or os.path.exists(pattern):
        return False
    scheme = match.group(1).lower()
    if scheme == "file":
        return False
    if scheme == "pipe":
        raise ValueError("shards='pipe:...': refused: a shard pattern never starts a command")
    if scheme not in STORES:
        *others, last = (f"{known}://" for known in STORES)
        raise ValueError(
            f"shards={scheme + ':...'!r}: reading over {scheme} is not supported yet: give a path, "
            f"file:, {', '.join(others)} or {last}, or copy or mount the shards"
        )

    # A URL must be complete: a typo must not become the name of a local file.
    authority = re.split(r"[/?#]", pattern[match.end() :].removeprefix("//"), maxsplit=1)[
        0
    ].rpartition("@")[2]
    whole = pattern[match.end() :].startswith("//") and AUTHORITY.fullmatch(authority) is not None
    if not whole or not pattern.isascii() or not pattern.isprintable() or " " in pattern:
        raise ValueError(
            f"shards={redact(pattern)!r}: is not a complete URL, such as https://host/folder/train-000000.tar"
        )
    return True


def without_scheme(pattern: str) -> str:
    """The local path of a pattern: the part after `file:`, or the pattern itself."""
    match = SCHEME.match(pattern)
    if match is None or os.path.exists(pattern) or match.group(1).lower() != "file":
        return pattern
    url = urlsplit(pattern.replace("?", "%3F").replace("#", "%23"))
    if url.netloc in ("", "localhost"):
        return unquote(url.path)
    raise ValueError(
        f"shards={redact(pattern)!r}: a file: URL names a file of this machine: file:///path"
    )


def expand_braces(pattern: str, text: str) -> list[str]:
    """`{000..007}` counts with its zeros kept, `{a,b}` lists; the first braces are expanded, then
    the rest.

    Raises:
        ValueError: naming `pattern`, for a range that does not rise or more than a million names.
    """
    names = list(islice(_expanded(pattern, text), MAX_SHARDS + 1))
    if len(names) > MAX_SHARDS:
        raise ValueError(f"shards={redact(pattern)!r}: names more than {MAX_SHARDS} shards")
    return names


def _expanded(pattern: str, text: str) -> Iterator[str]:
    """The names one by one: three ranges of a thousand make more than memory holds."""
    match = _BRACES.search(text)
    if match is None:
        yield text
        return
    low, dots, high = match.group(1).partition("..")
    if dots:
        if not (
            low.isdecimal()
            and high.isdecimal()
            and len(low + high) < 40
            and int(low) <= int(high)
            and int(high) - int(low) < MAX_SHARDS
        ):
            raise ValueError(
                f"shards={redact(pattern)!r}: {match.group(0)} is not a rising range of numbers "
                "like {000..127}"
            )
        width = max(len(low), len(high)) if low.startswith("0") or high.startswith("0") else 0
        parts: Iterable[str] = (f"{number:0{width}d}" for number in range(int(low), int(high) + 1))
    else:
        parts = match.group(1).split(",")
    for part in parts:
        yield from _expanded(pattern, text[: match.start()] + part + text[match.end() :])


def _tars_of_folder(pattern: str, folder: Path) -> list[str]:
    sets = read_sets(folder)
    if len(sets) > 1:
        names = " or ".join(f"{folder}/{name}-*.tar" for name in sorted(sets))
        raise ValueError(f"shards={pattern!r}: the folder holds several sets: name one, {names}")
    found = list(_files(str(folder), "*.tar"))
    if not found:
        raise ValueError(
            f"shards={pattern!r}: the folder holds no .tar; a folder of images is given to training with --data.images"
        )
    return _sorted(found)


def _matches(pattern: str) -> Iterator[str]:
    """The files that a glob names."""
    folder, name = os.path.split(pattern)
    folders = glob.glob(folder) if glob.has_magic(folder) else [folder]
    return (path for found in folders for path in _files(found, name))


def _files(folder: str, pattern: str) -> Iterator[str]:
    """The files of a folder whose names fit a pattern; as `glob`, but a directory entry says that
    it is a file, so that a hundred thousand need no further look."""
    hidden = pattern.startswith(".")
    with suppress(OSError), os.scandir(folder or ".") as items:
        for item in items:
            fits = fnmatch.fnmatchcase(item.name, pattern)
            if fits and (hidden or not item.name.startswith(".")) and item.is_file():
                yield os.path.join(folder, item.name)


def _sorted(names: Iterable[str]) -> list[str]:
    found = list(names)
    several = len({os.path.dirname(name) for name in found}) > 1
    return sorted(found, key=(lambda name: Path(name).parts) if several else None)
