"""Which sets a folder of tars holds, and a pattern that names exactly some tars."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from fastmoco_pipelines.files.small import open_regular
from fastmoco_pipelines.formats.manifest import read_sets
from fastmoco_pipelines.text import escaped

_PART = re.compile(
    r"(train|training|val|valid|validation|test|testing|eval|evaluation|dev|holdout|held[-_ ]?out"
    r"|unlabell?ed|train(ing)?[-_+ ]?val(id)?|extra|query|gallery)"
    r"([-_ .]?(set|split|part|data|images?|imgs?|photos?))?([-_ .]?\d{1,8})?",
    re.IGNORECASE,
)
_TRAINING = re.compile(r"train(?!.*val)", re.IGNORECASE)


def is_part(name: str) -> bool:
    """Whether a folder or a set is named like a part of a data set: train, val2017, test_images."""
    return _PART.fullmatch(name) is not None


def is_training_part(name: str) -> bool:
    """Whether a name is that of the part to train on."""
    return is_part(name) and _TRAINING.match(name) is not None


def set_name(tar: str) -> str:
    """The name of a tar's set: its own without number and ending; "" for a number alone."""
    return re.sub(r"[-_.]?\d+$", "", tar.removesuffix(".tar"))


def sets_of_folder(folder: str) -> dict[str, list[str]]:
    """The tars of a folder by set, sorted; none without tars.

    A set is what the manifest lists as one. Tars that it does not list belong to a set by their
    names, where these are names of parts, such as train and test; all others are one set.

    Raises:
        ShardError: if the manifest is broken.
    """
    listed = {
        shard["name"]: name
        for name, entry in read_sets(Path(folder)).items()
        for shard in entry["shards"]
    }
    groups: dict[str, list[str]] = {}
    for path in files_of(folder, "*.tar"):
        name = os.path.basename(path)
        groups.setdefault(listed.get(name) or set_name(name), []).append(path)

    # One folder for each class, or any other names: one set, unless there are parts beside them.
    known = set(listed.values())
    loose = [name for name in groups if name not in known and not is_part(name)]
    rest = sorted(path for name in loose for path in groups.pop(name))
    if rest:
        name = loose[0] if len(loose) == 1 else "other"
        groups[name if groups else ""] = rest
    return {name: sorted(groups[name]) for name in sorted(groups)}


def pattern_of(names: Sequence[str]) -> str:
    """A pattern that names exactly these existing tars, in one folder or several; as short as the
    other tars of the folders allow.

    Raises:
        ValueError: if there is none, because names contain braces or commas.
    """
    folders: dict[str, set[str]] = {}
    for name in names:
        folder, tar = os.path.split(name)
        folders.setdefault(folder, set()).add(tar)
    parts = [
        os.path.join(folder, part)
        for folder, tars in folders.items()
        for part in _short(folder, sorted(tars))
    ]
    if len(parts) == 1:
        return parts[0]
    if any(re.search(r"[{},]", part) for part in parts):
        raise ValueError(
            f"shards={parts[0]!r}, ...: {len(names)} names with commas or braces cannot be one "
            "pattern: give the folder, or a pattern in quotes"
        )
    return "{" + ",".join(parts) + "}"


def _short(folder: str, tars: list[str]) -> list[str]:
    """The tars of one folder as one pattern below it, or one by one."""
    # A glob, if it matches no other tar.
    stem = _common(tars[0].removesuffix(".tar"), tars[-1].removesuffix(".tar"))
    stem = stem.rstrip("0123456789")
    whole = stem[-1:] in ("-", "_", ".")
    if len(tars) == 1 and not whole:
        return tars
    for pattern in ([f"{stem}*.tar"] if whole else []) + ["*.tar", f"{stem}*.tar"]:
        if pattern.count("*") == 1 and not re.search(r"[\[\]?{}]", pattern):
            found = {os.path.basename(path) for path in files_of(folder, pattern)}
            if found == set(tars):
                return [pattern]

    if len(tars) == 1:
        return tars

    # Numbers in a row, or one by one.
    ends = [re.fullmatch(r"(\d+)\.tar", tar[len(stem) :]) for tar in tars]
    numbers = [end[1] for end in ends if end is not None]
    plain = len(numbers) == len(tars) and len({*map(len, numbers)}) == 1
    if plain and not glob.has_magic(stem) and not re.search(r"[{}]", stem):
        if int(numbers[-1]) - int(numbers[0]) == len(tars) - 1:
            return [f"{stem}{{{numbers[0]}..{numbers[-1]}}}.tar"]
        return [f"{stem}{{{','.join(numbers)}}}.tar"]
    if any(re.search(r"[{},]", tar) for tar in tars):
        return tars
    return ["{" + ",".join(tars) + "}"]


def _common(first: str, last: str) -> str:
    """What two names, and all that are sorted between them, begin with."""
    same = next(
        (i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), None
    )
    return first[:same] if same is not None else min(first, last, key=len)


def files_of(folder: str, pattern: str) -> Iterator[str]:
    """The files of a folder whose names fit a glob; as `glob`, but a directory entry shows that it
    is a file, so that a hundred thousand need no further look.

    Raises:
        ValueError: for a named pipe, a device, a socket or a link to nothing or to what cannot be
            read, which would be left out unnoticed.
    """
    for path, is_file in _entries(folder, pattern):
        if is_file:
            yield path
        else:
            refuse_odd(path)


def refuse_odd(path: str) -> None:
    """Refuse what has the name of a file and is neither that nor a folder.

    Raises:
        ValueError: names it and the cure.
    """
    if os.path.isdir(path) or not os.path.lexists(path):
        return
    try:
        os.close(open_regular(path))
    except FileNotFoundError:
        raise ValueError(
            f"{escaped(path)}: is a link to nothing: remove it, bring back the file that it names, or "
            "spell out the shards to use, e.g. train-{000000..000003}.tar"
        ) from None
    except OSError as error:
        raise ValueError(
            f"{escaped(path)}: cannot be read ({error.strerror}): make it readable, or remove it"
        ) from None


def folders_of(folder: str, pattern: str) -> list[str]:
    """The folders in a folder whose names fit a glob, sorted; also links to folders."""
    return sorted(
        path for path, is_file in _entries(folder, pattern) if not is_file and os.path.isdir(path)
    )


def _entries(folder: str, pattern: str) -> Iterator[tuple[str, bool]]:
    hidden = pattern.startswith(".")
    with suppress(OSError), os.scandir(folder or ".") as items:
        for item in items:
            fits = fnmatch.fnmatchcase(item.name, pattern)
            if fits and (hidden or not item.name.startswith(".")):
                yield os.path.join(folder, item.name), _is_file(item)


def _is_file(item: os.DirEntry[str]) -> bool:
    """False also for a link that cannot be followed: to itself, or into a closed folder."""
    try:
        return item.is_file()
    except OSError:
        return False
