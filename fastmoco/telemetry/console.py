"""Progress of a run: a live table on a terminal, plain lines in a log file, JSON for programs, and
no output from ranks above 0.

The table has at most the rows and columns of its window, also of a phone. Warnings have rows of their
own, which ordinary events do not push out; a repeated one is counted.

A failure to show progress never stops training. After any error while drawing (a closed terminal,
an encoding without a character, a window of two columns) plain lines replace the live table, and
after an error in those there is no more output.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.console import Group
from rich.constrain import Constrain
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fastmoco.errors.log import STYLE, JsonLog
from fastmoco.errors.streams import raw
from fastmoco.errors.terminal import Terminal
from fastmoco.telemetry.log_row import COLUMNS, clock, columns_of, plain_line, shown_value
from fastmoco.telemetry.sparkline import ASCII_LEVELS, LEVELS, Curve, sparkline
from fastmoco_pipelines.text import shown, shown_lines

EVENTS_SHOWN = 6
"""Ordinary events in the table, and kinds of warnings, where the window has room."""
ECHO = 3
"""Columns that stay free at the right: in a full line, `^C` would move the table by a row."""
NARROW = 60
"""Columns below which labels are short and there is no frame."""
WIDEST = 48
"""Columns of a number with its label: further apart the eye loses the row."""
LONGEST_EVENT = 3
"""Rows of one event."""
LONGEST_KIND = 500
"""Characters by which two warnings are compared."""
_APART = ("loss", "eta_s")
"""Columns with a place of their own in the table."""
WARNING, MARK = "warning: ", "! "
"""How the text of a warning begins, and how it is marked."""
_FIGURES = re.compile(
    r"\bsteps? [\d,]+|[\d,]*\d\.\d+(e[+-]?\d+)?|\d+e[+-]?\d+|\d[\d,]*(?= is\b| x\b|%| s\b)"
)
"""What differs between two warnings of one kind."""


def _event(text: str) -> Text:
    """A line of the live table; only warnings have a color."""
    return Text(text, style="yellow" if text.startswith(MARK) else "")


def _colors(stream: TextIO) -> bool:
    """Whether plain lines may have a color: on a terminal, unless NO_COLOR is set."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") in ("dumb", None)
    return not plain and stream.isatty()


@dataclass
class _Warning:
    """The newest of equal warnings."""

    text: str
    count: int = 0

    def __str__(self) -> str:
        return self.text + (f" ({self.count} times)" if self.count > 1 else "")


_MEASURE = RichConsole(file=io.StringIO(), force_terminal=False, width=80)
"""Breaks lines; writes nothing."""


class Console:
    """Progress of one run. Call `start`, then `log` and `event`, then `close`, or use it as a
    context manager after `start`.
    """

    def __init__(
        self,
        *,
        rank: int = 0,
        stream: TextIO | None = None,
        live: bool | None = None,
        figures: Mapping[str, str] | None = None,
    ) -> None:
        """Choose how to show progress.

        Args:
            rank: only rank 0 writes.
            stream: output; default standard output.
            live: True for the table, False for lines; by default as the command line says, or the
                table if `stream` is a capable terminal.
            figures: metric name -> label of the accuracies of this run.
        """
        self._figures = dict(figures or {})
        self._stream = raw(sys.stdout if stream is None else stream)
        self._silent = rank > 0
        style = STYLE.get()
        self._log = style if isinstance(style, JsonLog) and stream is None else None
        wanted = {"table": True, "lines": False}.get(style) if isinstance(style, str) else None
        self._live_wanted = wanted if live is None else live
        self._live: Live | None = None
        self._total = 0
        self._header = ""
        self._row: dict[str, Any] = {}
        self._best: dict[str, float] = {}
        self._history = {name: Curve() for name in ("loss", *self._figures)}
        self._events: deque[str] = deque(maxlen=EVENTS_SHOWN)
        self._warnings: dict[str, _Warning] = {}
        self._drawn: list[int] = []
        self._window = (0, 0)

    @property
    def is_live(self) -> bool:
        """Whether there is a table now."""
        return self._live is not None

    def start(self, total_steps: int, header: str, facts: Mapping[str, Any] | None = None) -> None:
        """Begin a run of `total_steps` optimizer steps.

        Args:
            total_steps: of the whole run.
            header: names the model and the data in a few lines.
            facts: the same for programs.
        """
        self._total = total_steps
        self._header = shown(header, keep="\n")
        if self._told("start", total_steps=total_steps, text=header, **(facts or {})):
            return
        if not self._silent:
            self._guarded(self._start_live)
        if self._live is None:
            self._line(self._header)

    def remember(self, name: str, values: Iterable[float]) -> None:
        """Take the values of an accuracy from before a resume, for its sparkline."""
        for value in values:
            self._history[name].add(value)

    def log(self, row: Mapping[str, Any]) -> None:
        """Show one log step.

        Args:
            row: see `plain_line`. Absent values stay in the table. The best of each accuracy is
                kept here; `knn_best` passes the one of `knn` from before a resume.
        """
        self._take(row)
        if self._told("step", **{"step": None, "total_steps": self._total, **row}):
            return
        if self._live is not None:
            self._guarded(self._draw)
        if self._live is None:
            self._line(lambda: plain_line(row, self._total, self._figures))

    def keep(self, row: Mapping[str, Any]) -> None:
        """Take values for the table, which is drawn with the next step or event: see `log`."""
        self._take(row)
        self._told("measured", **{"step": self._row.get("step"), **row})

    def _take(self, row: Mapping[str, Any]) -> None:
        for name in self._figures:
            for value in (row.get(name), row.get(f"{name}_best")):
                if isinstance(value, int | float) and math.isfinite(value):
                    self._best[name] = max(value, self._best.get(name, value))
        for name in ("loss", *self._figures):
            value, curve = row.get(name), self._history[name]
            # Accuracies are repeated in each row.
            if isinstance(value, int | float) and (name == "loss" or value != curve.newest):
                curve.add(value)
        self._row.update(row)

    def event(self, text: str, facts: Mapping[str, Any] | None = None) -> None:
        """Show an event, such as a measurement, a signal, or a gradient spike. One from before
        `start` is a line of its own, above the table.

        Args:
            text: one that begins with `warning: ` is marked by `! `, and yellow on a terminal.
            facts: the same for programs: name, layer, size, step.
        """
        warns = text.startswith(WARNING)
        level = "warning" if warns else "info"
        named = {"step": self._row.get("step"), **(facts or {})}
        if self._told("event", **{**named, "level": level, "text": text.removeprefix(WARNING)}):
            return
        text = (MARK if warns else "") + shown_lines(text)
        if self._live is not None:
            pushed_out = self._add_warning(text, facts or {}) if warns else self._add_event(text)
            self._guarded(lambda: self._draw(pushed_out))
        if self._live is None:
            self._line(text, color=warns)

    def _add_event(self, text: str) -> str | None:
        """Keep an ordinary event; returns the one for which there is no place any more."""
        pushed_out = self._events[0] if len(self._events) == EVENTS_SHOWN else None
        self._events.append(text)
        return pushed_out

    def _add_warning(self, text: str, facts: Mapping[str, Any]) -> str | None:
        """Keep a warning as the newest of its kind; returns the one for which there is no place any
        more."""
        name = facts.get("name")
        kind = f"{name} {facts.get('layer')}" if name else _FIGURES.sub("#", text[:LONGEST_KIND])
        count = self._warnings.pop(kind, _Warning(text)).count
        self._warnings[kind] = _Warning(text, count + 1)
        if len(self._warnings) <= EVENTS_SHOWN:
            return None
        return str(self._warnings.pop(next(iter(self._warnings))))

    def stepped(self) -> None:
        """Draw again if the window has another size. Takes some 25 microseconds otherwise; call it
        after each step."""
        if self._live is not None and tuple(self._live.console.size) != self._window:
            self._guarded(self._draw)

    def _told(self, kind: str, /, **facts: Any) -> bool:
        """Whether progress is for programs; writes the line."""
        if self._log is None:
            return False
        if not self._silent:
            self._log.write(kind, **facts)
        return True

    def close(self) -> None:
        """Leave the last state on the screen and release the terminal. May be
        called more than once.
        """
        self._stop_live()

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start_live(self) -> None:
        wanted = self._stream.isatty() if self._live_wanted is None else self._live_wanted
        rich = Terminal(self._stream, keeps_width=True, force_terminal=wanted, highlight=False)
        if not wanted or (self._live_wanted is None and rich.is_dumb_terminal):
            return
        # No refresh thread: `log` and `event` draw everything, so that errors are raised there.
        self._live = Live(
            self._table(rich), console=rich, auto_refresh=False, vertical_overflow="crop"
        )
        self._live.start(refresh=True)
        rich.show_cursor(True)  # a killed run leaves a usable terminal

    def _draw(self, pushed_out: str | None = None) -> None:
        assert self._live is not None  # noqa: S101 - a type: both callers have begun it
        rich = self._live.console
        self._make_up_for(rich.width)
        if pushed_out is not None:
            rich.print(_event(pushed_out))
        self._live.update(self._table(rich), refresh=True)

    def _make_up_for(self, columns: int) -> None:
        """Remove the rows that a narrower window has made of the last table: terminals break its
        lines, and the cursor is then further below its beginning than rich knows."""
        if columns >= self._window[0] or columns < 1:
            return
        more = sum(max(1, -(-width // columns)) for width in self._drawn) - len(self._drawn)
        if more > 0:
            self._stream.write(f"\x1b[{more}A\x1b[J")

    def _table(self, rich: RichConsole) -> Constrain | Panel:
        """The table for the window as it is now."""
        columns, rows = self._window = (rich.size.width, rich.size.height)
        narrow = columns < NARROW
        # The `^C` that a terminal shows at Ctrl-C has its place beside the last line.
        outer = columns - ECHO if columns > 10 * ECHO else columns
        inner = max(1, outer - (0 if narrow else 4))
        levels = ASCII_LEVELS if rich.options.ascii_only else LEVELS
        parts = self._parts(inner, rows - 1 - (0 if narrow else 2), narrow, levels)
        widths = [part.cell_len if narrow and isinstance(part, Text) else outer for part in parts]
        self._drawn = widths if narrow else [outer, *widths, outer]
        if narrow:
            return Constrain(Group(*parts), outer)
        return Panel(Group(*parts), title="fastmoco", title_align="left", width=outer)

    def _parts(self, width: int, rows: int, narrow: bool, levels: str) -> list[Any]:
        """The rows of the table, each one line: as many as fit."""
        header = _wrapped(f"fastmoco  {self._header}" if narrow else self._header, width, 2)
        parts: list[Any] = [*header, *self._progress(width, narrow), *self._metrics(width, narrow)]
        label = max([len("loss"), *map(len, self._figures.values())])
        for key, _, name, form in columns_of(self._figures):
            if key == "loss" or key in self._figures:
                parts.append(self._curve(key, name, form, label, width, levels))

        # Warnings first: they must stay. The newest of both are the last to go.
        rest = max(0, rows - len(parts))
        events = [_wrapped(text, width, LONGEST_EVENT) for text in self._events]
        warnings = [_wrapped(str(one), width, LONGEST_EVENT) for one in self._warnings.values()]
        kept = min(len(events), 2)
        shown_warnings = _newest(warnings, max(rest - kept, (rest + 1) // 2))
        hidden = len(warnings) - len(shown_warnings)
        if hidden and shown_warnings:
            more = f"{MARK}{hidden} more kinds of warnings in metrics.jsonl"
            shown_warnings = [_wrapped(more, width, 1), *_newest(warnings, rest - kept - 1)]
        room = rest - sum(map(len, shown_warnings))
        for lines in (*shown_warnings, *_newest(events, room)):
            parts += lines
        return parts[: max(rows, 1)]

    def _progress(self, width: int, narrow: bool) -> list[Any]:
        """Step, bar, share and time left: one row, or two in a narrow window."""
        step = int(self._row.get("step", 0) or 0)
        total = max(self._total, 1)
        done, share = f"step {step}/{self._total}", min(step / total, 1)
        left = shown_value(self._row, "eta_s", clock)
        left = f"{left} left" if left is not None else ""
        bar = ProgressBar(
            total=total, completed=step, style="dim", complete_style="bold", finished_style="bold"
        )
        grid = Table.grid(padding=(0, 2), expand=True)
        if narrow:
            grid.add_column(ratio=1)
            grid.add_column(no_wrap=True)
            grid.add_row(bar, left)
            return [_ends(done, f"{share:.0%}", width), grid]
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True)
        grid.add_row(done, bar, f"{share:.1%}  {left}".rstrip())
        return [grid]

    def _metrics(self, width: int, narrow: bool) -> list[Any]:
        """Numbers in two columns, one pair a row."""
        cells: list[tuple[str, str]] = []
        for key, short, name, form in COLUMNS:
            text = shown_value(self._row, key, form)
            if key in _APART or (key == "quarantined" and text is None):
                continue
            cells.append((short if narrow else name, "-" if text is None else text))
        gap = 2 if narrow else 4
        one = max(1, min((width - gap) // 2, WIDEST))
        lines = []
        for number in range(0, len(cells), 2):
            pair = cells[number : number + 2]
            line = Text(no_wrap=True, overflow="ellipsis")
            for place, (name, text) in enumerate(pair):
                line.append(" " * (gap if place else 0))
                line.append(name, style="dim")
                line.append(" " * max(1, one - len(name) - len(text)) + text)
            lines.append(line)
        return lines

    def _curve(
        self,
        key: str,
        name: str,
        form: Callable[[float], str],
        label: int,
        width: int,
        levels: str,
    ) -> Text:
        """A number with its best value and its curve."""
        text = shown_value(self._row, key, form)
        value = "-" if text is None else text
        if text is not None and key in self._best:
            value = f"{text}  (best {form(self._best[key])})"
        line = Text(no_wrap=True, overflow="ellipsis")
        line.append(name.ljust(label), style="dim")
        line.append(f"  {value}")
        room = width - line.cell_len - 2
        if room > 2 and len(self._history[key].values) > 1:
            line.append("  " + sparkline(self._history[key].values, min(room, 60), levels))
        return line

    def _guarded(self, draw: Callable[[], None]) -> None:
        """Draw on the live table; after an error change to plain lines."""
        try:
            draw()
        except Exception:  # any error of the terminal; see the module's docstring
            self._live_wanted = False
            self._stop_live()

    def _stop_live(self) -> None:
        live = self._live
        self._live = None
        if live is not None:
            # The terminal may be gone; see the module's docstring.
            with contextlib.suppress(Exception):
                live.stop()

    def _line(self, text: str | Callable[[], str], *, color: bool = False) -> None:
        """Write one plain line and flush it; after an error write nothing any more."""
        if self._silent:
            return
        try:
            line = text if isinstance(text, str) else text()
            encoding = getattr(self._stream, "encoding", None) or "utf-8"
            line = line.encode(encoding, "replace").decode(encoding)
            if color and _colors(self._stream):
                line = f"\x1b[33m{line}\x1b[0m"
            self._stream.write(line + "\n")
            self._stream.flush()
        except Exception:  # any failure to write; see the module's docstring
            self._silent = True


def _ends(left: str, right: str, width: int) -> Text:
    """A line with a text at each end."""
    line = left + " " * max(1, width - len(left) - len(right)) + right
    return Text(line, no_wrap=True, overflow="ellipsis")


def _wrapped(text: str, width: int, most: int) -> list[Text]:
    """A text as lines of a width, the last one with an ellipsis if there are more."""
    whole = _event(text)
    lines = list(whole.wrap(_MEASURE, width))
    for line in lines:
        line.rstrip()
    if len(lines) > most:
        rest = Text(" ").join(lines[most - 1 :])
        rest.truncate(width, overflow="ellipsis")
        lines = [*lines[: most - 1], rest]
    for line in lines:
        line.no_wrap, line.overflow = True, "crop"
    return lines


def _newest(texts: Sequence[list[Text]], rows: int) -> list[list[Text]]:
    """The last of several texts that fit into a number of rows."""
    kept: list[list[Text]] = []
    for lines in reversed(texts):
        rows -= len(lines)
        if rows < 0:
            break
        kept.insert(0, lines)
    return kept
