"""The file `metrics.jsonl` of a run: read as a stream, and cut back when a run continues.

The file grows with the run, to some hundred megabytes. Reading is linear in time and keeps 16 bytes
for each value of the metrics that the caller wants, never the rows. Cutting back takes the time of
the lines that it removes, not that of the file.
"""

from __future__ import annotations

import functools
import json
import math
import os
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastmoco_pipelines.files import OPEN_FLAGS, whole_file

BLOCK = 2**20
"""Bytes that are read at once from the end of the file."""
MARGIN = 2**20
"""Bytes before the first line to keep that must also be in order. If they are not, every line of
the file is checked."""

SPIKE = "spike/"
"""Before the place in the network: the name of a gradient norm that was a spike."""

_INVALID = (ValueError, KeyError, TypeError, OverflowError, RecursionError)


class Series(NamedTuple):
    """The finite values of one metric, one for each step, in the order of steps."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


def read_series(path: Path, wanted: Callable[[str], bool]) -> dict[str, Series]:
    """The wanted metrics of a file, by name; metrics without a finite value are omitted.

    Lines of the same step are merged: of two values of a metric the last one counts, also if it is
    null. Incomplete lines are skipped.

    Args:
        path: JSON lines with a `step` each.
        wanted: selects metrics by name; must not depend on the call.
    """
    return read_curves(path, wanted)[0]


def read_curves(
    path: Path, wanted: Callable[[str], bool]
) -> tuple[dict[str, Series], dict[str, NDArray[np.int64]]]:
    """The metrics of `read_series`, and the steps at which a metric was not finite, by name."""

    # Most lines have the same keys, so the choice is made once for each set of keys.
    @functools.lru_cache(maxsize=1024)
    def chosen(keys: tuple[str, ...]) -> list[str]:
        return [name for name in keys if wanted(name)]

    found: dict[str, tuple[array[int], array[float]]] = defaultdict(
        lambda: (array("q"), array("d"))
    )
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
                step = int(row["step"])
            except _INVALID:
                continue
            if not -(2**63) <= step < 2**63:
                continue
            for name in chosen(tuple(row)):
                steps, values = found[name]
                value = row[name]
                steps.append(step)
                values.append(value if type(value) is float else _number(value))

    series: dict[str, Series] = {}
    lost: dict[str, NDArray[np.int64]] = {}
    for name, lists in found.items():
        steps_of, values_of = _in_order(*lists)
        finite = np.isfinite(values_of)
        if finite.any():
            series[name] = Series(steps_of[finite], values_of[finite])
        if not finite.all():
            lost[name] = steps_of[~finite]
    return series, lost


def read_values(path: Path, name: str) -> Iterator[tuple[int, float]]:
    """(step, value) for every line with the metric, in the order of the file."""
    key = json.dumps(name)
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            # Parsing takes far longer than this search, and most lines lack a rare metric.
            if key in line and step_of(line) < math.inf:
                row = json.loads(line)
                if row.get(name) is not None:
                    yield int(row["step"]), float(row[name])


def read_spikes(path: Path) -> dict[int, dict[str, float | None]]:
    """The spikes of a run: by step, the gradient norm by place in the network; None where it was
    not finite. Of a step with several lines the last one counts."""
    found: dict[int, dict[str, float | None]] = {}
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if f'"{SPIKE}' not in line or step_of(line) == math.inf:
                continue
            row = json.loads(line)
            places = {
                name.removeprefix(SPIKE): None if value is None else _number(value)
                for name, value in row.items()
                if name.startswith(SPIKE)
            }
            if places:
                found[int(row["step"])] = places
    return dict(sorted(found.items()))


def last_step(path: Path) -> int:
    """The step of the last line that is valid; 0 if there is none."""
    with path.open("rb") as file:
        for _, line in _backwards(file, file.seek(0, os.SEEK_END)):
            if step_of(line) < math.inf:
                return int(step_of(line))
    return 0


def cut_back(path: Path, step: int) -> int:
    """Remove the lines after `step`, and invalid lines.

    Lines are written in the order of steps, so the lines to remove are at the end of the file. It
    is read from there backwards and truncated. A kill or a crash leaves the old size or the new one,
    both at the end of a line or at the torn one of before, and the next call continues from either.

    If an invalid line, or a line of a later step, is among the last megabyte before the first line
    to keep, every line is checked and the kept ones are written to a new file. Earlier parts of a
    longer file are not read: an earlier start has checked them.

    Returns:
        The number of lines removed.
    """
    removed, kept_from, following = 0, None, math.inf
    with path.open("r+b") as file:
        size = cut = file.seek(0, os.SEEK_END)
        for offset, line in _backwards(file, size):
            at = step_of(line)
            if at <= step and at <= following:
                following = at
                if kept_from is None:
                    kept_from = offset
                if offset < kept_from - MARGIN:
                    break
            elif kept_from is None:
                cut = offset
                removed += 1
            else:
                return _rewrite(path, step)
        if cut < size:
            os.ftruncate(file.fileno(), cut)
            os.fsync(file.fileno())
    return removed


def _rewrite(path: Path, step: int) -> int:
    """`cut_back` for a file that is not in order: copy the kept lines, and replace the file."""
    with path.open("rb") as old:
        removed = sum(step_of(line) > step for line in old)
        if not removed:
            return 0
        old.seek(0)
        with whole_file(path) as fresh:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | OPEN_FLAGS
            with open(os.open(fresh, flags, 0o600), "wb") as new:
                for line in old:
                    if step_of(line) <= step:
                        new.write(line.rstrip(b"\r\n") + b"\n")
                new.flush()
                os.fsync(new.fileno())
    return removed


def step_of(line: str | bytes) -> float:
    """The step of a line; infinite for an invalid line."""
    try:
        text = line if isinstance(line, str) else line.decode()
        step = float(json.loads(text)["step"])
    except _INVALID:
        return math.inf
    return math.inf if math.isnan(step) else step


def _backwards(file: IO[bytes], size: int) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, the last one first, each with its offset."""
    rest = b""
    end, length = size, BLOCK
    while end > 0:
        begin = max(0, end - length)
        file.seek(begin)
        lines = (file.read(end - begin) + rest).split(b"\n")
        position = end + len(rest)

        # The end of the file is no empty line.
        if position == size and lines[-1] == b"":
            lines.pop()
            position -= 1

        # The first line may begin in an earlier block. Longer blocks for a very long line, which
        # would otherwise be copied for each block.
        rest = b""
        if begin > 0 and lines:
            length = BLOCK if len(lines) > 1 else 2 * length
            rest = lines.pop(0)
        for line in reversed(lines):
            yield position - len(line), line
            position -= len(line) + 1
        end = begin


def _number(value: Any) -> float:
    """A value as a float; NaN if it is no number."""
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return math.nan


def _in_order(
    steps: array[int], values: array[float]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Sort by step, and keep the last value of each step."""
    at, found = np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64)
    if np.any(at[1:] <= at[:-1]):
        order = np.argsort(at, kind="stable")
        at, found = at[order], found[order]
        last = np.append(at[1:] != at[:-1], True)
        at, found = at[last], found[last]
    return at, found
