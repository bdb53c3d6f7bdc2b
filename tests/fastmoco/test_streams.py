"""Standard output and error: nothing steers the terminal, and no URL shows a secret."""

from __future__ import annotations

import io
import sys

from rich.live import Live
from rich.table import Table

from fastmoco.errors.streams import as_shown, raw, shown_streams
from fastmoco.errors.terminal import Terminal

HOSTILE = "\x1b]0;owned\x07 \u202e https://user:SECRET@host/x?token=SECRET"
SHOWN = "\\x1b]0;owned\\x07 \\u202e https://host/x"


def test_all_that_is_printed_is_shown_and_the_streams_come_back(capsys):
    before = sys.stdout, sys.stderr
    with shown_streams(for_good=False):
        print(HOSTILE, "\tb")
        sys.stderr.writelines([HOSTILE, "\n"])
        assert raw(sys.stdout) is before[0]
        assert as_shown(sys.stdout) is sys.stdout
    assert (sys.stdout, sys.stderr) == before
    printed = capsys.readouterr()
    assert printed.out == f"{SHOWN} \tb\n"
    assert printed.err.startswith(SHOWN + "\n")
    assert "SECRET" not in printed.err
    assert "\x1b" not in printed.err


def test_a_traceback_shows_no_secret_either(capsys):
    with shown_streams(for_good=False):
        try:
            raise LookupError(HOSTILE)
        except LookupError:
            sys.excepthook(*sys.exc_info())
    assert capsys.readouterr().err.endswith(f"LookupError: {SHOWN}\n")


def test_a_closed_stream_stays_closed(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with shown_streams(for_good=False):
        assert sys.stderr is None


def test_a_table_on_a_terminal_keeps_its_own_codes_alone():
    stream = io.StringIO()
    terminal = Terminal(as_shown(stream), force_terminal=True, width=120, highlight=False)
    table = Table()
    table.add_column(min_width=40)
    table.add_row("b\x1b[2J\x9b")
    with Live(console=terminal, auto_refresh=False) as live:
        live.update(table, refresh=True)
        terminal.print(HOSTILE, markup=False)
        terminal.print("https://user:SECRET@host/y?token=SECRET")
    written = stream.getvalue()
    assert "\x1b[?25l" in written  # rich hides the cursor
    assert "b\\x1b[2J\\x9b" in written
    assert "\\x1b]0;owned" in written  # rich leaves out the bell
    assert "\\u202e https://host/x" in written
    assert "https://host/y" in written
    assert "SECRET" not in written
    assert "\x1b[2J" not in written
    assert "\x9b" not in written
