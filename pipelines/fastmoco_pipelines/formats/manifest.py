"""manifest.json: what was packed into a folder. One entry per set ("train", "test"), so that sets
share their classes.

{"format": "fastmoco-manifest", "version": 1, "sets": {"train": {
    "samples": 1437, "classes": ["0", ...], "class_counts": [142, ...],
    "shards": [{"name": "train-000000.tar", "samples": 1437, "bytes": ..., "sha256": "..."}],
    "skipped": [["a/b.gif", "reason"], ...], "options": {...}}}}

All but `classes` and the names of the shards may be absent, as from other programs. What is there is
of these types and in range: nothing of a file that may come from anybody becomes a path or a size
unchecked. It has no hash of its own, since people edit it; its counts are compared with the indexes.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmoco_pipelines.errors import ShardError
from fastmoco_pipelines.files.small import UnfitFileError, json_of, read_json, read_small, reason_of
from fastmoco_pipelines.files.whole import OWN_TROUBLE, write_file
from fastmoco_pipelines.formats.members import is_skipped
from fastmoco_pipelines.formats.paths import is_file_name

FORMAT = "fastmoco-manifest"
VERSION = 1
NAME = "manifest.json"
MAX_BYTES = 256 << 20
"""Largest manifest, in bytes: a million shards, or three million files that were not packed."""
MOVING = ".fastmoco-moving.json"
"""In a folder of shards: what a process is just moving there; see `making.one_writer`."""
_MANY_SKIPPED = 100_000
HIDDEN = ".packing-"
"""What the name of a folder begins with from which shards are moved."""
_AGAIN = "pack the images or index the tars again"
_CURE = f"move it away, and {_AGAIN}"
_SHA256 = re.compile("[0-9a-f]{64}")
_MOST = {"samples": 2**32 - 1, "bytes": 2**62}
"""Numbers of a shard, and the largest of each."""


def read_sets(folder: Path) -> dict[str, dict[str, Any]]:
    """The sets of a folder's manifest by name; empty where the folder has none.

    Raises:
        ShardError: if the manifest is broken, or cannot be read.
    """
    try:
        text = read_small(folder / NAME, MAX_BYTES)
    except FileNotFoundError:
        return {}
    except UnfitFileError as error:
        raise ShardError(f"{error}; {_AGAIN}.") from error
    except OSError as error:
        if error.errno in OWN_TROUBLE:
            raise
        raise ShardError(
            f"{folder / NAME}: cannot be read ({error.strerror}): make it readable, or {_CURE}."
        ) from error
    return parse_sets(str(folder / NAME), text)


def own_sets(folder: Path) -> dict[str, dict[str, Any]]:
    """The sets of a folder's manifest, which may be written again.

    Raises:
        ShardError: as of `read_sets`; or if the file is another program's.
    """
    sets = read_sets(folder)
    if not sets and (folder / NAME).exists():
        content = read_json(folder / NAME, MAX_BYTES)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ShardError(
                f"{folder / NAME}: was written by another program, and the names of classes and "
                "shards need this place: move it away, or choose another folder."
            )
    return sets


def read_moving(folder: Path) -> dict[str, Any] | None:
    """What a process is moving into a folder of shards, or was when it was killed; None for
    nothing: `{"set": name, "entry": of the manifest, "folder": where from, "old": shard names}`."""
    try:
        content = read_json(folder / MOVING, MAX_BYTES, follow=False)
        name, entry, made = content["set"], content["entry"], content["folder"]
        tars = [*content["old"], *(shard["name"] for shard in entry["shards"])]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    # It has files removed and moved: tars of this folder alone, from a folder made for that.
    good = set_problem(name, entry) is None and isinstance(made, str) and is_file_name(made)
    good = good and made.startswith(HIDDEN) and not (folder / made).is_symlink()
    return content if good and all(is_file_name(t) and t.endswith(".tar") for t in tars) else None


def parse_sets(where: str, text: bytes) -> dict[str, dict[str, Any]]:
    """The sets of a manifest by name; empty for a manifest.json of another program.

    Args:
        where: what errors call it.
        text: its content.

    Raises:
        ShardError: if the manifest is broken.
    """
    try:
        content = json_of(text, where)
    except UnfitFileError as error:
        raise ShardError(
            f"{where}: is not valid JSON ({reason_of(error, where)}): copy it again from where it "
            f"was written; else {_CURE}."
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return {}
    if content.get("version") != VERSION:
        raise ShardError(
            f"{where}: has version {content.get('version')!a:.40}, this fastmoco reads {VERSION}: "
            f"update fastmoco; else {_CURE}."
        )
    sets = content.get("sets")
    if not isinstance(sets, dict):
        raise ShardError(f"{where}: 'sets' is not an object; the file is broken: {_CURE}.")
    for name, entry in sets.items():
        if problem := set_problem(name, entry):
            raise ShardError(f"{where}: {problem}; the file is broken: {_CURE}.")
        names = [one_form(name) for name in entry["classes"]]
        if len(set(names)) == len(names):
            entry["classes"] = names
    return sets


def one_form(name: str) -> str:
    """A class name in the Unicode form NFC: file systems and archives differ in the forms in which
    they keep one name."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderOfShards:
    """The shards in use of one folder, and the content of its manifest."""

    where: str
    """The folder, as errors call it."""
    sets: dict[str, dict[str, Any]]
    """Its manifest, by set."""
    samples: dict[str, int]
    """Samples of each shard in use, by file name."""
    present: Callable[[str], bool]
    """Whether the folder holds a file of this name, in use or not."""


def check_folders(folders: Iterable[FolderOfShards]) -> tuple[str, ...]:
    """Class names from the manifests beside the shards, after checking that no shard of a packed
    set is lost.

    Raises:
        ShardError: if a listed shard is missing, holds other samples than listed, the counts of a
            set do not add up, or the sets' classes differ.
    """
    classes: tuple[str, ...] = ()
    for folder in folders:
        for name, entry in folder.sets.items():
            listed = {shard["name"]: shard.get("samples") for shard in entry["shards"]}
            if not folder.samples.keys() & listed.keys():
                continue
            for shard, count in listed.items():
                if shard not in folder.samples and not folder.present(shard):
                    raise ShardError(
                        f"{shard}: is listed in {NAME} but missing in {folder.where}: copy it "
                        "there too; or, for a new run, spell out the shards to use, e.g. "
                        f"{name}-{{000000..000003}}.tar."
                    )
                if count is not None and folder.samples.get(shard, count) != count:
                    raise ShardError(
                        f"{shard}: {folder.samples[shard]} samples, but {count} in {NAME}: run "
                        "`fastmoco data index` on the shards, which corrects it, or pack it again."
                    )
            counts = [count for count in listed.values() if count is not None]
            whole = len(counts) == len(listed)  # else the total is not known
            total, labelled = sum(counts), sum(entry.get("class_counts", ()))
            if whole and (entry.get("samples", total) != total or labelled > total):
                raise ShardError(
                    f"{folder.where}/{NAME}: set {name!r} has {entry.get('samples')} samples, "
                    f"{labelled} of them of a class, and its shards {total}: {_CURE}."
                )
            if classes and tuple(entry["classes"]) != classes:
                raise ShardError(
                    f"{folder.where}/{NAME}: set {name!r} numbers its classes differently: use one "
                    "at a time."
                )
            classes = tuple(entry["classes"])
    return classes


def write_sets(folder: Path, sets: dict[str, dict[str, Any]]) -> Path:
    """Write the manifest of a folder, whole or not at all. Of very many files that were not packed
    it lists the first ones and counts the others.

    Raises:
        ShardError: for a set that no reader would take, e.g. one named `..`.
    """
    for name, entry in sets.items():
        if problem := set_problem(name, entry):
            raise ShardError(f"{folder / NAME}: is not written: {problem}.")
    content = _content(sets)
    if len(content) > MAX_BYTES:
        content = _content({name: _shortened(entry) for name, entry in sets.items()})
    return write_file(folder / NAME, content)


def _content(sets: dict[str, dict[str, Any]]) -> bytes:
    content = {"format": FORMAT, "version": VERSION, "sets": sets}
    return json.dumps(content, separators=(",", ":")).encode("ascii")


def _shortened(entry: dict[str, Any]) -> dict[str, Any]:
    skipped = entry.get("skipped", [])
    if len(skipped) <= _MANY_SKIPPED:
        return entry
    more = ["...", f"{len(skipped) - _MANY_SKIPPED} more files are not listed"]
    return entry | {"skipped": [*skipped[:_MANY_SKIPPED], more]}


def set_problem(name: str, entry: Any) -> str | None:
    """What is wrong with a set of a manifest: its field, and what is due there; None if it is
    right."""
    if not is_file_name(name):
        return f"set {name!a:.80}: the name is no name of a file"
    where = f"set {name!a:.80}"
    if not isinstance(entry, dict):
        return f"{where} is not an object"
    classes, shards = entry.get("classes"), entry.get("shards")
    if not isinstance(classes, list) or not all(isinstance(text, str) for text in classes):
        return f"{where}: 'classes' is not a list of names"
    if len(set(classes)) < len(classes):
        return f"{where}: 'classes' names a class twice"
    if not isinstance(shards, list):
        return f"{where}: 'shards' is not a list of objects"
    for number, shard in enumerate(shards):
        if problem := _shard_problem(shard):
            return f"{where}: shard {number}: {problem}"
    if len({shard["name"] for shard in shards}) < len(shards):
        return f"{where}: 'shards' names a shard twice"

    # What is for people, and for other programs.
    if not _is_count(entry.get("samples", 0), 2**62):
        return f"{where}: samples={entry['samples']!a:.40} is not a number of images"
    counts = entry.get("class_counts", [0] * len(classes))
    if not isinstance(counts, list) or not all(_is_count(count, 2**62) for count in counts):
        return f"{where}: 'class_counts' is not a list of numbers of images"
    if len(counts) != len(classes):
        return f"{where}: 'class_counts' has {len(counts)} numbers for {len(classes)} classes"
    if not is_skipped(entry.get("skipped", [])):
        return f"{where}: 'skipped' is not a list of pairs, a file and a reason"
    return None if isinstance(entry.get("options", {}), dict) else f"{where}: 'options': no object"


def _shard_problem(shard: Any) -> str | None:
    if not isinstance(shard, dict):
        return "is not an object"
    name = shard.get("name")
    if not isinstance(name, str) or not is_file_name(name) or ".." in name.split("\\"):
        return f"name={name!a:.80} is not the name of a file: without /, ..\\ and zeros"
    for field, most in _MOST.items():
        if field in shard and not _is_count(shard[field], most):
            return f"{field}={shard[field]!a:.40} is not a whole number from 0 to {most}"
    sha256 = shard.get("sha256", "0" * 64)
    good = isinstance(sha256, str) and _SHA256.fullmatch(sha256)
    return None if good else "'sha256' is not 64 hexadecimal digits in lower case"


def _is_count(value: Any, most: int) -> bool:
    return type(value) is int and 0 <= value <= most
