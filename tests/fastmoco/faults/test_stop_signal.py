"""A first signal asks, a later second one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastmoco.config.faults import FaultConfig
from fastmoco.distributed.mesh import World
from fastmoco.faults import stop_signal
from fastmoco.faults.pulse import Pulse, Section
from fastmoco.faults.signals import PATIENCE_SECONDS, SIGNALS
from fastmoco.faults.stop_signal import StopSignal
from fastmoco.run.folder import RunFolder
from tests.checkpoint_content import group_of_one

pytestmark = pytest.mark.faults

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def interrupts() -> Iterator[None]:
    """Python's own answer to SIGINT, which a job in the background of a shell begins without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_sets_the_flag_and_the_handlers_come_back_at_the_end(number):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.agreed(CPU)
        os.kill(os.getpid(), number)
        assert stop.agreed(CPU)
        assert stop.received == number.name
    assert signal.getsignal(number) == before


def test_the_end_of_a_run_does_not_wait_for_a_look_at_the_signals(monkeypatch):
    monkeypatch.setattr(stop_signal, "_POLL_SECONDS", 60.0)
    began = time.monotonic()
    with StopSignal():
        pass
    assert time.monotonic() - began < 30


def test_the_same_request_twice_is_one_request():
    """A scheduler signals every process, and the launcher passes its own signal on."""
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == "SIGTERM"


def test_a_later_second_interrupt_ends_at_once(monkeypatch):
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == "SIGINT"
        later = time.monotonic() + PATIENCE_SECONDS + 0.1
        monkeypatch.setattr(time, "monotonic", lambda: later)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


BLOCKED = """
import ctypes, sys
from collections.abc import Iterator
from pathlib import Path
from fastmoco.config.faults import FaultConfig
from fastmoco.faults.pulse import Pulse, Section
from fastmoco.run.folder import RunFolder
from fastmoco.faults.stop_signal import StopSignal
pulse, folder = Pulse(FaultConfig(stop_within_s=float(sys.argv[1]))), RunFolder(Path(sys.argv[2]))
if "holds" in sys.argv:
    folder.acquire()
mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
if "second" in sys.argv:
    with pulse.step():
        pass
with StopSignal(pulse, folder), pulse.inside(Section.DATA, 600.0) if "data" in sys.argv else pulse.step():
    libc.pthread_mutex_lock(mutex)
    print("blocked", flush=True)
    libc.pthread_mutex_lock(mutex)  # as in a library that waits for a lost peer: no handler of Python ever runs
"""


def blocked(seconds: float, out: Path, *how: str) -> subprocess.Popen[str]:
    """A process whose main thread comes to no handler: in its first step, its ``second``, or the
    wait for its first ``data``."""
    command = [sys.executable, "-c", BLOCKED, str(seconds), str(out), *how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until_blocked(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "blocked\n"


def test_a_blocked_process_ends_at_the_deadline_of_the_first_signal_or_at_once_at_a_second(
    tmp_path: Path,
) -> None:
    """T05 and T06: the two wait beside each other."""
    once, twice = (
        blocked(seconds, tmp_path / str(seconds), "holds", "second") for seconds in (3.0, 600.0)
    )
    try:
        wait_until_blocked(once, twice)
        began = time.monotonic()
        for process in (once, twice):
            process.send_signal(signal.SIGTERM)
        text = once.communicate(timeout=120)[1]
        assert once.returncode == 1
        assert "SIGTERM: step did not end within 3 s; ended without saving" in text
        assert time.monotonic() - began >= 3
        assert twice.poll() is None
        twice.send_signal(signal.SIGTERM)
        text = twice.communicate(timeout=120)[1]
        assert twice.returncode == 128 + signal.SIGTERM
        assert "a second signal after SIGTERM: ended at once; ended without saving" in text
        assert not list(tmp_path.glob("*/PREEMPTED"))
    finally:
        once.kill()
        twice.kill()


@pytest.mark.long
@pytest.mark.slow
def test_before_the_first_step_is_done_a_signal_stops_a_run_that_has_nothing_to_save(
    tmp_path: Path,
) -> None:
    """Only the process that holds the folder leaves the mark; the others end as it does."""
    how = {"step": ["holds"], "data": ["holds", "data"], "peer": [], "twice": ["holds"]}
    runs = {
        name: blocked(3.0 if name != "twice" else 600.0, tmp_path / name, *words)
        for name, words in how.items()
    }
    try:
        wait_until_blocked(*runs.values())
        for process in runs.values():
            process.send_signal(signal.SIGUSR1)
        for name in ("step", "data", "peer"):
            section = "data" if name == "data" else "step"
            text = runs[name].communicate(timeout=120)[1]
            assert (
                f"SIGUSR1: {section} did not end within 3 s; ended before its first step was done"
                in text
            )
        runs["twice"].send_signal(signal.SIGUSR1)
        runs["twice"].communicate(timeout=120)
        assert {name: process.returncode for name, process in runs.items()} == dict.fromkeys(
            how, 75
        )
        assert {path.parent.name for path in tmp_path.glob("*/PREEMPTED")} == {
            "step",
            "data",
            "twice",
        }
    finally:
        for process in runs.values():
            process.kill()


def test_a_measurement_before_the_first_step_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pulse = Pulse(FaultConfig(stop_within_s=10))
    for waited_for in (False, True):
        with pulse.inside(Section.MEASUREMENT, 3600, "kNN"):
            now[0] += 20
            assert (pulse.outlasts(20) is None) == waited_for
        with pulse.step():
            pass


@pytest.mark.parametrize(
    ("signalled", "lost", "steps"),
    [(True, True, 0), (False, True, 0), (True, False, 0), (True, True, 1)],
)
def test_a_peer_that_ends_first_before_the_first_step_is_no_failure(
    signalled: bool, lost: bool, steps: int, tmp_path: Path
) -> None:
    """Every rank hears the signal; the exchange breaks in those whose deadline comes later."""
    folder, pulse = RunFolder(tmp_path), Pulse(FaultConfig())
    folder.acquire()
    for _ in range(steps):
        with pulse.step():
            pass
    stopped = signalled and lost and steps == 0
    error = RuntimeError("Connection closed by peer") if lost else ValueError("a mistake")

    def run() -> None:
        with StopSignal(pulse, folder), pulse.step():
            if signalled:
                os.kill(os.getpid(), signal.SIGTERM)
            raise error

    with group_of_one(), pytest.raises(SystemExit if stopped else type(error)) as ended:
        run()
    assert (tmp_path / "PREEMPTED").exists() == stopped
    assert not stopped or ended.value.code == 75  # type: ignore[union-attr]


@pytest.mark.parametrize("told", [True, False])
def test_a_signal_that_a_dead_peer_never_heard_is_no_request(
    told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher ends what is left of a start in which one has died, by the signal that it passes
    on when asked to stop."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    if told:
        store.set("fastmoco/this/asked/1", "")
    store.set("fastmoco/earlier/asked/1", "")
    folder, world = RunFolder(tmp_path), World(rank=0, world_size=2, attempt="this")
    folder.acquire()

    def run() -> None:
        with StopSignal(Pulse(FaultConfig()), folder, world):
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("Connection closed by peer")

    with group_of_one(), pytest.raises(SystemExit if told else RuntimeError):
        run()
    assert (tmp_path / "PREEMPTED").exists() == told


def test_a_second_signal_before_the_first_step_is_done_is_the_same_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the main thread comes to its handlers or not: test_before_the_first_step_is_done_...
    has the other way."""
    folder, codes = RunFolder(tmp_path), []
    folder.acquire()
    monkeypatch.setattr(os, "_exit", codes.append)
    with StopSignal(Pulse(FaultConfig()), folder) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop._all_asked.wait(120)
        later = time.monotonic() + PATIENCE_SECONDS + 0.1
        monkeypatch.setattr(time, "monotonic", lambda: later)
        with pytest.raises(KeyboardInterrupt):  # behind an end that the test has taken away
            os.kill(os.getpid(), signal.SIGINT)
    assert codes == [130]
    assert (tmp_path / "PREEMPTED").exists()


def test_a_save_that_has_begun_is_not_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    pulse = Pulse(FaultConfig(stop_within_s=1))
    later = time.monotonic() + 30
    with pulse.inside(Section.SAVE, 600):
        monkeypatch.setattr(time, "monotonic", lambda: later)
        assert pulse.outlasts(29) is None
    later += 30
    assert pulse.outlasts(0.5) is None
    assert pulse.outlasts(20) == "between steps did not end within 1 s"
    with pulse.step():
        assert (
            pulse.outlasts(20) is None
        )  # steps go on: a run on a GPU asks for signals at log steps only


def test_a_run_that_waits_for_its_data_in_every_step_is_no_hang(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pulse = Pulse(FaultConfig(stop_within_s=10))
    with pulse.inside(Section.DATA, 660):
        now[0] += 15
    with pulse.step():
        now[0] += 1
    with pulse.inside(Section.DATA, 660):
        now[0] += 40
        assert pulse.outlasts(40) is None
        now[0] += 10
        assert pulse.outlasts(50) == "data did not end within 48 s"


def test_after_the_last_step_signals_stay_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_signal, "PATIENCE_SECONDS", -1.0)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            stop.finish()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        assert {signal.getsignal(number) for number in before} == {signal.SIG_IGN}
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
