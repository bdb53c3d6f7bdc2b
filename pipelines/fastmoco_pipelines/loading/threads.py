"""The two threads of a training loader, and how they end: on `stop`, at the exit of the
interpreter, or with an error. They reference a source of batches and the queues, but not the loader
that the trainer holds.
"""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch

from fastmoco_pipelines.views.runtime import load_dali

if TYPE_CHECKING:
    from fastmoco_pipelines.loading.batch import Batch
    from fastmoco_pipelines.loading.source import Prepared, Source

    Readings = queue.Queue[Prepared | BaseException]
    Results = queue.Queue[Batch | BaseException]

POLL_SECONDS = 0.2
_EXIT_SECONDS = 5.0

Item = TypeVar("Item")


class BatchPlaces:
    """Room for the batches ahead of the trainer where memory is short, as on a GPU: the batch that
    is being made counts.

    A batch takes a place before it is made, and the trainer gives it back when it takes the batch.
    The trainer's work on the batch before may not have ended by then. `wait` waits for it before
    memory is allocated, so that the allocator can reuse that batch's memory.
    """

    def __init__(self, count: int) -> None:
        self._free: queue.Queue[Callable[[], object]] = queue.Queue()
        for _ in range(count):
            self._free.put(_nothing)
        self._ended: Callable[[], object] = _nothing

    def take(self, stop: threading.Event) -> bool:
        """Wait for a free place; whether there was one before the end."""
        while not stop.is_set():
            with contextlib.suppress(queue.Empty):
                self._ended = self._free.get(timeout=POLL_SECONDS)
                return True
        return False

    def give(self, device: torch.device) -> None:
        """Give a place back, in the trainer's thread; `wait` waits for what its current stream
        contains now."""
        if device.type != "cuda":
            self._free.put(_nothing)
            return
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(device))
        self._free.put(done.synchronize)

    def wait(self) -> None:
        """Wait until the memory is free that belongs to the place taken last."""
        self._ended()


def _nothing() -> None:
    """For a place whose memory was never used, or is the CPU's."""


def read_steps(source: Source, start_step: int, read: Readings, stop: threading.Event) -> None:
    """The reading thread: the bytes and draws of every step until `stop` is set."""
    try:
        steps = source.steps(start_step)
        # Without a name for the step: a name would keep it in memory while the next one is read.
        while put(read, next(steps), stop):
            continue
    # Every error must reach the trainer, which would wait indefinitely otherwise.
    except BaseException as error:
        put(read, error, stop)


def make_batches(source: Source, read: Readings, results: Results, stop: threading.Event) -> None:
    """The producing thread: batches until `stop` is set; an error goes to the trainer in a batch's
    place."""
    thread = threading.current_thread()

    def end() -> None:
        stop.set()
        thread.join(_EXIT_SECONDS)

    try:
        load_dali()  # before the handler below, which must run before DALI's
        atexit.register(end)  # the interpreter must not take DALI down while it works here
        while not stop.is_set():
            try:
                prepared = read.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            if isinstance(prepared, BaseException):
                raise prepared
            if source.places is not None and not source.places.take(stop):
                return
            put(results, source.render(prepared), stop)
    except BaseException as error:  # as above
        put(results, error, stop)
    finally:
        atexit.unregister(end)


def put(results: queue.Queue[Item], item: Item, stop: threading.Event) -> bool:
    """Whether there was room before the end."""
    while not stop.is_set():
        try:
            results.put(item, timeout=POLL_SECONDS)
            return True
        except queue.Full:
            continue
    return False
