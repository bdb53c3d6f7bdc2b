"""Shard patterns: which local files, or which URLs, a pattern names. Nothing here ever starts a
process.

The schemes are an allow-list: local paths, `file:`, and those of `text.STORES`. A URL is only ever
shown without user, password and query: these may hold tokens.
"""

from __future__ import annotations

import glob
import os
import re
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from urllib.parse import unquote, urlsplit

from fastmoco_pipelines.errors import ShardError
from fastmoco_pipelines.files.whole import at_home
from fastmoco_pipelines.formats.manifest import MOVING, read_moving
from fastmoco_pipelines.sets.folder_sets import (
    files_of,
    folders_of,
    pattern_of,
    refuse_odd,
    sets_of_folder,
)
from fastmoco_pipelines.text import AUTHORITY, SCHEME, STORES, escaped, redact, variable_hint

MAX_BRACES = 64
"""Opening braces of a pattern."""
MAX_SHARDS = 1_000_000
_MOVE_SECONDS = 3.0
_BRACES = re.compile(r"\{([^{}]*)\}")
# Control characters, and bytes of a command line that are no text.
_UNFIT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_COMPRESSED = re.compile(r"\.(tgz|tbz2?|txz|tar\.(gz|bz2|xz|zst))$", re.IGNORECASE)


def expand_shards(pattern: str, *, several: bool = False, moving: bool = False) -> list[Path]:
    """The local shard tars that a pattern names, sorted; see `local_names`."""
    return [Path(name) for name in local_names(pattern, several=several, moving=moving)]


def local_names(pattern: str, *, several: bool = False, moving: bool = False) -> list[str]:
    """The local shard tars that a pattern names, sorted by folder and name.

    Args:
        pattern: a tar, a folder of tars, a glob (`train-*.tar`), a brace pattern
            (`train-{000000..000099}.tar` or `{a,b}.tar`), or one of these after `file:`. Parts of
            the path that exist are taken as they are: a folder may be named `My set [v1]`. `~` is
            the home folder, unless something of this name exists.
        several: whether a folder may hold several sets.
        moving: whether some of the files may just be moved to their place.

    Raises:
        ShardError: if a set of theirs is being moved to its place, or was when that was killed.
        ValueError: naming the pattern, if it names no file, one of the files it spells out is
            missing, the folder holds several sets, or its scheme is not supported; also for a URL,
            which is no local file.
    """
    if not pattern.strip():
        raise ValueError(
            f"shards={pattern!r}: names nothing: give a path or a pattern; a variable of the shell "
            "may be unset"
        )
    if is_remote(pattern):
        raise ValueError(
            f"shards={redact(pattern)!r}: this needs local files: run it where the shards are "
            "stored, and copy what it writes to the server too"
        )
    plain = without_scheme(pattern)
    if not moving:
        _wait_for_moves(_split_known("", f"{plain}/")[0])
    names = _all_names(pattern, plain, several)
    if not moving:
        _refuse_moving(names)
    return names


def _all_names(pattern: str, plain: str, several: bool) -> list[str]:
    if os.path.isdir(plain):
        return _tars_of_folder(pattern, plain, several)
    if os.path.isfile(plain):
        return [plain]
    _refuse_too_many(pattern, _split_known("", plain)[1])
    names = set(_walked(pattern, "", plain, exact=True))
    if not names:
        raise ValueError(
            f"shards={redact(pattern)!r}: no file has such a name (folder searched: "
            f"{_shown(str(Path(plain).parent))}){variable_hint(plain)}"
        )
    return _sorted(names)


def _wait_for_moves(folder: str) -> None:
    """Wait for a process that moves shards into a folder, which takes moments."""
    deadline = time.monotonic() + _MOVE_SECONDS
    while os.path.exists(os.path.join(folder, MOVING)) and time.monotonic() < deadline:
        time.sleep(0.1)


def _refuse_moving(names: Iterable[str]) -> None:
    """Refuse shards of a set of which only a part is in its place.

    Raises:
        ShardError: with the cure.
    """
    folders: dict[str, set[str]] = {}
    for name in names:
        folder, tar = os.path.split(name)
        folders.setdefault(folder, set()).add(tar)
    for folder, tars in folders.items():
        moving = read_moving(Path(folder))
        if moving is not None and tars & {
            *moving["old"],
            *(shard["name"] for shard in moving["entry"]["shards"]),
        }:
            raise ShardError(
                f"{folder or '.'}: the shards of set {moving['set']!r} are being moved to their "
                "place, or were when that was killed: run the same `fastmoco data pack` again, "
                "which finishes it."
            )


def spells_out(pattern: str) -> bool:
    """Whether a local pattern gives each name: other shards beside them are left out on purpose."""
    plain = without_scheme(pattern)
    return os.path.isfile(plain) or "{" in _split_known("", plain)[1]


def sets_of(pattern: str) -> list[tuple[str, str]]:
    """Name and pattern of each set of a folder that holds several; for all other patterns one set
    without a name."""
    if not is_remote(pattern) and os.path.isdir(folder := without_scheme(pattern)):
        groups = sets_of_folder(folder)
        if len(groups) > 1:
            return [(name, pattern_of(paths)) for name, paths in groups.items()]
    return [("", pattern)]


def is_remote(pattern: str) -> bool:
    """Whether a pattern names URLs that are read over a network; refuses schemes that are not read
    at all.

    Raises:
        ValueError: for a scheme outside the allow-list, or a URL that is broken.
    """
    if pattern.startswith("{") and "://" in pattern:
        names = expand_braces(pattern, pattern)
        if any(name.startswith("{") for name in names):
            raise ValueError(f"shards={redact(pattern)!r}: a brace is not closed")
        kinds = {is_remote(name) for name in names}
        if len(kinds) > 1:
            raise ValueError(
                f"shards={redact(pattern)!r}: names both local files and URLs: copy all to one side"
            )
        return True in kinds
    match = SCHEME.match(pattern)
    if match is None or os.path.exists(pattern) or _is_in_a_folder(pattern, match.end()):
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
    if not whole or _UNFIT.search(pattern):
        raise ValueError(
            f"shards={redact(pattern)!r}: is not a complete URL, such as https://host/folder/train-000000.tar"
        )
    return True


def without_scheme(pattern: str) -> str:
    """The local path of a pattern: the part after `file:`, or the pattern itself; `~` replaced.

    Raises:
        ValueError: for a URL of another machine, or the home of a user who does not exist.
    """
    match = SCHEME.match(pattern)
    if match is None or os.path.exists(pattern) or match.group(1).lower() != "file":
        return at_home(pattern)
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
    _refuse_too_many(pattern, text)
    return list(_expanded(pattern, text))


def _refuse_too_many(pattern: str, text: str) -> None:
    if text.count("{") > MAX_BRACES:
        raise ValueError(f"shards={redact(pattern)!r}: has more than {MAX_BRACES} braces")
    # Sixty lists would take minutes to count.
    names = islice(_expanded(pattern, text), MAX_SHARDS + 1)
    if _product(text) > MAX_SHARDS or sum(1 for _ in names) > MAX_SHARDS:
        raise ValueError(f"shards={redact(pattern)!r}: names more than {MAX_SHARDS} shards")


def _product(text: str) -> int:
    """The lengths of all lists and ranges, multiplied: how many names there are, unless braces
    within others make up a further range."""
    product = 1
    found = _BRACES.search(text)
    while found is not None:
        inside = found[1]
        low, _, high = inside.partition("..")
        if _is_range(low, high):
            product *= int(high) - int(low) + 1
        else:
            product *= inside.count(",") + 1
        text = text[: found.start()] + text[found.end() :]  # its commas are not those around it
        found = _BRACES.search(text)
    return product


def _expanded(pattern: str, text: str) -> Iterator[str]:
    """The names one by one: three ranges of a thousand make more than memory holds."""
    match = _lists(text)
    if match is None:
        yield text
        return
    for name in _alternatives(pattern, text, match):
        yield from _expanded(pattern, name)


def _alternatives(pattern: str, text: str, match: re.Match[str]) -> Iterator[str]:
    """The text with each of the parts that one pair of braces stands for."""
    low, dots, high = match.group(1).partition("..")
    if dots:
        if not _is_range(low, high):
            raise ValueError(
                f"shards={redact(pattern)!r}: {match.group(0)} is not a rising range of numbers "
                "like {000..127}"
            )
        width = max(len(low), len(high)) if low.startswith("0") or high.startswith("0") else 0
        parts: Iterable[str] = (f"{number:0{width}d}" for number in range(int(low), int(high) + 1))
    else:
        parts = match.group(1).split(",")
    return (text[: match.start()] + part + text[match.end() :] for part in parts)


def _is_range(low: str, high: str) -> bool:
    numbers = low.isdecimal() and high.isdecimal() and len(low + high) < 40
    return numbers and 0 <= int(high) - int(low) < MAX_SHARDS


def _lists(text: str) -> re.Match[str] | None:
    """The first braces that count or list; around anything else they are part of a name, as in a
    shell."""
    marks = (",", "..", "://")
    found = _BRACES.finditer(text)
    return next((braces for braces in found if any(mark in braces[1] for mark in marks)), None)


def _tars_of_folder(pattern: str, folder: str, several: bool) -> list[str]:
    groups = sets_of_folder(folder)
    if len(groups) > 1 and not several:
        names = " or ".join(_shown(pattern_of(paths)) for paths in groups.values())
        raise ValueError(f"shards={pattern!r}: the folder holds several sets: name one, {names}")
    if not groups:
        packed = [name for name in os.listdir(folder or ".") if _COMPRESSED.search(name)]
        what = (
            f" but compressed ones ({_shown(min(packed))}): unpack them to plain .tar"
            if packed
            else "; a folder of images is given to training with --data.images"
        )
        raise ValueError(f"shards={pattern!r}: the folder holds no .tar{what}")
    return _sorted(path for paths in groups.values() for path in paths)


def _walked(pattern: str, folder: str, rest: str, *, exact: bool) -> Iterator[str]:
    """The files that a pattern names below a folder, part by part: what exists is taken as it is,
    then braces are expanded, then a glob is matched.

    Args:
        pattern: for messages.
        folder: exists; its name ends with a slash, or is empty.
        rest: of the pattern.
        exact: whether a file that does not exist is an error; not below the folders of a glob.
    """
    if not folder:
        rest = at_home(rest)  # after braces, as in a shell
    known, rest = _split_known(folder, rest)
    folder += known
    part, slash, below = rest.partition("/")
    braces = _lists(rest)
    if not slash and os.path.isfile(folder + rest):
        yield folder + rest
    elif braces is not None and braces.start() < len(part):
        for text in _alternatives(pattern, rest, braces):
            yield from _walked(pattern, folder, text, exact=exact)
    elif glob.has_magic(part) and slash:
        for found in folders_of(folder, part):
            yield from _walked(pattern, f"{found}/", below.lstrip("/"), exact=False)
    elif glob.has_magic(part):
        yield from files_of(folder, part)
    elif exact:
        name = folder + rest
        if os.path.isdir(name):
            raise ValueError(
                f"shards={redact(pattern)!r}: {_shown(name)} is a folder, and a pattern names "
                "tars: give the folder alone, or *.tar below it"
            )
        refuse_odd(name)
        raise ValueError(
            f"shards={redact(pattern)!r}: there is no file {_shown(name)}{variable_hint(name)}"
        )


def _split_known(folder: str, text: str) -> tuple[str, str]:
    """The folders at the beginning of a path that exist, and the rest of it."""
    end = 0
    while (slash := text.find("/", end)) >= 0 and os.path.isdir(folder + text[: slash + 1]):
        end = slash + 1
    return text[:end], text[end:]


def _is_in_a_folder(pattern: str, end: int) -> bool:
    """Whether what looks like a scheme, up to `end`, begins the name of an existing folder: `a:b`."""
    first, slash, _ = pattern.partition("/")
    return bool(slash) and not pattern[end:].startswith("/") and os.path.isdir(first)


def _shown(name: str) -> str:
    return escaped(redact(name))


def _sorted(names: Iterable[str]) -> list[str]:
    found = list(names)
    several = len({os.path.dirname(name) for name in found}) > 1
    return sorted(found, key=(lambda name: Path(name).parts) if several else None)
