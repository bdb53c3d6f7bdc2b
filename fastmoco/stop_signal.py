"""SIGTERM and SIGINT as a request to stop at the next step's end; a later second one stops at once."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

PATIENCE_SECONDS = 2.0
"""A signal that comes again within this time is the same request: schedulers and launchers often both send it."""


class StopSignal:
    """A context in which SIGTERM and SIGINT set a flag instead of ending the process.

    A second signal more than `PATIENCE_SECONDS` after the first ends the process the usual way. The previous handlers come
    back when the context is left.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[signal.Signals, signal._HANDLER] = {}
        self._received_at = 0.0

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._received_at = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._received_at > PATIENCE_SECONDS:
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop; every rank gets the same answer. One small all-reduce beyond one process."""
        if not (dist.is_available() and dist.is_initialized()):
            return self.received is not None
        flag = torch.tensor(float(self.received is not None), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
