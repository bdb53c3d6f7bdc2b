"""manifest.json: what was packed into a folder. One entry per set ("train", "test"), so that sets share their classes.

{"format": "fastmoco-manifest", "version": 1, "sets": {"train": {
    "samples": 1437, "classes": ["0", ...], "class_counts": [142, ...],
    "shards": [{"name": "train-000000.tar", "samples": 1437, "bytes": ..., "sha256": "..."}],
    "skipped": [["a/b.gif", "reason"], ...], "options": {...}}}}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastmoco_pipelines.index import ShardError, write_json

FORMAT = "fastmoco-manifest"
VERSION = 1
NAME = "manifest.json"


def read_sets(folder: Path) -> dict[str, dict[str, Any]]:
    """The sets of a folder's manifest by name; empty where the folder has none.

    Raises:
        ShardError: if the manifest is broken.
    """
    path = folder / NAME
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{path}: is no valid JSON ({error}): pack the images again.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return {}  # somebody else's manifest.json
    if content.get("version") != VERSION:
        raise ShardError(f"{path}: has version {content.get('version')!r}, this fastmoco reads {VERSION}.")
    sets = content.get("sets")
    if not isinstance(sets, dict) or not all(_is_set(entry) for entry in sets.values()):
        raise ShardError(f"{path}: is broken: pack the images again.")
    return sets


def write_sets(folder: Path, sets: dict[str, dict[str, Any]]) -> Path:
    """Write the manifest of a folder, replacing an older one in one go."""
    return write_json(folder / NAME, {"format": FORMAT, "version": VERSION, "sets": sets})


def _is_set(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    classes, shards = entry.get("classes"), entry.get("shards")
    return (
        isinstance(classes, list)
        and all(isinstance(name, str) for name in classes)
        and isinstance(shards, list)
        and all(isinstance(shard, dict) and isinstance(shard.get("name"), str) for shard in shards)
    )
