"""The JSON form of an index (`x.tar.index.json`): version 1, which is read and converted, and which
is written for other programs.

{"format": "fastmoco-index", "version": 1, "tar": "x.tar", "tar_bytes": ..., "tar_hash": "...",
 "key": [...], "extension": [...], "offset": [...], "size": [...], "crc32": [...], "label": [...],
 "height": [...], "width": [...], "skipped": [[member, reason], ...], "path": [...],
 "content_hash": "..."}

`path` is absent where the index has none: the path of each original file below the folder that was
packed. One that is not UTF-8, which JSON cannot contain, is an object, {"bytes": BASE64}.
"""

from __future__ import annotations

import base64
import json
from typing import Any

from fastmoco_pipelines.errors import ShardError
from fastmoco_pipelines.files import is_sealed
from fastmoco_pipelines.formats.images import MAX_BYTES
from fastmoco_pipelines.formats.index_file import COLUMNS, CURE, ShardIndex
from fastmoco_pipelines.formats.members import split_name
from fastmoco_pipelines.formats.paths import path_bytes, path_text

FORMAT = "fastmoco-index"
VERSION = 1
JSON_SUFFIX = ".index.json"
_LIMITS = {
    "offset": 2**63,
    "size": MAX_BYTES + 1,
    "crc32": 2**32,
    "label": 2**31,
    "height": 2**16,
    "width": 2**16,
}


def json_content(index: ShardIndex) -> dict[str, Any]:
    """The fields of the JSON form, without `content_hash`."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "tar": index.tar,
        "tar_bytes": index.tar_bytes,
        "tar_hash": index.tar_hash,
        "key": index.keys,
        "extension": index.extensions,
        **index.columns,
        "skipped": index.skipped,
        **({} if index.paths is None else {"path": [*map(path_to_json, index.paths)]}),
    }


def path_to_json(path: str) -> str | dict[str, str]:
    """A path as a value of JSON, for any program: text, or its bytes where they are not UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return {"bytes": base64.b64encode(path_bytes(path)).decode("ascii")}
    return path


def path_from_json(value: Any) -> str:
    """The path of a value that `path_to_json` made.

    Raises:
        ValueError: if it is no such value.
    """
    if isinstance(value, dict):
        value = value.get("bytes")
        if isinstance(value, str):
            return path_text(base64.b64decode(value, validate=True))
    if not isinstance(value, str):
        raise ValueError("neither a text nor bytes")
    return value


def parse_json(name: str, text: bytes) -> ShardIndex:
    """An index from its JSON form, which errors call `name`.

    Raises:
        ShardError: if it is broken.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{name}: is not valid JSON ({error}): {CURE}.") from error
    index = _checked(name, content)
    if "content_hash" not in content:
        raise ShardError(
            f"{name}: has no content_hash, an earlier version of fastmoco wrote it: {CURE}."
        )
    if not is_sealed(text):
        raise ShardError(
            f"{name}: was changed or damaged after it was written (content_hash): {CURE}."
        )
    return index


def _checked(name: str, content: Any) -> ShardIndex:
    """Types, lengths and ranges: a garbled index must never lead to a read at a wrong place."""

    def check(good: bool, what: str) -> None:
        if not good:
            raise ShardError(f"{name}: {what}: {CURE}.")

    check(
        isinstance(content, dict) and content.get("format") == FORMAT, "is not an index of fastmoco"
    )
    check(
        content.get("version") == VERSION,
        f"has version {content.get('version')!r}, this fastmoco reads {VERSION}",
    )
    keys = content.get("key")
    extensions = content.get("extension")
    check(
        isinstance(content.get("tar_bytes"), int) and isinstance(content.get("tar_hash"), str),
        "lacks its tar's hash",
    )
    columns = {column: content.get(column) for column in COLUMNS}
    for column, values in (("key", keys), ("extension", extensions), *columns.items()):
        check(
            isinstance(values, list) and len(values) == len(keys or ()),
            f"its column {column!r} is missing or short",
        )
    for column, values in (("key", keys), ("extension", extensions)):
        check(
            all(type(value) is str and value.isprintable() for value in values),
            f"its column {column!r} is broken",
        )
    check(len(keys) > 0, "lists no sample")
    # the key ends at the first dot: else a sample would change its name when it is converted
    whole = ((key, extension) for key, extension in zip(keys, extensions, strict=True))
    check(
        all(split_name(f"{key}.{extension}") == (key, extension) for key, extension in whole),
        "its column 'key' is broken",
    )
    for column, values in columns.items():
        low, high = (-1 if column == "label" else 0), _LIMITS[column]
        good = (
            all(type(value) is int for value in values)
            and min(values) >= low
            and max(values) < high
        )
        check(good, f"its column {column!r} is broken")
    ends = map(int.__add__, columns["offset"] or (), columns["size"] or ())
    check(max(ends) <= content["tar_bytes"], "lists a sample after the end of its tar")
    skipped = content.get("skipped")
    check(
        isinstance(skipped, list) and all(isinstance(s, list) and len(s) == 2 for s in skipped),
        "is broken",
    )
    paths = None
    if "path" in content:
        paths = _checked_paths(content["path"], len(keys))
        check(paths is not None, "its column 'path' is broken")
    return ShardIndex(
        tar=str(content.get("tar")),
        tar_bytes=content["tar_bytes"],
        tar_hash=content["tar_hash"],
        keys=keys,
        extensions=extensions,
        columns=columns,
        skipped=[(str(member), str(reason)) for member, reason in skipped],
        paths=paths,
    )


def _checked_paths(values: Any, count: int) -> list[str] | None:
    """The column `path`; None if it is broken."""
    if not isinstance(values, list) or len(values) != count:
        return None
    try:
        paths = [path_from_json(value) for value in values]
        for path in paths:  # a lone surrogate that stands for no byte
            path_bytes(path)
    except ValueError:
        return None
    return paths
