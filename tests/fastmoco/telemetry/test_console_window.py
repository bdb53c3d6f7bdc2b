"""The table in windows of any size, and its warnings, curves and lines of JSON."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from fastmoco.errors.log import KINDS, STYLE, JsonLog
from fastmoco.telemetry.console import EVENTS_SHOWN, Console
from fastmoco.telemetry.sparkline import ASCII_LEVELS, LEVELS, sparkline

KNN = {"knn": "kNN"}
ROW = {
    "step": 120,
    "epoch": 3.2,
    "loss": 3.412,
    "lr": 1.5e-4,
    "ema_momentum": 0.9931,
    "images_per_s": 1842.3,
    "wait_share": 0.021,
    "eta_s": 72.0,
    "knn": 0.931,
}
SPIKE = "warning: step {}: gradient spike in first_block, {} is {} x its median"


def visible(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def last_table(stream: io.StringIO) -> list[str]:
    return visible(stream.getvalue().rpartition("\x1b[2K")[2]).splitlines()


@contextmanager
def table(columns: int, rows: int, monkeypatch: Any, **options: Any) -> Iterator[Any]:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", str(rows))
    stream = io.StringIO()
    console = Console(figures=KNN, stream=stream, live=True, **options)
    console.start(2000, "vit_s16_e300_b1024  1,281,167 images, batch 1024 on 8 x cuda, lr = 0.0006")
    yield console, stream
    console.close()


@pytest.mark.parametrize(
    ("columns", "rows"),
    [(200, 50), (80, 24), (100, 50), (60, 24), (59, 20), (40, 20), (36, 18), (24, 10)],
)
def test_the_table_fits_the_window_and_keeps_warnings(
    columns: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with table(columns, rows, monkeypatch) as (console, stream):
        for number in range(1, 12):
            console.log({**ROW, "step": 10 * number, "loss": 5 - number / 10})
            console.keep({"knn": number / 20})
            if number % 3 == 0:
                console.event(SPIKE.format(number, f"{number}.5", 10 + number))
        for number in range(3 * EVENTS_SHOWN):
            console.event(f"saved step {number}, with a few more words so that it takes two rows")
    lines = last_table(stream)
    assert len(lines) < rows
    assert max(map(len, lines)) <= columns
    numbers = next(line.strip("│ ") for line in lines if "1842" in line)
    assert len(numbers) <= 100  # in a wide window, too, numbers are near their labels
    text = " ".join(line.strip("│ ") for line in lines)
    assert "fastmoco" in text
    assert "step 110/2000" in text
    if rows > 10:
        for words in ("3.900", "1842", "0.9931", "0:01:12 left", "55.0%  (best", "▁", "█"):
            assert words in text, words
        assert "gradient spike in first_block, 9.5 is 19 x its median (3 times)" in text
        assert f"saved step {3 * EVENTS_SHOWN - 1}" in text


def test_warnings_of_another_place_or_name_are_counted_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with table(100, 40, monkeypatch) as (console, stream):
        for step in (1, 2):
            console.event(SPIKE.format(step, "1e+03", 12).replace("first_block", "blocks.3"))
            console.event(SPIKE.format(step, "12", 12).replace("first_block", "blocks.11"))
            named = {"name": "knn_dip", "layer": None}
            console.event(f"warning: number {step} of words that differ {step}", named)
    text = "\n".join(last_table(stream))
    for words in ("blocks.3, 1e+03 is 12 x its median (2 times)", "blocks.11, 12 is 12 x its"):
        assert words in text
    assert "number 2 of words that differ 2 (2 times)" in text
    assert text.count("! warning") == 3


def test_more_kinds_of_warnings_than_rows_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with table(60, 16, monkeypatch) as (console, stream):
        console.log(ROW)
        for name in "abcdef":
            console.event(f"warning: {name * 70} {name * 70}")
    text = "\n".join(last_table(stream))
    assert "more kinds of warnings in metrics.jsonl" in text
    assert "f" * 40 in text


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [
        ([], 5, ""),
        ([1.0], 5, "▅"),
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, "▁▂▃▄▅▆▇█"),
        ([0, 0, 7, 7], 2, "▁█"),
        ([3, 3, 3], 9, "▅▅▅"),
        ([1, 2], 0, ""),
    ],
)
def test_a_sparkline_has_a_character_for_each_value_or_mean(values, width, expected) -> None:
    assert sparkline(values, width) == expected
    as_ascii = expected.translate(str.maketrans(LEVELS, ASCII_LEVELS))
    assert sparkline(values, width, ASCII_LEVELS) == as_ascii


def test_a_long_history_keeps_its_shape_in_bounded_memory(monkeypatch) -> None:
    with table(100, 30, monkeypatch) as (console, stream):
        console.remember("knn", [0.1, float("nan"), 0.2])
        for step in range(5000):
            console._take({"step": step, "loss": 5000.0 - step})
        assert len(console._history["loss"].values) < 1024
        console.log({"step": 5000, "loss": 0.0, "knn": 0.3})
    text = "\n".join(last_table(stream))
    assert re.search(r"loss  0\.000  █+▇+▆+▅+▄+▃+▂+▁+", text)
    assert re.search(r"kNN   30.0%  \(best 30.0%\)  ▁[▄▅]█", text)


class Latin(io.StringIO):
    encoding = "latin-1"

    def write(self, text: str) -> int:
        text.encode("latin-1")
        return super().write(text)


def test_a_terminal_without_blocks_gets_a_curve_of_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    stream = Latin()
    console = Console(figures=KNN, stream=stream, live=True)
    console.start(10, "header")
    for knn in (0.1, 0.5, 0.9):
        console.log({"step": 3, "knn": knn})
    assert console.is_live
    console.close()
    assert "90.0%  (best 90.0%)  _=#" in visible(stream.getvalue())


def test_what_an_encoding_lacks_makes_no_line_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard output of a command writes escapes in place of such characters."""
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("LINES", "20")
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, "ascii", errors="backslashreplace", write_through=True)
    console = Console(figures=KNN, stream=stream, live=True)
    console.start(10, "größe " * 30)
    console.event("warning: " + "ünï " * 100)
    assert console.is_live
    console.close()
    lines = visible(written.getvalue().decode("ascii")).splitlines()
    assert max(map(len, lines)) <= 40
    assert not [line for line in lines if "\\" in line]
    assert "gr??e" in "".join(lines)


CHILD = textwrap.dedent(
    """
    import os, sys
    from fastmoco.telemetry.console import Console
    console = Console(figures={"knn": "kNN"})
    console.start(10, "header of the run")
    for line in sys.stdin:
        console.stepped()
        if line.startswith("row"):
            console.log({"step": 3, "loss": 1.0, "knn": 0.5})
        os.write(2, b"done\\n")
    console.close()
    """
)


def test_a_window_of_another_size_is_drawn_again_without_a_log_step() -> None:
    """On a real terminal: 80 columns, then 40 between two log steps."""

    def resize(columns: int, rows: int) -> None:
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def say(word: str) -> str:
        """What the child draws for a word; it is read meanwhile, since a terminal holds little."""
        assert child.stdin is not None
        assert child.stderr is not None
        child.stdin.write(f"{word}\n".encode())
        child.stdin.flush()
        drawn = told = b""
        while not told.endswith(b"done\n"):
            ready = select.select([master, child.stderr], [], [], 60)[0]
            assert ready, "the child says nothing"
            if master in ready:
                drawn += os.read(master, 65536)
            elif not (part := os.read(child.stderr.fileno(), 65536)):
                raise AssertionError(told.decode())
            else:
                told += part
        while select.select([master], [], [], 0.1)[0]:
            drawn += os.read(master, 65536)
        return drawn.decode()

    master, slave = pty.openpty()
    resize(80, 24)
    left = ("TERM", "COLUMNS", "LINES", "NO_COLOR")
    environment = {name: value for name, value in os.environ.items() if name not in left}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD],
        stdin=subprocess.PIPE,
        stdout=slave,
        stderr=subprocess.PIPE,
        env=environment | {"TERM": "xterm-256color"},
    )
    try:
        wide = visible(say("row")).splitlines()
        assert "│ step 3/10" in "\n".join(wide)
        assert max(map(len, wide)) == 77
        assert say("nothing") == ""
        resize(40, 20)
        again = say("nothing")
        narrow = visible(again).splitlines()
        assert "fastmoco  header of the run" in "\n".join(narrow)
        assert max(map(len, narrow)) <= 40
        # Each row of the last table has become two: as many more are removed.
        begin = max(number for number, line in enumerate(wide) if line.startswith("╭"))
        assert f"\x1b[{len(wide) - begin}A\x1b[J" in again
        assert child.stdin is not None
        child.stdin.close()
        while child.poll() is None:
            if select.select([master], [], [], 0.1)[0]:
                os.read(master, 65536)
    finally:
        child.kill()
        child.wait(60)
        for stream in (child.stdin, child.stderr):
            if stream is not None:
                stream.close()
        os.close(slave)
        os.close(master)
    assert child.returncode == 0


@contextmanager
def json_console(stream: io.StringIO, **options: Any) -> Iterator[Console]:
    token = STYLE.set(JsonLog(stream))
    try:
        yield Console(figures=KNN, **options)
    finally:
        STYLE.reset(token)


def test_lines_of_json_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    with json_console(stream) as console:
        console.start(2000, "header", {"recipe": "r"})
        console.log({**ROW, "loss": float("nan"), "eta_s": None})
        console.keep({"step": 130, "knn": 0.9})
        console.event("warning: step 131: gradient spike", {"name": "gradient_spike", "size": 3.0})
        console.event("saved https://me:word@host/x?key=1 \x1b[31m")
        console.stepped()
        console.close()
    rows = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [row["kind"] for row in rows] == ["start", "step", "measured", "event", "event"]
    assert {row["kind"] for row in rows} < set(KINDS)
    assert all(abs(row.pop("time") - time.time()) < 600 for row in rows)
    start, step, measured, spike, saved = rows
    assert start == {"kind": "start", "total_steps": 2000, "text": "header", "recipe": "r"}
    assert step == {
        "kind": "step",
        "total_steps": 2000,
        **ROW,
        "loss": None,
        "eta_s": None,
    }
    assert measured == {"kind": "measured", "step": 130, "knn": 0.9}
    assert spike == {
        "kind": "event",
        "step": 130,
        "name": "gradient_spike",
        "size": 3.0,
        "level": "warning",
        "text": "step 131: gradient spike",
    }
    assert "word" not in saved["text"]
    assert "key" not in saved["text"]
    assert "\x1b" not in saved["text"]
    assert capsys.readouterr().out == ""


def test_a_metric_named_as_an_entry_of_each_line_replaces_none() -> None:
    stream = io.StringIO()
    with json_console(stream) as console:
        console.log({"step": 3, "kind": 0.5, "time": 0.0})
    row = json.loads(stream.getvalue())
    assert (row["kind"], row["step"]) == ("step", 3)
    assert abs(row["time"] - time.time()) < 600


def test_other_ranks_and_a_broken_reader_write_no_json() -> None:
    stream = io.StringIO()
    with json_console(stream, rank=1) as console:
        console.start(10, "")
        console.log(ROW)
    assert stream.getvalue() == ""
    stream.close()
    with json_console(stream) as console:
        console.start(10, "")
        console.log(ROW)
        console.event("text")


@pytest.mark.parametrize(("style", "is_live"), [("table", True), ("lines", False)])
def test_the_command_line_may_choose(style: Any, is_live: bool, monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    token = STYLE.set(style)
    stream = io.StringIO()
    try:
        console = Console(figures=KNN, stream=stream)
    finally:
        STYLE.reset(token)
    console.start(10, "header")
    assert console.is_live == is_live
    console.close()
