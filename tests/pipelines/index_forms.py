"""The JSON form of indexes, in which tests edit them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastmoco_pipelines.files.whole import sealed_json
from fastmoco_pipelines.formats.index import index_path, json_path, read_any_index
from fastmoco_pipelines.formats.index_json import json_content


def json_of(tar: Path) -> dict[str, Any]:
    """The fields of an index's JSON form, without the hash."""
    return json_content(read_any_index(tar))


def put_json(tar: Path, content: dict[str, Any] | bytes) -> None:
    """Replace an index by a JSON form: fields, which are sealed, or any bytes."""
    index_path(tar).unlink(missing_ok=True)
    data = content if isinstance(content, bytes) else sealed_json(content)
    json_path(tar).write_bytes(data)
