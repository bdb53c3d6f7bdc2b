"""Progress of a run: a live table on a terminal, plain lines in a log file, and
no output from ranks above 0.

A failure to show progress never stops training. After any error while drawing (a closed terminal,
an encoding without a character, a window of two columns) plain lines replace the live table, and
after an error in those there is no more output.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TextIO

from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fastmoco.errors.streams import raw
from fastmoco.errors.terminal import Terminal
from fastmoco_pipelines.text import shown, shown_lines

EVENTS_SHOWN = 6
ECHO = 3
"""Columns that stay free at the right: in a full line, `^C` would move the table by a row."""
WARNING, MARK = "warning: ", "! "
"""How the text of a warning begins, and how it is marked."""


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (
        f"{days}d {hour:02}:{minute:02}:{second:02}" if days else f"{hour}:{minute:02}:{second:02}"
    )


Column = tuple[str, str, str, Callable[[float], str]]
"""Key of the row, short label in a line, long label in the table, format."""
_COLUMNS: tuple[Column, ...] = (
    ("epoch", "epoch", "epoch", "{:.1f}".format),
    ("loss", "loss", "loss", "{:.3f}".format),
    ("lr", "lr", "learning rate", "{:.1e}".format),
    ("ema_momentum", "m", "EMA momentum", "{:.4f}".format),
    ("images_per_s", "img/s", "images/s", "{:.0f}".format),
    ("wait_share", "wait", "wait for data", "{:.1%}".format),
    ("quarantined", "left out", "images left out", "{:.0f}".format),
    ("eta_s", "eta", "time left", _clock),
)


def _columns(figures: Mapping[str, str]) -> list[Column]:
    """Those of every run, and one for each accuracy: metric name -> label."""
    return [*_COLUMNS, *((name, name, label, "{:.1%}".format) for name, label in figures.items())]


def _shown(row: Mapping[str, Any], key: str, form: Callable[[float], str]) -> str | None:
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, int | float) and math.isfinite(value):
        return form(value)
    return shown(str(value), keep="\n")


def plain_line(row: Mapping[str, Any], total_steps: int, figures: Mapping[str, str]) -> str:
    """One log line, e.g.
    `step 120/2000 epoch 3.2 loss 3.412 lr 1.5e-04 m 0.9931 img/s 1842 eta 0:01:12`.

    Args:
        row: `step` and any of epoch, loss, lr, ema_momentum, images_per_s, wait_share (share),
            eta_s (seconds), and accuracies (shares). Other keys are ignored.
        total_steps: steps of the whole run.
        figures: metric name -> label of the accuracies.
    """
    parts = [f"step {row.get('step', '?')}/{total_steps}"]
    for key, label, _, form in _columns(figures):
        text = _shown(row, key, form)
        if text is not None:
            parts.append(f"{label} {text}")
    return " ".join(parts)


def _event(text: str) -> Text:
    """A line of the live table; only warnings have a color."""
    return Text(text, style="yellow" if text.startswith(MARK) else "")


def _colors(stream: TextIO) -> bool:
    """Whether plain lines may have a color: on a terminal, unless NO_COLOR is set."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") in ("dumb", None)
    return not plain and stream.isatty()


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
            live: True for the table, False for lines; by default the table if
                `stream` is a capable terminal.
            figures: metric name -> label of the accuracies of this run.
        """
        self._figures = dict(figures or {})
        self._stream = raw(sys.stdout if stream is None else stream)
        self._silent = rank > 0
        self._live_wanted = live
        self._live: Live | None = None
        self._total = 0
        self._header = ""
        self._row: dict[str, Any] = {}
        self._best: dict[str, float] = {}
        self._events: deque[str] = deque(maxlen=EVENTS_SHOWN)

    def start(self, total_steps: int, header: str) -> None:
        """Begin a run of `total_steps` optimizer steps; `header` names the model and the data in a
        few lines.
        """
        self._total = total_steps
        self._header = shown(header, keep="\n")
        if not self._silent:
            self._guarded(self._start_live)
        if self._live is None:
            self._line(self._header)

    def log(self, row: Mapping[str, Any]) -> None:
        """Show one log step.

        Args:
            row: see `plain_line`. Absent values stay in the table. The best of each accuracy is
                kept here; `knn_best` passes the one of `knn` from before a resume.
        """
        self.keep(row)
        if self._live is not None:
            self._guarded(self._draw)
        if self._live is None:
            self._line(lambda: plain_line(row, self._total, self._figures))

    def keep(self, row: Mapping[str, Any]) -> None:
        """Take values for the table, which is drawn with the next step or event: see `log`."""
        for name in self._figures:
            for value in (row.get(name), row.get(f"{name}_best")):
                if isinstance(value, int | float) and math.isfinite(value):
                    self._best[name] = max(value, self._best.get(name, value))
        self._row.update(row)

    def event(self, text: str) -> None:
        """Show an event, such as a measurement, a signal, or a gradient spike. One from before
        `start` is a line of its own, above the table.

        Args:
            text: one that begins with `warning: ` is marked by `! `, and yellow on a terminal.
        """
        text = (MARK if text.startswith(WARNING) else "") + shown_lines(text)
        if self._live is not None:
            pushed_out = self._events[0] if len(self._events) == EVENTS_SHOWN else None
            self._events.append(text)
            self._guarded(lambda: self._draw(pushed_out))
        if self._live is None:
            self._line(text, color=text.startswith(MARK))

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
        rich = Terminal(self._stream, force_terminal=wanted, highlight=False)
        if not wanted or (self._live_wanted is None and rich.is_dumb_terminal):
            return
        # No refresh thread: `log` and `event` draw everything, so that errors are raised there.
        table = self._table(rich.width)
        self._live = Live(table, console=rich, auto_refresh=False, vertical_overflow="crop")
        self._live.start(refresh=True)
        rich.show_cursor(True)  # a killed run leaves a usable terminal

    def _draw(self, pushed_out: str | None = None) -> None:
        assert self._live is not None  # noqa: S101 - a type: both callers have begun it
        if pushed_out is not None:
            self._live.console.print(_event(pushed_out))
        self._live.update(self._table(self._live.console.width), refresh=True)

    def _table(self, window: int) -> Panel:
        row = self._row
        step = int(row.get("step", 0))
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim")
        grid.add_column(justify="right")
        for key, _, label, form in _columns(self._figures):
            text = _shown(row, key, form)
            if text is not None and key in self._best:
                text = f"{text}  (best {form(self._best[key])})"
            grid.add_row(label, Text("-" if text is None else text))
        progress = Table.grid(padding=(0, 2), expand=True)
        progress.add_column(no_wrap=True)
        progress.add_column(ratio=1)
        progress.add_row(
            f"step {step}/{self._total}",
            ProgressBar(
                total=max(self._total, 1),
                completed=step,
                style="dim",
                complete_style="bold",
                finished_style="bold",
            ),
        )
        parts: list[Any] = [Text(self._header), progress, grid]
        parts += [_event(event) for event in self._events]
        # The `^C` that a terminal shows at Ctrl-C has its place beside the last line.
        width = window - ECHO if window > 10 * ECHO else None
        return Panel(Group(*parts), title="fastmoco", title_align="left", width=width)

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
