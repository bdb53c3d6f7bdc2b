"""A first signal asks, a later second one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from fastmoco.config_faults import FaultConfig
from fastmoco.pulse import Pulse
from fastmoco.stop_signal import PATIENCE_SECONDS, SIGNALS, StopSignal

pytestmark = pytest.mark.faults

CPU = torch.device("cpu")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_sets_the_flag_and_the_handlers_come_back_at_the_end(number):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.agreed(CPU)
        os.kill(os.getpid(), number)
        assert stop.agreed(CPU)
        assert stop.received == number.name
    assert signal.getsignal(number) == before


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
from fastmoco.config_faults import FaultConfig
from fastmoco.pulse import Pulse
from fastmoco.config_faults import FaultConfig
from fastmoco.pulse import Pulse
from fastmoco.stop_signal import StopSignal
pulse = Pulse(FaultConfig(stop_within_s=float(sys.argv[1])))
mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
with StopSignal(pulse), pulse.step():
    libc.pthread_mutex_lock(mutex)
    print("blocked", flush=True)
    libc.pthread_mutex_lock(mutex)  # as in a library that waits for a lost peer: no handler of Python ever runs
"""


def blocked(seconds: float) -> subprocess.Popen[str]:
    """A process whose main thread comes to no handler."""
    command = [sys.executable, "-c", BLOCKED, str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "blocked\n"
    return process


def test_a_blocked_process_ends_at_the_deadline_of_the_first_signal_or_at_once_at_a_second() -> None:
    """T05 and T06: the two wait beside each other."""
    once, twice = blocked(3.0), blocked(600.0)
    try:
        began = time.monotonic()
        for process in (once, twice):
            process.send_signal(signal.SIGTERM)
        text = once.communicate(timeout=15)[1]
        assert once.returncode == 1
        assert "SIGTERM: step did not end within 3 s; ended without saving" in text
        assert time.monotonic() - began >= 3
        assert twice.poll() is None
        twice.send_signal(signal.SIGTERM)
        text = twice.communicate(timeout=5)[1]
        assert twice.returncode == 128 + signal.SIGTERM
        assert "a second signal after SIGTERM: ended at once" in text
    finally:
        once.kill()
        twice.kill()


def test_a_save_that_has_begun_is_not_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    pulse = Pulse(FaultConfig(stop_within_s=1))
    later = time.monotonic() + 30
    with pulse.inside("save", 600):
        monkeypatch.setattr(time, "monotonic", lambda: later)
        assert pulse.outlasts(29) is None
    later += 30
    assert pulse.outlasts(0.5) is None
    assert pulse.outlasts(20) == "between steps did not end within 1 s"
    with pulse.step():
        assert pulse.outlasts(20) is None  # steps go on: a run on a GPU asks for signals at log steps only


def test_a_run_that_waits_for_its_data_in_every_step_is_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pulse = Pulse(FaultConfig(stop_within_s=10))
    with pulse.inside("data", 660):
        now[0] += 15
    with pulse.step():
        now[0] += 1
    with pulse.inside("data", 660):
        now[0] += 40
        assert pulse.outlasts(40) is None
        now[0] += 10
        assert pulse.outlasts(50) == "data did not end within 48 s"
