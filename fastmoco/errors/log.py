"""How a run shows its progress: a table, lines, or JSON for programs (`--log`).

The choice is made on the command line and read where the console is built. Lines of JSON have
`kind`, one of `KINDS`, and `time`, seconds since 1970; docs/runs.md lists the other keys.
"""

from __future__ import annotations

import json
import math
import time
from contextvars import ContextVar
from typing import Any, Literal, TextIO

from fastmoco.errors.streams import raw
from fastmoco_pipelines.text import shown_lines

Style = Literal["auto", "table", "lines", "json"]
"""`auto`: a table on a terminal, else lines."""
KINDS = ("start", "step", "measured", "event", "result", "end")
"""What a line of JSON is about."""


class JsonLog:
    """Lines of JSON on a stream. A failure to write ends the log, never the training.

    Args:
        stream: gets one line at a time, flushed.
        active: False where another process of the run writes.
    """

    def __init__(self, stream: TextIO, *, active: bool = True) -> None:
        self._stream = raw(stream)
        self._active = active

    def write(self, kind: str, /, **facts: Any) -> None:
        """Write one line. A fact named `kind` or `time` is left out. NaN and infinity, which JSON does
        not have, become null; texts are shown as by `text.shown`, so that no URL in them has its
        secrets."""
        if not self._active:
            return
        head = {"kind": kind, "time": round(time.time(), 3)}
        try:
            self._stream.write(json.dumps(_plain(head | facts | head), allow_nan=False) + "\n")
            self._stream.flush()
        except Exception:  # a reader that is gone, a full disk, a closed stream
            self._active = False


def _plain(value: Any) -> Any:
    """A value that JSON has."""
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, int) else shown_lines(str(value))


STYLE: ContextVar[Style | JsonLog] = ContextVar("STYLE", default="auto")
"""How runs of this command show their progress."""
