"""The file `metrics.jsonl` of a run: read as a stream, and cut back when a run continues.

The file grows with the run, to some hundred megabytes. Reading is linear in time and keeps 16 bytes
for each value of the metrics that the caller wants, never the rows. Cutting back takes the time of
the lines that it removes, not that of the file.

A kill may leave half a line at the end, and a reader may see one that is being written: readers leave
it out. A crash may leave zeros. Readers leave out every line that is damaged, and tell how many; a run
that continues cuts off both.
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

from fastmoco_pipelines.files.small import UnfitFileError, lines_of, open_regular
from fastmoco_pipelines.files.whole import OPEN_FLAGS, whole_file
from fastmoco_pipelines.text import counted, escaped

LONGEST = 2**20
"""Bytes of a line; a longer one is damaged."""
MOST_BYTES = 2**32
"""Of a file: a line takes less than a kilobyte."""
MOST_LINES = 2**24
"""Of a file, also empty ones."""
MOST_ODD_LINES = 100_000
"""Of a file, without the name of a step in them: a crash leaves one."""
MOST_METRICS = 10_000
"""Different names that are kept. A run has some hundred."""
BLOCK = 2**20
"""Bytes that are read at once from the end of the file."""
MARGIN = 2**20
"""Bytes before the first line to keep that must also be in order. If they are not, every line of
the file is checked."""

EVENT = "event"
"""The key of a named event, which has a line of its own (`events`)."""
SPIKE = "spike/"
"""Before the place in the network: the name of a gradient norm that was a spike."""

_INVALID = (ValueError, KeyError, TypeError, OverflowError, RecursionError)
_CUT_SHORT = b"\0"


Tell = Callable[[str], None]


def nobody(text: str) -> None:
    """Tells nobody."""


class Series(NamedTuple):
    """The finite values of one metric, one for each step, in the order of steps."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


class Cut(NamedTuple):
    """Lines that were removed."""

    lines: int
    damaged: int
    """Those among them that were no lines of metrics."""


def read_series(
    path: Path, wanted: Callable[[str], bool], *, tell: Tell = nobody
) -> dict[str, Series]:
    """The wanted metrics of a file, by name; metrics without a finite value are omitted.

    Lines of the same step are merged: of two values of a metric the last one counts, also if it is
    null. Damaged lines are skipped.

    Args:
        path: JSON lines with a `step` each.
        wanted: selects metrics by name; must not depend on the call.
        tell: called with one sentence if there are damaged lines.

    Raises:
        UnfitFileError: if it is no regular file, a link, or too large; so do the other readers.
    """
    return read_curves(path, wanted, tell=tell)[0]


def read_curves(
    path: Path, wanted: Callable[[str], bool], *, tell: Tell = nobody
) -> tuple[dict[str, Series], dict[str, NDArray[np.int64]]]:
    """The metrics of `read_series`, and the steps at which a metric was not finite, by name."""

    # Most lines have the same keys, so the choice is made once for each set of keys.
    @functools.lru_cache(maxsize=1024)
    def chosen(keys: tuple[str, ...]) -> list[str]:
        return [name for name in keys if name != EVENT and wanted(name)]

    found: dict[str, tuple[array[int], array[float]]] = defaultdict(
        lambda: (array("q"), array("d"))
    )
    beyond = 0
    for step, row in read_rows(path, tell):
        for name in chosen(tuple(row)):
            if len(found) >= MOST_METRICS and name not in found:
                beyond += 1
                continue
            steps, values = found[name]
            value = row[name]
            steps.append(step)
            values.append(value if type(value) is float else _number(value))

    if beyond:
        tell(
            f"{escaped(str(path))}: {counted(beyond, 'value')} left out, of more than "
            f"{MOST_METRICS:,} different metrics"
        )
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


def read_values(path: Path, name: str, *, tell: Tell = nobody) -> Iterator[tuple[int, float]]:
    """(step, value) for every line with a number as the metric, in the order of the file."""
    # Parsing takes far longer than the search for the name, and most lines lack a rare metric.
    for step, row in read_rows(path, tell, having=json.dumps(name).encode()):
        value = row.get(name)
        if isinstance(value, int | float):
            yield step, _number(value)


def read_spikes(path: Path, *, tell: Tell = nobody) -> dict[int, dict[str, float | None]]:
    """The spikes of a run: by step, the gradient norm by place in the network; None where it was
    not finite. Of a step with several lines the last one counts."""
    found: dict[int, dict[str, float | None]] = {}
    for step, row in read_rows(path, tell, having=f'"{SPIKE}'.encode()):
        places = {
            name.removeprefix(SPIKE): None if value is None else _number(value)
            for name, value in row.items()
            if name.startswith(SPIKE)
        }
        if places:
            found[step] = places
    return dict(sorted(found.items()))


def last_step(path: Path) -> int:
    """The step of the last line that is valid; 0 if there is none."""
    with _opened(path, os.O_RDONLY) as file:
        for _, line in _backwards(file, file.seek(0, os.SEEK_END)):
            if step_of(line) < math.inf:
                return int(step_of(line))
    return 0


def cut_back(path: Path, step: int) -> Cut:
    """Remove the lines after `step`, and damaged lines.

    Lines are written in the order of steps, so the lines to remove are at the end of the file. It
    is read from there backwards and truncated. A kill or a crash leaves the old size or the new one,
    both at the end of a line or at the torn one of before, and the next call continues from either.

    If a damaged line, or a line of a later step, is among the last megabyte before the first line
    to keep, every line is checked and the kept ones are written to a new file. Earlier parts of a
    longer file are not read: an earlier start has checked them.

    Raises:
        UnfitFileError: if it is no regular file, has a second name, or is too large.
    """
    removed, damaged, kept_from, following = 0, 0, None, math.inf
    with _opened(path, os.O_RDWR) as file:
        size = cut = file.seek(0, os.SEEK_END)
        for offset, line in _bounded(path, _backwards(file, size)):
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
                damaged += _is_damaged(line, at)
            else:
                return _rewrite(path, step)
        if cut < size:
            os.ftruncate(file.fileno(), cut)
            os.fsync(file.fileno())
    return Cut(removed, damaged)


def _rewrite(path: Path, step: int) -> Cut:
    """`cut_back` for a file that is not in order: copy the kept lines, and replace the file."""
    removed = damaged = 0
    for _, line in _bounded(path, lines_of(path, LONGEST, follow=False)):
        at = step_of(line)
        removed += at > step
        damaged += _is_damaged(line, at)
    if removed:
        with whole_file(path) as fresh:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | OPEN_FLAGS
            with open(os.open(fresh, flags, 0o600), "wb") as new:
                for _, line in lines_of(path, LONGEST, follow=False):
                    if step_of(line) <= step:
                        new.write(line.rstrip(b"\r\n") + b"\n")
                new.flush()
                os.fsync(new.fileno())
    return Cut(removed, damaged)


def step_of(line: str | bytes) -> float:
    """The step of a line; infinite for a damaged line."""
    found = _parsed(line)
    return math.inf if found is None else float(found[0])


def read_rows(path: Path, tell: Tell, having: bytes = b"") -> Iterator[tuple[int, dict[str, Any]]]:
    """Steps and rows of the lines that contain `having`, without damaged ones."""
    damaged = first = 0
    for at, line in _bounded(path, lines_of(path, LONGEST, follow=False, limit=MOST_BYTES)):
        if having not in line:
            continue
        found = _parsed(line)
        if found is not None:
            yield found
        elif _is_damaged(line, math.inf) and not _is_torn(line):
            first = first if damaged else at
            damaged += 1
    if damaged:
        tell(
            f"{escaped(str(path))}: {counted(damaged, 'line')} left out, the first at byte {first:,}: "
            "damaged, no metrics of a step"
        )


def _parsed(line: str | bytes) -> tuple[int, dict[str, Any]] | None:
    """Step and content of a line; None for a damaged one."""
    try:
        row = json.loads(line if isinstance(line, str) else line.decode())
        step = row["step"]
        whole = int(step) if type(step) in (int, float) else 2**63
    except _INVALID:
        return None
    return (whole, row) if whole == step and -(2**63) <= whole < 2**63 else None


def _bounded(path: Path, lines: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """The lines of a file; one with too many, or with too many that are none of metrics, is refused:
    each takes time, and 4 GB have room for billions.
    """
    odd = 0
    for count, (at, line) in enumerate(lines):
        odd += b'"step"' not in line
        if count >= MOST_LINES or odd > MOST_ODD_LINES:
            without_step = f"{MOST_ODD_LINES:,} lines without a step"
            what = without_step if odd > MOST_ODD_LINES else f"{MOST_LINES:,} lines"
            raise UnfitFileError(
                f"{escaped(str(path))}: has more than {what}, and is no file of metrics: move it away"
            )
        yield at, line


def _is_damaged(line: bytes, step: float) -> bool:
    """Whether a line without a step is more than an empty one."""
    return step == math.inf and bool(line.strip())


def _is_torn(line: bytes) -> bool:
    """Whether a line without a step is the beginning of one that was still to be written."""
    return line.startswith(b"{") and len(line) < LONGEST and not line.endswith((b"\n", b"\0"))


def ends_torn(path: Path) -> bool:
    """Whether the last line was not written to its end, as of a run that was killed.

    Raises:
        UnfitFileError: if it is no regular file, a link, or too large.
    """
    with _opened(path, os.O_RDONLY) as file:
        size = file.seek(0, os.SEEK_END)
        if not size or os.pread(file.fileno(), 1, size - 1) == b"\n":
            return False
        _, line = next(_backwards(file, size))
    return step_of(line) == math.inf and _is_torn(line)


def _opened(path: Path, flags: int) -> IO[bytes]:
    mode = "r+b" if flags & os.O_RDWR else "rb"
    return open(open_regular(path, flags, follow=False, limit=MOST_BYTES), mode)


def _backwards(file: IO[bytes], size: int) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, the last one first, each with its offset. Of one longer than `LONGEST`
    only a part is returned, which is no line of metrics."""
    rest, unread = b"", 0  # of a line that begins earlier: bytes in memory, bytes given up
    end = size
    while end > 0:
        begin = max(0, end - BLOCK)
        file.seek(begin)
        position = end + len(rest) + unread
        lines = (file.read(end - begin) + rest).split(b"\n")

        # The end of the file is no empty line.
        if position == size and not unread and lines[-1] == b"":
            lines.pop()
            position -= 1

        # The first line may begin in an earlier block.
        rest = lines.pop(0) if begin > 0 and lines else b""
        for line in reversed(lines):
            yield position - unread - len(line), _CUT_SHORT if unread else line
            position -= unread + len(line) + 1
            unread = 0
        if len(rest) > LONGEST or unread:
            rest, unread = b"", unread + len(rest)
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
