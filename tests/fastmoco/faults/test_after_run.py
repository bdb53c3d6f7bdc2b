"""After the last step: an attempt fails, is interrupted or takes too long, and nothing is raised."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

import pytest

from fastmoco.faults import after_run
from fastmoco.faults.after_run import AfterRun
from fastmoco.faults.stop_signal import SIGNALS

pytestmark = pytest.mark.faults


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The same ones afterwards, whatever the context does."""
    numbers = (*SIGNALS, signal.SIGALRM)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def fails_with(error: Exception) -> Callable[[], NoReturn]:
    def work() -> NoReturn:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("no data"), "not drawn: no data"),
        (OSError(28, "No space left"), "not drawn: [Errno 28] No space left"),
        (MemoryError("4 GB"), "not drawn: MemoryError: 4 GB"),
        (RecursionError("deep"), "not drawn: RecursionError: deep"),
    ],
)
def test_an_error_is_reported(
    error: Exception, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with AfterRun() as after:
        after.attempt(fails_with(error), "not drawn")
    assert capsys.readouterr().err == f"fastmoco: {said}\n"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_attempt_at_once_and_a_second_one_lets_it_clean_up(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    done = []

    def work() -> None:
        try:
            try:
                os.kill(os.getpid(), number)
                time.sleep(30)
            except Exception:  # as a library may do
                done.append("caught")
        finally:
            os.kill(os.getpid(), number)
            done.append("cleaned up")

    with AfterRun() as after:
        after.attempt(work, "not drawn")
    assert done == ["cleaned up"]
    assert capsys.readouterr().err == f"fastmoco: not drawn: {number.name}; the run is finished\n"


def test_after_a_signal_nothing_is_begun(capsys: pytest.CaptureFixture[str]) -> None:
    done = []
    with AfterRun() as after:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        after.attempt(lambda: done.append(1), "not drawn")
    assert not done
    assert "not drawn: SIGTERM" in capsys.readouterr().err


def test_an_attempt_ends_at_its_limit(capsys: pytest.CaptureFixture[str]) -> None:
    with AfterRun() as after:
        after.attempt(lambda: time.sleep(30), "not drawn", limit_s=0.05)
    assert capsys.readouterr().err == "fastmoco: not drawn: not done after 0 s\n"


def test_an_attempt_that_succeeds_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    done = []
    with AfterRun() as after:
        after.attempt(lambda: done.append(1), "not drawn")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
    assert done == [1]
    assert capsys.readouterr().err == ""


def test_another_thread_may_use_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Only the main thread may handle signals."""

    def work() -> None:
        with AfterRun() as after:
            after.attempt(fails_with(ValueError("no data")), "not drawn")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert capsys.readouterr().err == "fastmoco: not drawn: no data\n"


def test_a_report_that_cannot_be_written_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            tried.append(text)
            raise OSError(28, "No space left on device")

    tried: list[str] = []
    monkeypatch.setattr("sys.stderr", Full())
    with AfterRun() as after:
        after.attempt(fails_with(ValueError("no data")), "not drawn")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        after.attempt(lambda: None, "not drawn")
    assert len(tried) == 2


@pytest.mark.parametrize("by_signal", [True, False])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interruption_that_a_finalizer_swallows_is_repeated(
    by_signal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(after_run, "REPEAT_SECONDS", 0.2)
    ended = []

    class Slow:
        def __del__(self) -> None:
            if by_signal:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

    def work() -> None:
        Slow()
        time.sleep(20)
        ended.append(1)

    with AfterRun() as after:
        after.attempt(work, "not drawn", limit_s=30 if by_signal else 0.05)
    assert not ended
    why = "SIGTERM; the run is finished" if by_signal else "not done after 0 s"
    assert f"fastmoco: not drawn: {why}\n" in capsys.readouterr().err


def test_work_that_returns_all_the_same_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        except BaseException:
            return

    with AfterRun() as after:
        after.attempt(work, "not drawn")
    assert capsys.readouterr().err == ""
