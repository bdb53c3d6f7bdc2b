"""The way of a run's records to one tracker: a bounded queue, and a thread that empties it.

`put` takes microseconds whatever the tracker does. A tracker that fails is begun again after some
minutes, so a server may be restarted during a run; the user reads about it once. A call that fails
twice is left out, so a record that a tracker refuses does not keep it from the others.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from fastmoco.errors import describe
from fastmoco.telemetry.trackers.interface import Sink, Started, TrackedRun
from fastmoco_pipelines.text import counted, shown

QUEUE = 1000
"""Records that wait; one that finds no room is left out."""
RETRY_S = 300.0
"""Seconds before a tracker that has failed is begun again; then twice as long each time, up to an
hour."""
MOST_RETRY_S = 3600.0
_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")
"""Parts of the names of variables whose values no message may show."""
_WORDS = ("true", "false", "none")
"""Values of switches, such as TOKENIZERS_PARALLELISM."""
_LONGEST = 3000
"""Characters of what a tracker says."""


class _Call(NamedTuple):
    method: str
    step: int
    arguments: tuple[Any, ...]


class Outlet:
    """One tracker of a run.

    Args:
        name: for people.
        make: makes its sink, in the thread.
        run: what the sink is started with.
        queue: as `QUEUE`.
        retry_s: as `RETRY_S`.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], Sink],
        run: TrackedRun,
        *,
        queue: int = QUEUE,
        retry_s: float = RETRY_S,
    ) -> None:
        self.name = name
        self._make = make
        self._run = run
        self._most = queue
        self._retry_s = retry_s
        self._lock = threading.Condition()
        self._calls: deque[_Call] = deque()
        self._news: list[str] = []
        self._warned = False
        self._closing = False
        self._given_up = False
        self._failed: _Call | None = None
        self._sink: Sink | None = None
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def put(self, method: str, step: int, *arguments: Any) -> None:
        """Queue a call of the sink. Never waits; without room the call is left out."""
        with self._lock:
            if self._given_up or self._closing:
                return
            if len(self._calls) < self._most:
                self._calls.append(_Call(method, step, arguments))
                self._lock.notify()
                return
        self._warn(
            f"takes too long: {counted(self._most, 'record')} wait, and what follows is left out"
        )

    def news(self) -> list[str]:
        """What the user should read, since the last call."""
        with self._lock:
            found, self._news = self._news, []
        return found

    def finish(self) -> None:
        """Let the sink close after what is queued; `join` waits for it."""
        with self._lock:
            self._closing = True
            self._lock.notify()

    def join(self, deadline: float) -> None:
        """Wait until the sink is closed, at most until a time of `time.monotonic`; then give it up."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._warn("did not end in time: what it has not sent is lost")
            if (kill := getattr(self._sink, "kill", None)) is not None:
                kill()

    def _work(self) -> None:
        """Begin the sink and make its calls, until it is closed."""
        run, wait = self._run, self._retry_s
        while True:
            try:
                self._sink = sink = self._make()
                started = sink.start(run)
                if started.where and run is self._run:
                    self._tell(f"{self.name}: {started.where}")
                self._deliver(sink, started)
                return
            except Exception as error:  # whatever a tracker raises; see the module's docstring
                self._warn(f"failed ({worded(error)})", complete=not _is_full(error))
                self._abandon()
                if isinstance(error, ImportError) or not self._later(wait):
                    break
            wait = min(2 * wait, MOST_RETRY_S)
            first = self._calls[0].step if self._calls else run.first_step
            run = replace(run, first_step=max(first, run.first_step), resumed=True)
        with self._lock:
            self._given_up = True
            self._calls.clear()

    def _deliver(self, sink: Sink, started: Started) -> None:
        """Make the queued calls; one stays queued until it is done, so that it is made again after a
        failure."""
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._calls or self._closing)
                call = self._calls[0] if self._calls else None
            if call is None:
                sink.close()
                return
            if call.step > started.last_step:
                self._call(sink, call)
            with self._lock:
                self._calls.popleft()

    def _call(self, sink: Sink, call: _Call) -> None:
        """Make a call; one that fails for the second time leaves the queue."""
        try:
            getattr(sink, call.method)(*call.arguments)
        except Exception:
            with self._lock:
                if call is self._failed:
                    self._calls.popleft()
                self._failed = call
            raise

    def _abandon(self) -> None:
        """Leave a sink that has failed."""
        sink = self._sink
        with contextlib.suppress(Exception):  # it has failed already
            end = getattr(sink, "kill", None) or getattr(sink, "close", None)
            if end is not None:
                end()

    def _later(self, seconds: float) -> bool:
        """Wait; whether the run is still on then."""
        with self._lock:
            return not self._lock.wait_for(lambda: self._closing, seconds)

    def _warn(self, text: str, *, complete: bool = True) -> None:
        """Say what is wrong, the first time; `complete`: whether metrics.jsonl has all for sure."""
        if not self._warned:
            self._warned = True
            rest = ", and metrics.jsonl is complete" if complete else ""
            self._tell(f"warning: tracker {self.name} {text}. The run goes on{rest}")

    def _tell(self, text: str) -> None:
        text = without_values(shown(text))[:_LONGEST]
        with self._lock:
            self._news.append(text)


def worded(error: BaseException) -> str:
    """What a tracker has raised, in words: of an error of the operating system the cure too."""
    if isinstance(error, OSError) and error.strerror:
        return describe(error)
    return f"{type(error).__name__}: {error}"


def _is_full(error: Exception) -> bool:
    """Whether the disk is full, which may be that of the run."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def without_values(text: str) -> str:
    """A text without the values of variables of the environment that are secret by their names. One of
    less than eight characters counts as a whole word only, of less than four not at all."""
    values = {
        value
        for name, value in os.environ.items()
        if len(value) >= 4
        and value.lower() not in _WORDS
        and any(part in name.upper() for part in _SECRET)
    }
    for value in sorted(values, key=len, reverse=True):  # one may be a part of another
        whole = re.escape(value)
        text = re.sub(whole if len(value) >= 8 else rf"(?<!\w){whole}(?!\w)", "***", text)
    return text
