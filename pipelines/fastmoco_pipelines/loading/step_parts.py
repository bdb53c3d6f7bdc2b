"""The named parts of a training step, for profiles: where the time of a step goes.

Code marks what it does by `with part(LOSS): ...`. Without a profile a mark costs a fraction of a
microsecond and does nothing. In a profile (`collecting`) it adds wall time and processor time of
its thread to a collector, and opens a range of torch's profiler. Marks may be nested: an inner one
takes its time out of the outer one, so the parts of a thread add up. Marks are outside of compiled
code and do not change a number.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

READ, DECODE, AUGMENT, TRANSFER = "read", "decode", "augment", "transfer"
QUERY_FORWARD, KEY_FORWARD, LOSS = "query forward", "key forward", "loss"
BACKWARD, OPTIMIZER, EMA, LOG = "backward", "optimizer", "EMA", "log"
PARTS = {
    READ: "bytes of the images, from files or the network",
    DECODE: "encoded images to pixels; also the views, where DALI makes them",
    AUGMENT: "draws of the augmentations, and views cut from decoded images",
    TRANSFER: "batches to the device, and to the type that the encoder reads",
    QUERY_FORWARD: "the encoder that trains, with its heads; in micro-batches also its second pass",
    KEY_FORWARD: "the momentum encoder, with its heads",
    LOSS: "gathered keys, logits and loss",
    BACKWARD: "gradients of all of it, with their average over ranks",
    OPTIMIZER: "gradient norms, the check for finite numbers, clipping and the update; contains "
    "the EMA where one sweep does both",
    EMA: "the update of the momentum encoder, where it is a pass of its own",
    LOG: "metrics, and what the trainer records after a step",
}
"""The parts of a step in their order, and what belongs to each."""
RANGE = "part: "
"""Before the name of a part in the ranges of torch's profiler."""

_NOTHING: AbstractContextManager[None] = nullcontext()
_READINGS, _READING_SECONDS = 10, 1e-3


@dataclass(slots=True)
class PartFigures:
    """What a part has taken.

    Attributes:
        calls: how often it ran.
        wall_s: seconds from its start to its end.
        cpu_s: processor seconds of its thread, and of the helpers that the thread employs.
    """

    calls: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0


class Collector:
    """Adds up the parts of all threads. Made by `collecting`.

    Args:
        ranges: open a range of torch's profiler for each part.
        helpers: count the processor time of threads without marks (of DALI, of a pool) to the
            loader's parts that employ them. Right only where nothing else has threads of its own:
            torch with one thread. Linux only.
    """

    def __init__(self, *, ranges: bool = False, helpers: bool = False) -> None:
        self._helpers = helpers and os.path.exists("/proc/self/schedstat")
        self._open_range: Callable[[str], AbstractContextManager[Any]] | None = None
        if ranges:
            from torch.profiler import record_function

            self._open_range = record_function
        self._local = threading.local()
        self._lock = threading.Lock()
        self._threads: list[_Thread] = []
        self._wall = time.perf_counter()
        self._cpu = time.process_time()
        self._own_thread()  # the caller's, so that no helper's clock counts it

    def figures(self) -> dict[str, PartFigures]:
        """The figures of every part that ran, in the order of `PARTS`; others follow."""
        found: dict[str, PartFigures] = {}
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            for name, own in list(thread.figures.items()):
                total = found.setdefault(name, PartFigures())
                total.calls += own.calls
                total.wall_s += own.wall_s
                total.cpu_s += own.cpu_s
        order = [*PARTS, *found]
        return {name: found[name] for name in dict.fromkeys(order) if name in found}

    @property
    def wall_s(self) -> float:
        """Seconds since the collector was made."""
        return time.perf_counter() - self._wall

    @property
    def cpu_s(self) -> float:
        """Processor seconds of the process since the collector was made."""
        return time.process_time() - self._cpu

    def current(self) -> str | None:
        """The innermost part that this thread is in."""
        stack = self._own_thread().stack
        return stack[-1].name if stack else None

    def enter(self, name: str, helpers: bool) -> _Mark:
        """A mark that is entered by `with`."""
        return _Mark(self, name, helpers and self._helpers)

    def _own_thread(self) -> _Thread:
        found: _Thread | None = getattr(self._local, "thread", None)
        if found is None:
            found = self._local.thread = _Thread()
            with self._lock:
                self._threads.append(found)
        return found

    def _others_cpu(self, own: _Thread) -> float:
        """Processor seconds of all other threads that have marks, each since its first one."""
        with self._lock:
            return sum(thread.cpu() for thread in self._threads if thread is not own)


class _Thread:
    """The parts of one thread. Only this thread writes them."""

    def __init__(self) -> None:
        self.figures: dict[str, PartFigures] = {}
        self.stack: list[_Mark] = []
        self._last = 0.0
        self._account = f"/proc/self/task/{threading.get_native_id()}/schedstat"
        # A thread may have its first mark while another one is in a part with helpers: what it has
        # done before must not be taken from that part.
        self._before = 0.0
        self._before, self._last = self.cpu(), 0.0

    def cpu(self) -> float:
        """Processor seconds of this thread since its first mark, asked by any thread; of one that has
        ended, the last answer.

        As the process's own clock counts them: up to the last tick of the scheduler, which is
        milliseconds ago. The thread's own clock goes up to now, and the difference of the two would
        be wrong by that.
        """
        with contextlib.suppress(OSError), open(self._account, "rb") as account:
            self._last = int(account.read().split()[0]) / 1e9 - self._before
        return self._last


class _Mark:
    """One part under way."""

    __slots__ = ("_collector", "_cpu", "_helpers", "_inner", "_range", "_thread", "_wall", "name")

    def __init__(self, collector: Collector, name: str, helpers: bool) -> None:
        self._collector = collector
        self._helpers = helpers
        self.name = name

    def __enter__(self) -> None:
        self._thread = self._collector._own_thread()
        self._thread.stack.append(self)
        self._inner = [0.0, 0.0]
        self._range = None
        if self._collector._open_range is not None:
            self._range = self._collector._open_range(RANGE + self.name)
            self._range.__enter__()
        self._wall = time.perf_counter()
        self._cpu = self._clock()

    def __exit__(self, *_: object) -> None:
        cpu = self._clock() - self._cpu
        wall = time.perf_counter() - self._wall
        if self._range is not None:
            self._range.__exit__(None, None, None)
        thread = self._thread
        thread.stack.pop()
        figures = thread.figures.setdefault(self.name, PartFigures())
        figures.calls += 1
        figures.wall_s += wall - self._inner[0]
        figures.cpu_s += cpu - self._inner[1]

        # The part around this one does not count this time again.
        if thread.stack:
            outer = thread.stack[-1]._inner
            outer[0] += wall
            outer[1] += cpu

    def _clock(self) -> float:
        if not self._helpers:
            return time.thread_time()

        # Other threads go on between the two readings: where this one lost its core meanwhile, again.
        for _ in range(_READINGS):
            before = time.process_time()
            others = self._collector._others_cpu(self._thread)
            after = time.process_time()
            if after - before < _READING_SECONDS:
                break
        return (before + after) / 2 - others


_collector: Collector | None = None


def part(name: str, *, helpers: bool = False) -> AbstractContextManager[None]:
    """Mark what runs in the context as a part of a step.

    Args:
        name: one of `PARTS`.
        helpers: whether threads without marks of their own work for it, as DALI's do.
    """
    collector = _collector
    return _NOTHING if collector is None else collector.enter(name, helpers)


@contextmanager
def collecting(*, ranges: bool = False, helpers: bool = False) -> Iterator[Collector]:
    """Measure the parts of all threads while the context is open.

    Args:
        ranges: as of `Collector`.
        helpers: as of `Collector`.

    Raises:
        RuntimeError: if parts are being measured already.
    """
    global _collector
    if _collector is not None:
        raise RuntimeError("the parts of a step are being measured already")
    collector = _collector = Collector(ranges=ranges, helpers=helpers)
    try:
        yield collector
    finally:
        _collector = None


def shares(figures: Mapping[str, PartFigures], cpu_s: float) -> dict[str, float]:
    """The share of each part in the processor time of the process, and of the rest."""
    known = {name: own.cpu_s / cpu_s if cpu_s > 0 else 0.0 for name, own in figures.items()}
    return known | {"rest": max(0.0, 1.0 - sum(known.values()))}
