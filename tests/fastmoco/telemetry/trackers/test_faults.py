"""A tracker that hangs, raises, fills up or is missing: one warning, and no call waits for it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fastmoco.faults.signals import SIGNALS
from fastmoco.telemetry.trackers.child import REQUESTS
from fastmoco.telemetry.trackers.interface import Sink, Started
from fastmoco.telemetry.trackers.isolated import Isolated, TrackerError
from fastmoco.telemetry.trackers.mlflow import stays_here
from fastmoco.telemetry.trackers.outlet import Outlet, without_values
from fastmoco.telemetry.trackers.trackers import Trackers
from fastmoco_pipelines.processes import child_environment, started
from tests.tracked_runs import log, tracked

pytestmark = pytest.mark.usefixtures("sinks_of_tests")


def warnings_of(outlet: Outlet, calls: int = 5, *, seconds: float = 20) -> list[str]:
    """Log some steps, close, and return what the user reads."""
    for step in range(calls):
        outlet.put("write", step, step, {"loss": 1.0})
    outlet.finish()
    outlet.join(time.monotonic() + seconds)
    return [text for text in outlet.news() if text.startswith("warning: ")]


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Gate(Sink):
    """Waits at its second write until it is opened."""

    def __init__(self) -> None:
        self.written: list[int] = []
        self.open = threading.Event()

    def write(self, step: int, metrics: object) -> None:
        if self.written:
            assert self.open.wait(60)
        self.written.append(step)


def test_a_full_queue_leaves_out_what_follows_and_says_so_once(tmp_path: Path) -> None:
    sink = Gate()
    outlet = Outlet("gate", lambda: sink, tracked(tmp_path, 0), queue=4)
    outlet.put("write", 0, 0, {})
    eventually(lambda: sink.written == [0] and not outlet._calls)
    for step in range(1, 100):  # the first of them is being written, and stays in the queue
        outlet.put("write", step, step, {})
    (warning,) = outlet.news()
    assert "gate takes too long: 4 records wait" in warning
    assert "metrics.jsonl is complete" in warning
    sink.open.set()
    eventually(lambda: not outlet._calls)
    outlet.put("write", 100, 100, {})
    assert warnings_of(outlet, 0) == []
    assert sink.written == [0, 1, 2, 3, 4, 100]


def test_steps_that_the_tracker_has_are_not_sent_again(tmp_path: Path) -> None:
    class Has(Gate):
        def start(self, run: object) -> Started:
            return Started(last_step=2)

    sink = Has()
    sink.open.set()
    outlet = Outlet("has", lambda: sink, tracked(tmp_path, 0))
    assert warnings_of(outlet) == []
    assert sink.written == [3, 4]


def test_a_tracker_that_comes_back_gets_what_has_waited(tmp_path: Path) -> None:
    """A server that is restarted: one warning, and the step that failed is sent again."""
    runs, written = [], []

    class Fails(Sink):
        def start(self, run):
            runs.append(run)
            return Started()

        def write(self, step, metrics):
            if step == 2 and len(runs) == 1:
                raise ConnectionError("gone")
            written.append(step)

    outlet = Outlet("server", Fails, tracked(tmp_path, 0), retry_s=0.05)
    for step in range(5):
        outlet.put("write", step, step, {})
    eventually(lambda: len(written) == 5)
    (warning,) = warnings_of(outlet, 0)
    assert "server failed (ConnectionError: gone)" in warning
    assert written == [0, 1, 2, 3, 4]
    assert [(run.first_step, run.resumed) for run in runs] == [(0, False), (2, True)]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Raises", r"TrackerError: ValueError: no room for step 0 at https://host/x"),
        ("Exits", "SystemExit: 3"),
        ("Dies", "its process has ended"),
        ("Missing", "AttributeError"),
        ("StartsWrong", "TypeError: start returned dict, not Started"),
        ("TakesLess", "write() takes 2 positional arguments but 3 were given"),
        ("Spins", r"write took more than 0.2 s"),
        ("HangsAtEnd", r"close took more than 0.2 s"),
    ],
)
def test_a_sink_that_fails_in_its_process_is_left_out_with_one_warning(
    tmp_path: Path, name: str, words: str
) -> None:
    def make() -> Sink:
        return Isolated(f"tests.faulty_sinks:{name}", write_s=0.2)

    (warning,) = warnings_of(Outlet(name, make, tracked(tmp_path, 0)))
    assert words in warning
    assert "pass-word" not in warning


@pytest.mark.parametrize("sink", ["tests.faulty_sinks:Hangs", "tests.hanging_import:Never"])
def test_a_sink_that_hangs_is_ended(tmp_path: Path, sink: str) -> None:
    """Also one that holds its interpreter and ignores signals, and one whose import hangs."""
    made: list[Isolated] = []

    def make() -> Sink:
        made.append(Isolated(sink))
        return made[0]

    outlet = Outlet("hangs", make, tracked(tmp_path, 0))
    eventually(lambda: bool(made) and made[0]._child is not None)
    (warning,) = warnings_of(outlet, seconds=1.0)
    assert "did not end in time" in warning
    child = made[0]._child
    assert child is not None
    assert child.wait(30) == -signal.SIGKILL


def test_a_start_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    sink = Isolated("tests.faulty_sinks:Hangs", start_s=0.5)
    with pytest.raises(TrackerError, match=r"start took more than 0.5 s"):
        sink.start(tracked(tmp_path, 0))
    sink.kill()


@contextmanager
def server(answer: bytes | None) -> Iterator[tuple[str, list[bytes]]]:
    """A server of this machine that accepts and then never answers, or answers all the same."""
    requests: list[bytes] = []
    held = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                requests.append(connection.recv(65536))
                held.append(connection)
                if answer is not None:
                    connection.sendall(answer)
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", requests
        listening.shutdown(socket.SHUT_RDWR)
    for connection in held:
        connection.close()


ERROR = b"HTTP/1.1 500 Oh no\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"


@pytest.mark.parametrize("tracker", ["mlflow", "wandb"])
@pytest.mark.parametrize("answer", [None, ERROR], ids=["never answers", "always fails"])
def test_a_server_that_is_no_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str, answer: bytes | None
) -> None:
    """Of this machine: it is asked, no call waits for it, and the close is bounded. W&B turns to its
    files, if there is time."""
    pytest.importorskip(tracker, reason=f"{tracker} is not installed")
    said: list[str] = []
    with server(answer) as (url, requests):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
        monkeypatch.setenv("WANDB_MODE", "online")
        trackers = Trackers([tracker], tracked(tmp_path, 0), tell=said.append)
        log(trackers, 1, 8)
        eventually(lambda: bool(requests))
        trackers.close(1.0)
    assert all("0123456789" * 4 not in text for text in said)
    assert sum(text.startswith("warning: ") for text in said) == 1


@pytest.mark.parametrize(
    ("uri", "local"),
    [
        ("/data/mlruns", True),
        ("file:///data/mlruns", True),
        ("sqlite:////data/mlflow.db", True),
        ("file://server/data", False),
        ("https://host", False),
        ("postgresql://host/db", False),
        ("mysql+pymysql://host/db", False),
        ("databricks", False),
        ("databricks-uc", False),
        ("databricks://profile", False),
    ],
)
def test_offline_mlflow_uses_no_store_of_another_machine(uri: str, local: bool) -> None:
    assert stays_here(uri) == local


@pytest.mark.parametrize("key", ["", "bad-key"])
def test_without_a_key_wandb_writes_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("HOME", str(tmp_path))
    said: list[str] = []
    trackers = Trackers(["wandb"], tracked(tmp_path, 0), tell=said.append)
    log(trackers, 1, 2)
    trackers.close(60)
    (line,) = said
    why = re.fullmatch(r"wandb: (.+) \(offline(.*); to send it: wandb sync\)", line)
    assert why is not None
    assert why[1] == str(tmp_path / "wandb")
    assert why[2].startswith(", since AuthenticationError: ") if key else not why[2]
    assert key not in line or not key
    assert len(list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))) == 1


def test_a_killed_run_lets_its_sink_end(tmp_path: Path) -> None:
    """The run dies of -9; its sink gets what was sent, and closes."""
    program = (
        "import os, pathlib, time; from tests.tracked_runs import *; "
        f"trackers = Trackers(['tests.faulty_sinks:Notes'], tracked(pathlib.Path({str(tmp_path)!r}), 0),"
        " tell=print); trackers.write(1, {'loss': 1.0}); "
        "\nwhile any(outlet._calls for outlet in trackers._outlets): time.sleep(0.02)"
        "\nos.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, timeout=60)
    assert done.returncode == -9
    notes = tmp_path / "notes.txt"
    eventually(lambda: notes.exists() and notes.read_text().endswith("closed\n"))
    assert notes.read_text().splitlines()[1:] == ['["write", 1, {"loss": 1.0}]', "closed"]


def killed_in_a_call(folder: Path, sink: str) -> int:
    """The process of a sink whose run dies of -9 while it writes the first step."""
    program = (
        "import os, pathlib, time; from tests.tracked_runs import *; "
        f"folder = pathlib.Path({str(folder)!r}); "
        f"trackers = Trackers(['tests.faulty_sinks:{sink}'], tracked(folder, 0), tell=print); "
        "trackers.write(1, {'loss': 1.0}); called = folder / 'called'"
        "\nwhile not (called.exists() and called.read_text()): time.sleep(0.02)"
        "\nos.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, timeout=60)
    assert done.returncode == -9
    return int((folder / "called").read_text())


def test_a_run_killed_during_a_call_lets_its_sink_end(tmp_path: Path) -> None:
    """Nobody reads the answer of the call, and the sink is closed all the same."""
    process = killed_in_a_call(tmp_path, "SlowNotes")
    eventually(lambda: started(process) is None)
    lines = (tmp_path / "notes.txt").read_text().splitlines()
    assert lines[1:] == ['["write", 1, {"loss": 1.0}]', "closed"]


def test_a_sink_that_hangs_does_not_outlive_a_killed_run(tmp_path: Path) -> None:
    process = killed_in_a_call(tmp_path, "HangsAtWrite")
    eventually(lambda: started(process) is None)


def test_no_complete_metrics_are_promised_where_a_sink_in_its_process_has_a_full_disk(
    tmp_path: Path,
) -> None:
    """The run may write to the same one."""
    outlet = Outlet("full", lambda: Isolated("tests.faulty_sinks:Full"), tracked(tmp_path, 0))
    (warning,) = warnings_of(outlet)
    assert "No space left on device; free some space" in warning
    assert warning.endswith("The run goes on")


def test_signals_that_ask_a_run_to_stop_do_not_reach_its_sink(tmp_path: Path) -> None:
    """SLURM sends them to every process of a job; the run still has its last steps to log."""
    assert REQUESTS == SIGNALS
    sink = Isolated("tests.faulty_sinks:Notes")
    sink.start(tracked(tmp_path, 0))
    assert sink._child is not None
    for number in SIGNALS:
        os.killpg(sink._child.pid, number)
    sink.write(1, {"loss": 1.0})
    sink.close()
    assert (tmp_path / "notes.txt").read_text().endswith("closed\n")


def test_the_number_of_a_process_that_has_ended_gets_no_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be that of another process by then."""
    sink = Isolated("tests.faulty_sinks:Notes")
    sink.start(tracked(tmp_path, 0))
    sink.close()
    monkeypatch.setattr(os, "killpg", lambda *_: pytest.fail("a signal was sent"))
    sink.kill()


def test_a_record_that_a_tracker_refuses_is_left_out(tmp_path: Path) -> None:
    """After its second failure; the others arrive."""
    written: list[int] = []

    class Refuses(Sink):
        def write(self, step, metrics):
            if step == 1:
                raise ValueError("not that one")
            written.append(step)

    outlet = Outlet("refuses", Refuses, tracked(tmp_path, 0), retry_s=0.02)
    for step in range(4):
        outlet.put("write", step, step, {})
    eventually(lambda: len(written) == 3)
    assert len(warnings_of(outlet, 0)) == 1
    assert written == [0, 2, 3]


def test_what_is_not_installed_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    said: list[str] = []
    trackers = Trackers(["wandb"], tracked(tmp_path, 0), tell=said.append)
    assert not trackers.active
    assert said == [
        "warning: trackers.use: wandb is not installed (pip install 'fastmoco[wandb]'); the run goes "
        "on without it, and metrics.jsonl is complete"
    ]


def test_the_folder_that_wandb_leaves_is_no_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trackio").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    said: list[str] = []
    assert not Trackers(["trackio"], tracked(tmp_path, 0), tell=said.append).active
    assert "trackio is not installed" in said[0]


def test_no_message_shows_a_secret_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "abcdefgh12345678")
    assert without_values("refused: abcdefgh12345678, sorry") == "refused: ***, sorry"

    # Also a short one, one that is the beginning of another, and none of a switch.
    monkeypatch.setenv("MY_PASSWORD", "hunter2")
    monkeypatch.setenv("MY_TOKEN", "abcdefgh")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    text = "hunter2, xhunter2 and abcdefgh12345678, false"
    assert without_values(text) == "***, xhunter2 and ***, false"


def test_an_error_is_cut_after_its_secrets_have_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_SECRET", "\N{BULLET}".join(["pass"] * 600))
    (warning,) = warnings_of(
        Outlet("it", lambda: Isolated("tests.faulty_sinks:Tells"), tracked(tmp_path, 0))
    )
    assert "MY_SECRET is ***" in warning


def test_a_sink_needs_no_method_and_no_base(tmp_path: Path) -> None:
    said: list[str] = []
    trackers = Trackers(["tests.faulty_sinks:Bare"], tracked(tmp_path, 0), tell=said.append)
    log(trackers, 1, 3)
    trackers.close(60)
    assert said == []
    assert (tmp_path / "notes.txt").read_text() == "1\n2\n2\n3\n"


def test_a_sink_of_the_users_own_gets_what_is_logged(tmp_path: Path) -> None:
    """`docs/trackers.md` describes it: a class in a module of PYTHONPATH."""
    assert "PYTHONSAFEPATH" in child_environment()
    said: list[str] = []
    trackers = Trackers(["tests.faulty_sinks:Notes"], tracked(tmp_path, 0), tell=said.append)
    trackers.write(1, {"loss": 0.1 + 0.2})
    trackers.close(60)
    assert said == ["tests.faulty_sinks:Notes: notes.txt"]
    lines = (tmp_path / "notes.txt").read_text().splitlines()
    assert lines[1:] == [f'["write", 1, {{"loss": {0.1 + 0.2!r}}}]', "closed"]
    assert os.stat(tmp_path / "notes.txt").st_mode & 0o777 == 0o600
