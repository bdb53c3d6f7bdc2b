"""A signal requests a stop at the end of the step; a later second signal stops at once.

Which signals: `signals.py`. The end of the launcher counts as one (`parent.py`).

Python runs signal handlers on the main thread between bytecodes. A main thread blocked in a
collective whose peer has died never gets there, so with a handler alone only SIGKILL could end the
process. Therefore the signals also go to a wakeup file descriptor. A thread reads it, and ends a
process that does not stop.

Before the first step is done (it compiles and fills caches) there is nothing to save. A process
that ends then counts as stopped on request, and the same command continues the run. That requires
that all ranks were asked to stop: when a rank dies, a launcher sends the same signal to the others,
and that is a failure. Each rank therefore records in the ranks' store that it received a signal,
which a rank that died before cannot do.
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
from fastmoco.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_STOPPED, LAUNCHER, say, say_again
from fastmoco.faults.parent import ORPHAN_SECONDS, leave_stopping_to
from fastmoco.faults.pulse import Pulse, Section
from fastmoco.faults.signals import (
    INTERRUPT_PATIENCE_SECONDS,
    PATIENCE_SECONDS,
    SIGNALS,
    to_handle,
)
from fastmoco.run.folder import RunFolder
from fastmoco_pipelines.processes import is_orphan

SILENT_SECONDS = 3.0
"""A step that ends within this time after a signal needs no line that says what it waits for; nor
does a save within three times this time. The first step of a start may take minutes and does."""
_POLL_SECONDS = 0.25
_NOTHING_LOST = "ended before its first step was done: nothing is lost"


class StopSignal:
    """A context in which the signals set a flag instead of ending the process.

    A second signal more than `PATIENCE_SECONDS` after the first has its default effect. The
    previous handlers are restored when the context ends.

    Args:
        pulse: limits the time of the current step after a signal; without it there is no deadline.
        folder: of the run; is marked as preempted if the process has to end before its first step
            is done.
        world: this process among its peers; default: a single process.
    """

    def __init__(
        self,
        pulse: Pulse | None = None,
        folder: RunFolder | None = None,
        world: World | None = None,
    ) -> None:
        self.received: str | None = None
        self._pulse = pulse
        self._folder = folder
        self._world = world or World()
        self._previous: dict[signal.Signals, signal._HANDLER] = {}
        self._received_at = 0.0
        self._over = threading.Event()
        self._all_asked = threading.Event()

    def __enter__(self) -> StopSignal:
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._receiver.settimeout(_POLL_SECONDS)
        for number in to_handle():
            self._previous[number] = signal.signal(number, self._on_signal)
        self._wakeup_before = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="fastmoco-signals", daemon=True)
        self._thread.start()
        leave_stopping_to(self)
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        stopped = (
            self.received is not None
            and self._unstarted()
            and error is not None
            and lost_a_peer(error)
        )
        # The peer may have ended before all ranks had recorded their signals.
        stopped = stopped and self._all_asked.wait(PATIENCE_SECONDS)
        leave_stopping_to(None)
        self._over.set()
        with contextlib.suppress(BlockingIOError):  # else there is enough to read
            self._sender.send(b"\0")  # no signal: it wakes the thread
        self._thread.join()
        signal.set_wakeup_fd(self._wakeup_before)
        self._restore()
        self._receiver.close()
        self._sender.close()
        if stopped:
            # The peer received the same signal and reached its deadline first: not a failure.
            self._mark()
            say_again(f"{self.received}: a peer has ended; {_NOTHING_LOST}")
            raise SystemExit(EXIT_STOPPED) from error

    @property
    def saves(self) -> bool:
        """Whether a save or a rollback is under way, which may end."""
        return self._pulse is not None and self._pulse.section in (Section.SAVE, Section.ROLLBACK)

    def finish(self) -> None:
        """All is saved: ignore the signals from now on, also after this context."""
        self._previous = dict.fromkeys(self._previous, signal.SIG_IGN)
        self._over.set()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.received is None:
            self._received_at = time.monotonic()
            self.received = signal.Signals(number).name
        elif number == signal.SIGTERM and is_orphan():
            return  # the same request, passed on by the agent
        elif time.monotonic() - self._received_at > _patience(number):
            if self._nothing_lost():
                code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_STOPPED
                self._give_up(f"a second signal after {self.received}: ended at once", code)
            self._restore()
            os.kill(os.getpid(), number)

    def _listen(self) -> None:
        """Read the signals; end the process if the main thread does not react in time."""
        first: tuple[int, float] | None = None
        second: tuple[int, float] | None = None
        announced = False
        while not self._over.is_set():
            try:
                received = [number for number in self._receiver.recv(64) if number in SIGNALS]
            except TimeoutError:
                received = []
            orphan = is_orphan()
            if orphan and first is None and not received:
                self.received, self._received_at = signal.SIGTERM.name, time.monotonic()
                received = [int(signal.SIGTERM)]

            # The first signal starts the deadline; only a later one counts as the second.
            now = time.monotonic()
            for number in received:
                if first is None:
                    first = (number, now)
                    # On its own thread: a store whose host was stopped does not answer, and the
                    # deadline must hold.
                    threading.Thread(
                        target=self._notify_peers, name="fastmoco-asked", daemon=True
                    ).start()
                elif orphan and number == signal.SIGTERM:
                    continue
                elif now - first[1] > _patience(number) and second is None:
                    second = (number, now)
            if first is None:
                continue

            # A line for a person who waits, unless the step ends soon.
            saves = self._pulse is not None and self._pulse.section is Section.SAVE
            silent = (3 if saves else 1) * SILENT_SECONDS
            due = self._unstarted() or now - first[1] > silent
            if due and not announced and not self._over.is_set():
                announced = True
                self._announce(first[0])

            # The main thread has time to react itself before this thread ends the process.
            name = signal.Signals(first[0]).name
            if second is not None and now - second[1] > 2 * _POLL_SECONDS:
                code = EXIT_INTERRUPTED if second[0] == signal.SIGINT else 128 + first[0]
                self._give_up(f"a second signal after {name}: ended at once", code)
            if self._pulse is None:
                continue
            limit = ORPHAN_SECONDS if orphan else None
            late = self._pulse.outlasts(now - first[1], limit)
            if late is not None:
                self._give_up(f"{name}: {late}", EXIT_FAILED)

    def _announce(self, number: int) -> None:
        """Say what a process that was asked to stop waits for."""
        if self._world.rank > 0 or self._pulse is None:
            return
        what = "save" if self._pulse.section is Section.SAVE else "step"
        if self._pulse.section is Section.MEASUREMENT and not self._unstarted():
            what = f"measurement ({self._pulse.doing})"
        text = f"{signal.Signals(number).name}: stopping after this {what}"
        if number == signal.SIGINT:
            text += "; Ctrl-C again ends at once"
        say(text)

    def _notify_peers(self) -> None:
        """Record that this rank was asked to stop, and wait for the records of all other ranks."""
        with contextlib.suppress(RuntimeError):  # the store ended with the rank that hosted it
            if self._world.world_size > 1:
                store = connect(self._world)
                store.set(f"asked/{self._world.rank}", "")
                keys = [f"asked/{rank}" for rank in range(self._world.world_size)]
                while not store.check(keys):
                    if self._over.wait(_POLL_SECONDS):
                        return
            self._all_asked.set()

    def _unstarted(self) -> bool:
        return self._pulse is not None and self._pulse.unstarted

    def _nothing_lost(self) -> bool:
        """Whether all ranks were asked to stop and this one has not completed a step."""
        return self._unstarted() and self._all_asked.is_set()

    def _mark(self) -> None:
        if self._folder is not None:
            self._folder.mark("PREEMPTED")

    def _give_up(self, why: str, code: int) -> NoReturn:
        """End the process at once, even if its main thread is blocked inside a library."""
        try:
            if self._nothing_lost():
                self._mark()
                why = f"{why}; {_NOTHING_LOST}"
                code = code if code == EXIT_INTERRUPTED else EXIT_STOPPED
                # With `--gpus N` one line is enough.
                repeats = LAUNCHER in os.environ and (self._world.rank > 0 or is_orphan())
                (say_again if repeats else say)(why)
            else:
                say(f"{why}; ended without saving")
            if code == EXIT_STOPPED and self._world.rank > 0:
                # srun kills all ranks after the first that exits like this: give rank 0 time to
                # mark the folder.
                time.sleep(4 * _POLL_SECONDS)
        finally:
            os._exit(code)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop; all ranks get the same answer.

        One small all-reduce if there are several processes.
        """
        return any_rank(self.received is not None, device)


def _patience(number: int) -> float:
    """Seconds within which the same signal is the same request."""
    by_hand = number == signal.SIGINT and not any(
        name in os.environ for name in ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID")
    )
    return min(PATIENCE_SECONDS, INTERRUPT_PATIENCE_SECONDS) if by_hand else PATIENCE_SECONDS
