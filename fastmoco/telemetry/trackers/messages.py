"""Calls of a sink as lines of JSON, between a run and the process of a tracker."""

from __future__ import annotations

import base64
import dataclasses
import json
from typing import Any

import numpy as np

from fastmoco.run.events import Event
from fastmoco.telemetry.trackers.interface import Histogram, Started, TrackedRun

_KINDS: dict[str, Any] = {kind.__name__: kind for kind in (Event, Histogram, Started, TrackedRun)}
_MARK = "__kind__"


def packed(value: Any) -> bytes:
    """One line, of numbers, texts, lists, dictionaries, arrays of bytes and the classes of the
    interface."""
    return json.dumps(value, default=_plain).encode() + b"\n"


def unpacked(line: bytes) -> Any:
    """What `packed` was given; tuples become lists."""
    return json.loads(line, object_hook=_built)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        content = base64.b64encode(np.ascontiguousarray(value, np.uint8).tobytes()).decode()
        return {_MARK: "array", "shape": value.shape, "content": content}
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {_MARK: type(value).__name__, **fields}


def _built(found: dict[str, Any]) -> Any:
    kind = found.pop(_MARK, None)
    if kind is None:
        return found
    if kind == "array":
        data = np.frombuffer(base64.b64decode(found["content"]), np.uint8)
        return data.reshape(found["shape"])
    return _KINDS[kind](**found)
