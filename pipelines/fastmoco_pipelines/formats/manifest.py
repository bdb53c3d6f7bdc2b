"""manifest.json: what was packed into a folder. One entry per set ("train", "test"), so that sets
share their classes.

{"format": "fastmoco-manifest", "version": 1, "sets": {"train": {
    "samples": 1437, "classes": ["0", ...], "class_counts": [142, ...],
    "shards": [{"name": "train-000000.tar", "samples": 1437, "bytes": ..., "sha256": "..."}],
    "skipped": [["a/b.gif", "reason"], ...], "options": {...}}}}
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmoco_pipelines.errors import ShardError
from fastmoco_pipelines.files import write_json

FORMAT = "fastmoco-manifest"
VERSION = 1
NAME = "manifest.json"
MOVING = ".fastmoco-moving.json"
"""In a folder of shards: what a process is just moving there; see `making.one_writer`."""
_CURE = "move it away, and pack the images or index the tars again"


def read_sets(folder: Path) -> dict[str, dict[str, Any]]:
    """The sets of a folder's manifest by name; empty where the folder has none.

    Raises:
        ShardError: if the manifest is broken.
    """
    try:
        text = (folder / NAME).read_bytes()
    except FileNotFoundError:
        return {}
    return parse_sets(str(folder / NAME), text)


def own_sets(folder: Path) -> dict[str, dict[str, Any]]:
    """The sets of a folder's manifest, which may be written again.

    Raises:
        ShardError: as of `read_sets`; or if the file is another program's.
    """
    sets = read_sets(folder)
    if not sets and (folder / NAME).exists():
        content = json.loads((folder / NAME).read_bytes())
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
        content = json.loads((folder / MOVING).read_bytes())
        entry = content["entry"]
        names = [content["set"], content["folder"], *content["old"]]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    names += [shard["name"] for shard in entry["shards"]] if _is_set(entry) else [None]
    good = all(isinstance(name, str) and Path(name).name == name for name in names)
    return content if good else None


def parse_sets(where: str, text: bytes) -> dict[str, dict[str, Any]]:
    """The sets of a manifest by name; empty for a manifest.json of another program.

    Args:
        where: what errors call it.
        text: its content.

    Raises:
        ShardError: if the manifest is broken.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ShardError(
            f"{where}: is not valid JSON ({error}): copy it again from where it was written; else "
            f"{_CURE}."
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return {}
    if content.get("version") != VERSION:
        raise ShardError(
            f"{where}: has version {content.get('version')!r}, this fastmoco reads {VERSION}: "
            f"update fastmoco; else {_CURE}."
        )
    sets = content.get("sets")
    if not isinstance(sets, dict) or not all(_is_set(entry) for entry in sets.values()):
        raise ShardError(f"{where}: is broken: {_CURE}.")
    for entry in sets.values():
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
        ShardError: if a listed shard is missing, holds other samples than listed, or the sets'
            classes differ.
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
                if shard in folder.samples and folder.samples[shard] != count:
                    raise ShardError(
                        f"{shard}: {folder.samples[shard]} samples, but {count} in {NAME}: run "
                        "`fastmoco data index` on the shards, which corrects it, or pack it again."
                    )
            if classes and tuple(entry["classes"]) != classes:
                raise ShardError(
                    f"{folder.where}/{NAME}: set {name!r} numbers its classes differently: use one "
                    "at a time."
                )
            classes = tuple(entry["classes"])
    return classes


def write_sets(folder: Path, sets: dict[str, dict[str, Any]]) -> Path:
    """Write the manifest of a folder, whole or not at all."""
    return write_json(folder / NAME, {"format": FORMAT, "version": VERSION, "sets": sets})


def _is_set(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    classes = entry.get("classes")
    shards = entry.get("shards")
    return (
        isinstance(classes, list)
        and all(isinstance(name, str) for name in classes)
        and isinstance(shards, list)
        and all(isinstance(shard, dict) and isinstance(shard.get("name"), str) for shard in shards)
    )
