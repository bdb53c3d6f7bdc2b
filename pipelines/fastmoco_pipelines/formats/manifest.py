"""manifest.json: what was packed into a folder. One entry per set ("train", "test"), so that sets
share their classes.

{"format": "fastmoco-manifest", "version": 1, "sets": {"train": {
    "samples": 1437, "classes": ["0", ...], "class_counts": [142, ...],
    "shards": [{"name": "train-000000.tar", "samples": 1437, "bytes": ..., "sha256": "..."}],
    "skipped": [["a/b.gif", "reason"], ...], "options": {...}}}}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmoco_pipelines.errors import ShardError
from fastmoco_pipelines.files import write_json

FORMAT = "fastmoco-manifest"
VERSION = 1
NAME = "manifest.json"


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
        raise ShardError(f"{where}: is not valid JSON ({error}): pack the images again.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return {}
    if content.get("version") != VERSION:
        raise ShardError(
            f"{where}: has version {content.get('version')!r}, this fastmoco reads {VERSION}."
        )
    sets = content.get("sets")
    if not isinstance(sets, dict) or not all(_is_set(entry) for entry in sets.values()):
        raise ShardError(f"{where}: is broken: pack the images again.")
    return sets


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
                        "there too, or spell out the shards to use, e.g. "
                        f"{name}-{{000000..000003}}.tar."
                    )
                if shard in folder.samples and folder.samples[shard] != count:
                    raise ShardError(
                        f"{shard}: {folder.samples[shard]} samples, but {count} in {NAME}: pack it "
                        "again."
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
