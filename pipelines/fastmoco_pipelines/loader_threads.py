"""The two threads of a training loader, and how they end: by their own will, by the interpreter's, or with an error.

They know a source of batches and the queues, and nothing of the loader that the trainer holds.
"""

from __future__ import annotations

import atexit
import queue
import threading
from itertools import count
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from fastmoco_pipelines.batch import TwoViewBatch
    from fastmoco_pipelines.loader import Prepared, Source

    Readings = queue.Queue[Prepared | BaseException]
    Results = queue.Queue[TwoViewBatch | BaseException]

POLL_SECONDS = 0.2
_EXIT_SECONDS = 5.0

Item = TypeVar("Item")


def read_steps(source: Source, start_step: int, read: Readings, stop: threading.Event) -> None:
    """The reading thread: the bytes and draws of every step until told to stop."""
    try:
        for step in count(start_step):
            if not put(read, source.prepare(step), stop):
                return
    except BaseException as error:  # whatever it is, the trainer must hear of it instead of waiting for ever
        put(read, error, stop)


def make_batches(source: Source, read: Readings, results: Results, stop: threading.Event) -> None:
    """The producing thread: batches until told to stop; an error goes to the trainer in a batch's place."""
    thread = threading.current_thread()

    def end() -> None:
        stop.set()
        thread.join(_EXIT_SECONDS)

    try:
        import nvidia.dali  # noqa: F401  # registers its exit handler now, so that it runs after the one below

        atexit.register(end)  # the interpreter must not take DALI down while it works here
        while not stop.is_set():
            try:
                prepared = read.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            if isinstance(prepared, BaseException):
                raise prepared
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
