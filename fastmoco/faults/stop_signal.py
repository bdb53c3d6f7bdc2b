"""SIGTERM, SIGINT and SIGUSR1 as a request to stop at the next step's end; a later second one stops at once.

Python runs a handler between two instructions of the main thread, and a thread that waits for a lost peer in a library comes
to none: a handler alone would make a process that nothing short of SIGKILL ends. The interpreter can also write the
signal's number to a socket at once, from wherever the main thread is. A thread reads it, and ends a process that does not stop.

Before the first step is done (it compiles and fills caches) there is nothing to save: however such a process ends, it was
stopped as it was asked to be, and the same command goes on. That holds if all ranks were asked. A launcher sends the same
signal to those that are left when one has died, and that is a failure: so ranks tell each other through their store what
they hear, and one that has died before tells nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from types import FrameType
from typing import NoReturn

import torch

from fastmoco.distributed.agree import any_rank
from fastmoco.distributed.mesh import World, lost_a_peer
from fastmoco.distributed.store import connect
from fastmoco.errors import EXIT_FAILED, EXIT_STOPPED, say
from fastmoco.faults.pulse import Pulse
from fastmoco.run.folder import RunFolder

PATIENCE_SECONDS = 2.0
"""A signal that comes again within this time is the same request: schedulers and launchers often both send it."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""The third is what SLURM sends some time before a job's end (``--signal=USR1@120``)."""
_LOOK_SECONDS = 0.25
_NOTHING_LOST = "ended before its first step was done: nothing is lost"


class StopSignal:
    """A context in which the signals set a flag instead of ending the process.

    A second signal more than `PATIENCE_SECONDS` after the first ends the process the usual way. The previous handlers come
    back when the context is left.

    Args:
        pulse: says how long the step at hand may still take after a signal; without it there is no deadline.
        folder: of the run; gets its mark if the process has to end before its first step is done.
        world: this process among its peers; default alone.
    """

    def __init__(self, pulse: Pulse | None = None, folder: RunFolder | None = None, world: World | None = None) -> None:
        self.received: str | None = None
        self._pulse, self._folder, self._world = pulse, folder, world or World()
        self._previous: dict[signal.Signals, signal._HANDLER] = {}
        self._received_at = 0.0
        self._over, self._all_asked = threading.Event(), threading.Event()

    def __enter__(self) -> StopSignal:
        self._ear, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)
        self._ear.settimeout(_LOOK_SECONDS)
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        self._wakeup_before = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="fastmoco-signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        stopped = self.received is not None and self._unstarted() and error is not None and lost_a_peer(error)
        # The peer may have gone before all had told what they heard.
        stopped = stopped and self._all_asked.wait(PATIENCE_SECONDS)
        self._over.set()
        self._thread.join()
        signal.set_wakeup_fd(self._wakeup_before)
        self._restore()
        self._ear.close()
        self._mouth.close()
        if stopped:
            # The peer has heard the same signal, and its deadline came first: that is no failure.
            self._mark()
            say(f"{self.received}: a peer has ended; {_NOTHING_LOST}")
            raise SystemExit(EXIT_STOPPED) from error

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._received_at = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._received_at > PATIENCE_SECONDS:
            if self._nothing_lost():
                self._give_up(f"a second signal after {self.received}: ended at once", EXIT_STOPPED)
            self._restore()
            os.kill(os.getpid(), number)

    def _listen(self) -> None:
        """Hear the signals beside the main thread; end the process if that one does not get to it."""
        first: tuple[int, float] | None = None
        second_at: float | None = None
        while not self._over.is_set():
            try:
                heard = [number for number in self._ear.recv(64) if number in SIGNALS]
            except TimeoutError:
                heard = []
            now = time.monotonic()
            for number in heard:
                if first is None:
                    first = (number, now)
                    # A thread of its own: a store whose holder was stopped answers nobody, and the deadline must hold.
                    threading.Thread(target=self._tell_peers, name="fastmoco-asked", daemon=True).start()
                elif now - first[1] > PATIENCE_SECONDS and second_at is None:
                    second_at = now
            if first is None:
                continue
            name = signal.Signals(first[0]).name
            if second_at is not None and now - second_at > 2 * _LOOK_SECONDS:
                self._give_up(f"a second signal after {name}: ended at once", 128 + first[0])
            late = self._pulse.outlasts(now - first[1]) if self._pulse is not None else None
            if late is not None:
                self._give_up(f"{name}: {late}", EXIT_FAILED)

    def _tell_peers(self) -> None:
        """Leave a note that this rank was asked to stop, and look for those of all others."""
        with contextlib.suppress(RuntimeError):  # the store went down with the rank that held it
            if self._world.world_size > 1:
                store = connect(self._world)
                store.set(f"asked/{self._world.rank}", "")
                everybody = [f"asked/{rank}" for rank in range(self._world.world_size)]
                while not store.check(everybody):
                    if self._over.wait(_LOOK_SECONDS):
                        return
            self._all_asked.set()

    def _unstarted(self) -> bool:
        return self._pulse is not None and self._pulse.unstarted

    def _nothing_lost(self) -> bool:
        """Whether all ranks were asked to stop, this one before its first step was done. Waits for nobody."""
        return self._unstarted() and self._all_asked.is_set()

    def _mark(self) -> None:
        if self._folder is not None:
            self._folder.mark("PREEMPTED")

    def _give_up(self, why: str, code: int) -> NoReturn:
        """End the process at once, whatever its main thread waits for: no exception reaches it in a library."""
        try:
            if self._nothing_lost():
                self._mark()
                why, code = f"{why}; {_NOTHING_LOST}", EXIT_STOPPED
            else:
                why += "; ended without saving"
            say(why)
            if code == EXIT_STOPPED and self._world.rank > 0:
                # srun kills all ranks behind the first that ends so: let the one that holds the folder leave its mark.
                time.sleep(4 * _LOOK_SECONDS)
        finally:
            os._exit(code)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop; every rank gets the same answer. One small all-reduce beyond one process."""
        return any_rank(self.received is not None, device)
