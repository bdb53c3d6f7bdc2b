"""Sinks that fail, for `--trackers.use tests.faulty_sinks:NAME`."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmoco.run.events import Event
from fastmoco.telemetry.trackers.interface import Histogram, Sink, Started, TrackedRun


class Raises(Sink):
    """Raises at every write."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        raise ValueError(f"no room for step {step} at https://ann:pass-word@host/x")


class Full(Sink):
    """Writes to a disk that is full."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        with open("/dev/full", "w") as file:
            file.write("1")


class Tells(Sink):
    """Its error has a secret in it."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        raise ValueError(f"MY_SECRET is {os.environ['MY_SECRET']}")


class Exits(Sink):
    """Ends the program, as a tracker does that asks for a login."""

    def start(self, run: TrackedRun) -> Started:
        sys.exit(3)


class Dies(Sink):
    """Its process ends without a word."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        os._exit(9)


class Hangs(Sink):
    """Never returns, holds its interpreter, and ignores signals."""

    def start(self, run: TrackedRun) -> Started:
        import signal

        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        ctypes.PyDLL(None).sleep(3600)  # with the lock of the interpreter
        return Started()


class Spins(Sink):
    """Takes a core for itself."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        while True:
            pass


class HangsAtEnd(Sink):
    """Sends its last word for ever."""

    def close(self) -> None:
        time.sleep(3600)


class HangsAtWrite(Sink):
    """Its first write never returns; notes its process."""

    def start(self, run: TrackedRun) -> Started:
        vars(sys.modules["__main__"])["LAST_S"] = 0.5
        self._folder = run.folder
        return Started()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        with open(f"{self._folder}/called", "w") as file:
            file.write(str(os.getpid()))
        time.sleep(3600)


class Notes(Sink):
    """Writes what it gets into a file of the run, a line of JSON for each call, and its end."""

    def start(self, run: TrackedRun) -> Started:
        self._file = open(f"{run.folder}/notes.txt", "a")  # noqa: SIM115 - closed by close
        self._note("start", run.first_step, run.id, run.resumed)
        return Started(where="notes.txt")

    def _note(self, *words: Any) -> None:
        print(json.dumps(words).replace("NaN", "null"), file=self._file, flush=True)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._note("write", step, dict(metrics))

    def event(self, event: Event) -> None:
        self._note("event", event.step, event.name)

    def picture(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        self._note("picture", step, name, image.shape)

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        self._note("histograms", step, {name: one.counts for name, one in histograms.items()})

    def summary(self, step: int, metrics: Mapping[str, float]) -> None:
        self._note("summary", step, dict(metrics))

    def close(self) -> None:
        print("closed", file=self._file)
        self._file.close()


class Bare:
    """No `Sink`: has some of its methods, and returns nothing."""

    def start(self, run: TrackedRun) -> None:
        self._path = f"{run.folder}/notes.txt"

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        with open(self._path, "a") as file:
            print(step, file=file)


class StartsWrong(Sink):
    """Returns what is no `Started`."""

    def start(self, run: TrackedRun) -> Started:
        return {"where": "here"}  # type: ignore[return-value]


class TakesLess(Sink):
    """Its method has another signature."""

    def write(self, metrics: Mapping[str, float]) -> None:  # type: ignore[override]
        raise NotImplementedError


class SlowNotes(Notes):
    """The same; a write takes a second, and returns what no JSON has."""

    def write(self, step: int, metrics: Mapping[str, float]) -> Any:
        with open(f"{os.path.dirname(self._file.name)}/called", "w") as file:
            file.write(str(os.getpid()))
        time.sleep(1)
        super().write(step, metrics)
        return object()
