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
from typing import Any

from fastmoco_pipelines.errors import ShardError
from fastmoco_pipelines.files.small import UnfitFileError, json_of, reason_of
from fastmoco_pipelines.files.whole import is_sealed
from fastmoco_pipelines.formats.images import MAX_BYTES
from fastmoco_pipelines.formats.index_file import COLUMNS, CURE, ShardIndex
from fastmoco_pipelines.formats.labels import MAX_LABEL
from fastmoco_pipelines.formats.members import is_skipped, names_fault, split_name
from fastmoco_pipelines.formats.paths import is_file_name, path_bytes, path_text

FORMAT = "fastmoco-index"
VERSION = 1
JSON_SUFFIX = ".index.json"
MAX_JSON_BYTES = 256 << 20
"""Largest file in this form, in bytes: 2 million images in one tar."""
_LIMITS = {
    "offset": 2**63,
    "size": MAX_BYTES + 1,
    "crc32": 2**32,
    "label": MAX_LABEL + 1,
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
    if len(text) > MAX_JSON_BYTES:
        raise ShardError(
            f"{name}: has {len(text):,} bytes, an index in JSON at most {MAX_JSON_BYTES:,}: {CURE}."
        )
    try:
        content = json_of(text, name)
    except UnfitFileError as error:
        what = reason_of(error, name)
        raise ShardError(f"{name}: is not valid JSON ({what}): {CURE}.") from error
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

    def text_column(column: str) -> list[str]:
        values = content.get(column)
        good = isinstance(values, list) and all(type(value) is str for value in values)
        check(good, f"its column {column!r} is missing or broken")
        return list(values)

    check(
        isinstance(content, dict) and content.get("format") == FORMAT, "is not an index of fastmoco"
    )
    check(
        content.get("version") == VERSION,
        f"has version {content.get('version')!a:.40}, this fastmoco reads {VERSION}",
    )
    keys, extensions = text_column("key"), text_column("extension")
    check(
        type(content.get("tar_bytes")) is int and isinstance(content.get("tar_hash"), str),
        "lacks its tar's hash",
    )
    check(is_file_name(content.get("tar")), "its field 'tar' is not the name of a file")
    columns = {column: content.get(column) for column in COLUMNS}
    for column, values in (("key", keys), ("extension", extensions), *columns.items()):
        check(
            isinstance(values, list) and len(values) == len(keys),
            f"its column {column!r} is missing or short",
        )
    check(len(keys) > 0, "lists no sample")
    # the key ends at the first dot: else a sample would change its name when it is converted
    members = [f"{key}.{extension}" for key, extension in zip(keys, extensions, strict=True)]
    fault = names_fault(members)
    check(fault is None, f"its column 'key' is broken ({fault})")
    check(
        list(map(split_name, members)) == list(zip(keys, extensions, strict=True)),
        "its column 'key' is broken",
    )
    for column, values in columns.items():
        low, high = (-1 if column == "label" else 0), _LIMITS[column]
        good = (
            all(type(value) is int for value in values)
            and min(values) >= low
            and max(values) < high
        )
        check(good, f"its column {column!r} is broken: numbers from {low} to {high - 1} are due")
    ends = map(int.__add__, columns["offset"] or (), columns["size"] or ())
    check(max(ends) <= content["tar_bytes"], "lists a sample after the end of its tar")
    skipped = content.get("skipped")
    check(is_skipped(skipped), "its field 'skipped' is broken")
    paths = None
    if "path" in content:
        paths = _checked_paths(content["path"], len(keys))
        check(paths is not None, "its column 'path' is broken")
    return ShardIndex(
        tar=content["tar"],
        tar_bytes=content["tar_bytes"],
        tar_hash=content["tar_hash"],
        keys=keys,
        extensions=extensions,
        columns=columns,
        skipped=[(member, reason) for member, reason in skipped],
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
