"""A first signal asks, a later second one ends."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from fastmoco.stop_signal import PATIENCE_SECONDS, StopSignal

CPU = torch.device("cpu")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
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
