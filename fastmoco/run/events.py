"""Named events of a run: what a detector noticed, in which step, where, and how large it was.

`metrics.jsonl` has a line for each: `{"step": 1207, "time": 1767225600.0, "event": {"name":
"gradient_spike", "layer": "first_block", "size": 12.3, "text": "gradient spike in first_block, ..."}}`.
The console shows the same text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmoco.run.metrics_file import EVENT, Tell, nobody, read_rows


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that a detector noticed. `str` is the line of the console."""

    step: int
    """Optimizer steps done."""
    name: str
    """What it is, in snake case: `gradient_spike`, `knn_dip`, `collapse`."""
    layer: str | None
    """The place in the network, as in `gradient_norm/PLACE`; None: the whole run."""
    size: float | None
    """How large it is; docs/stability.md has the unit of each name. None: not finite, or no size."""
    text: str
    """A sentence for people, without the step."""

    def __str__(self) -> str:
        return f"step {self.step}: {self.text}"

    def to_json(self) -> dict[str, Any]:
        """The content of the line, without the step."""
        finite = self.size is not None and math.isfinite(self.size)
        size = self.size if finite else None
        return {"name": self.name, "layer": self.layer, "size": size, "text": self.text}


def read_events(path: Path, *, tell: Tell = nobody) -> list[Event]:
    """The events of a run, in the order of the file, which is that of steps.

    Args:
        path: `metrics.jsonl`.
        tell: called with one sentence if there are damaged lines, or damaged events.

    Raises:
        UnfitFileError: if it is no regular file, a link, or too large.
    """
    found: list[Event] = []
    damaged = 0
    for step, row in read_rows(path, tell, having=f'"{EVENT}"'.encode()):
        if EVENT not in row:
            continue
        event = _parsed(step, row[EVENT])
        if event is None:
            damaged += 1
        else:
            found.append(event)
    if damaged:
        tell(f"{path}: {damaged} of {damaged + len(found)} events left out: damaged")
    return found


def _parsed(step: int, content: Any) -> Event | None:
    """The event of a line; None where a field has another type."""
    if not isinstance(content, dict):
        return None
    name, layer, size, text = (content.get(key) for key in ("name", "layer", "size", "text"))
    if not (isinstance(name, str) and isinstance(text, str) and isinstance(layer, str | None)):
        return None
    if not isinstance(size, int | float | None) or isinstance(size, bool):
        return None
    try:
        return Event(step, name, layer, None if size is None else float(size), text)
    except OverflowError:  # an integer of hundreds of digits
        return None
