import io
import os
import pty
import re
import select
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest

from fastmoco.telemetry.console import EVENTS_SHOWN, Console
from fastmoco.telemetry.log_row import plain_line

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
LINE = "step 120/2000 epoch 3.2 loss 3.412 lr 1.5e-04 m 0.9931 img/s 1842 wait 2.1% eta 0:01:12 knn 93.1%"


class Broken(io.StringIO):
    """A terminal that fails at every write, with any kind of error."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        raise self.error


class Ascii(io.StringIO):
    encoding = "ascii"

    def write(self, text: str) -> int:
        text.encode("ascii")
        return super().write(text)


@pytest.fixture(autouse=True)
def _standard_streams_stay_as_they_are() -> Iterator[None]:
    before = sys.stdout, sys.stderr
    yield
    assert (sys.stdout, sys.stderr) == before


def use(console: Console) -> None:
    console.start(2000, "ViT-S/16 on digits")
    console.log(ROW)
    console.event("warning: step 121: gradient spike")
    console.close()
    console.close()


def test_plain_line_to_the_letter() -> None:
    assert plain_line(ROW, 2000, KNN) == LINE


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"step": 1}, "step 1/9"),
        (
            {"step": 1, "loss": float("nan"), "eta_s": float("inf"), "knn": None},
            "step 1/9 loss nan eta inf",
        ),
        ({"step": 1, "eta_s": 3600 * 49 + 61, "other": 5}, "step 1/9 eta 2d 01:01:01"),
        ({"step": 1, "eta_s": 59.6, "loss": "odd"}, "step 1/9 loss odd eta 0:01:00"),
    ],
)
def test_plain_line_of_odd_rows(row: dict[str, Any], line: str) -> None:
    assert plain_line(row, 9, KNN) == line


def test_elsewhere_than_on_a_terminal_it_is_lines() -> None:
    stream = io.StringIO()
    use(Console(figures=KNN, stream=stream))
    assert stream.getvalue() == f"ViT-S/16 on digits\n{LINE}\n! warning: step 121: gradient spike\n"


def test_other_ranks_are_silent() -> None:
    stream = io.StringIO()
    use(Console(figures=KNN, rank=1, stream=stream))
    use(Console(figures=KNN, rank=1, stream=stream, live=True))
    assert stream.getvalue() == ""


def test_every_line_is_flushed_at_once(tmp_path: Any) -> None:
    with open(tmp_path / "log", "w", encoding="utf-8") as stream:
        Console(figures=KNN, stream=stream).log(ROW)
        assert (tmp_path / "log").read_text().endswith("knn 93.1%\n")


def test_the_best_knn_of_before_a_resume_counts() -> None:
    stream = io.StringIO()
    console = Console(figures=KNN, stream=stream, live=True)
    console.start(10, "")
    console.log({"step": 5, "knn": 0.5, "knn_best": 0.75})
    console.close()
    assert "50.0%  (best 75.0%)" in visible(stream.getvalue())


def visible(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_the_table_shows_everything_and_keeps_the_best_knn() -> None:
    stream = io.StringIO()
    console = Console(figures=KNN, stream=stream, live=True)
    console.event("before the table")
    console.start(2000, "ViT-S/16 on digits")
    console.log(ROW)
    console.keep({"knn": 0.92})
    console.log({"step": 160, "loss": 3.0})
    for number in range(EVENTS_SHOWN + 1):
        console.event(f"warning: event {number}")
    console.close()
    last = visible(stream.getvalue()).rsplit("fastmoco", 1)[1]
    for expected in (
        "ViT-S/16 on digits",
        "step 160/2000",
        "3.000",
        "1.5e-04",
        "0.9931",
        "1842",
        "2.1%",
        "0:01:12",
        "92.0%  (best 93.1%)",
        "! warning: event 1",
        f"! warning: event {EVENTS_SHOWN}",
    ):
        assert expected in last, expected
    assert "! warning: event 0" not in last
    assert "! warning: event 0" in visible(stream.getvalue())
    assert stream.getvalue().count("before the table") == 1


@pytest.mark.parametrize(
    "error", [OSError(5, "gone"), BrokenPipeError(), ValueError("closed"), RuntimeError()]
)
@pytest.mark.parametrize("live", [None, True, False])
def test_a_broken_terminal_is_survived(
    error: BaseException, live: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    use(Console(figures=KNN, stream=Broken(error), live=live))


@pytest.mark.parametrize("live", [True, False])
def test_a_terminal_that_closes_halfway_is_survived(live: bool) -> None:
    stream = io.StringIO()
    console = Console(figures=KNN, stream=stream, live=live)
    console.start(10, "header")
    stream.close()
    console.log(ROW)
    console.event("text")
    console.close()


def test_interrupting_is_not_swallowed() -> None:
    with pytest.raises(KeyboardInterrupt):
        Console(figures=KNN, stream=Broken(KeyboardInterrupt()), live=False).log(ROW)


@pytest.mark.parametrize("live", [True, False])
def test_an_encoding_that_lacks_a_character_is_survived(live: bool) -> None:
    stream = Ascii()
    console = Console(figures=KNN, stream=stream, live=live)
    console.start(10, "größe ☃")
    console.log({"step": 3})
    console.close()
    assert "step 3/10" in stream.getvalue()


def test_quoted_names_cannot_steer_the_terminal() -> None:
    stream = io.StringIO()
    Console(figures=KNN, stream=stream).event("bad member \x1b]0;owned\x07\r.jpg")
    assert stream.getvalue() == "bad member \\x1b]0;owned\\x07\\r.jpg\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "environment", "yellow"),
    [
        (Terminal(), {"TERM": "xterm"}, True),
        (Terminal(), {"TERM": "xterm", "NO_COLOR": "1"}, False),
        (Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {"TERM": "xterm"}, False),
    ],
)
@pytest.mark.parametrize("live", [False, True])
def test_only_warnings_are_marked_and_colored_and_only_on_a_terminal(
    stream: io.StringIO,
    environment: dict[str, str],
    yellow: bool,
    live: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if live and environment["TERM"] == "dumb":
        pytest.skip("a dumb terminal has no table")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stream = type(stream)()
    console = Console(figures=KNN, stream=stream, live=live)
    console.start(10, "header")
    console.log({"step": 10, "loss": 1.0})
    console.event("step 10: kNN 50.0%")
    before = stream.getvalue()
    assert "! " not in before
    assert not re.findall(r"\x1b\[(?:\d+;)*[349][0-8]", before), "a color without a warning"
    console.event("warning: step 11: gradient spike")
    console.close()
    new = stream.getvalue()[len(before) :]
    assert "! warning: step 11: gradient spike" in new
    if not (live and stream.isatty() is False):
        assert bool(re.search(r"\x1b\[33m", new)) == yellow


@pytest.mark.parametrize("columns", ["1", "5", "20", "500"])
def test_any_window_width_is_survived(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("LINES", "3")
    stream = io.StringIO()
    use(Console(figures=KNN, stream=stream, live=True))
    assert stream.getvalue()


CHILD = textwrap.dedent(
    """
    import sys
    from fastmoco.telemetry.console import Console
    console = Console()
    console.start(10, "header")
    for step in range(1, 4):
        console.log({"step": step, "loss": 1.0})
    print("printed by somebody else")
    console.close()
    sys.exit(7)
    """
)


@pytest.mark.parametrize("term", ["xterm-256color", "dumb", "no-such-terminal", None])
def test_on_a_real_terminal(term: str | None) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("TERM", "COLUMNS", "LINES")}
    if term is not None:
        environment["TERM"] = term
    master, slave = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdout=slave, stderr=subprocess.PIPE, env=environment
    )
    os.close(slave)
    output = b""
    while select.select([master], [], [], 20)[0]:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # the other side has closed
            break
        output += chunk
    os.close(master)
    _, errors = child.communicate(timeout=120)
    assert (child.returncode, errors) == (7, b"")
    text = output.decode()
    assert "step 3/10" in text
    assert "printed by somebody else" in text
    if term == "dumb":
        assert "\x1b" not in text
        assert "step 3/10 loss 1.000\r\n" in text
    elif term == "xterm-256color":
        assert "fastmoco" in text
        assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l"), "the cursor stays hidden"


def test_a_closed_pipe_does_not_end_training() -> None:
    code = CHILD.replace("for step", "sys.stdin.read()\nfor step").replace(
        "sys.exit(7)", "import os; os._exit(7)"
    )
    code = code.replace('print("printed by somebody else")', "")
    for live in ("Console()", "Console(live=True)"):
        child = subprocess.Popen(
            [sys.executable, "-c", code.replace("Console()", live)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert child.stdout is not None
        child.stdout.close()
        child.stdout = None
        _, errors = child.communicate(b"", timeout=120)
        assert (child.returncode, errors) == (7, b"")
