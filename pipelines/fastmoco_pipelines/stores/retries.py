"""How long a transfer may take, and how often it is tried: again after growing pauses, until its
time is over."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from fastmoco_pipelines.errors import PassingError, RemoteError, StoppedError, WrongContentError
from fastmoco_pipelines.text import redact, split_url

T = TypeVar("T")
_told: set[str] = set()  # hosts; a set, so that a hundred transfers of a run leave one line
_lock = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of a transfer; the defaults give up on a dead server after about two minutes."""

    connect_seconds: float = 15
    """Until a connection is established."""
    respond_seconds: float = 60
    """From the request until the head of the answer is complete."""
    read_seconds: float = 30
    """Between two pieces of a body."""
    speed_seconds: float = 30
    """Over which the speed is judged."""
    min_bytes_per_s: float = 16_384
    """A body slower than this is cut off and continued by another request."""
    deadline_seconds: float = 600
    """For one file with all its retries, and 1 s more for each 10^6 bytes of it."""
    attempts: int = 8
    """Tries in a row without a byte of progress."""
    wrong_attempts: int = 3
    """Tries that end with other bytes than the index or the manifest promise."""
    first_delay_seconds: float = 0.5
    """Pause after the first failure; doubled with each one, and shortened by up to a half at
    random."""
    max_delay_seconds: float = 30
    """Longest pause."""


def retried(
    url: str,
    limits: Limits,
    deadline: float,
    stop: threading.Event,
    attempt: Callable[[], T],
    arrived: Callable[[], int] = lambda: 0,
    failed: Callable[[PassingError], None] = lambda error: None,
) -> T:
    """The result of the first attempt that succeeds. An attempt that received further bytes does
    not count as a failure.

    Args:
        url: of the file.
        limits: tries and pauses.
        deadline: of `time.monotonic()`: no try begins after it.
        stop: set when the result is no longer needed.
        attempt: one try, which raises PassingError where another one may succeed.
        arrived: returns the number of bytes received so far.
        failed: called with every error that may pass.

    Raises:
        RemoteError: the attempt's own, or its last PassingError with what was tried.
        StoppedError: if `stop` was set in a pause.
    """
    began = time.monotonic()
    failures = 0
    wrong = 0
    tries = 0
    most = arrived()
    while True:
        tries += 1
        try:
            return attempt()
        except PassingError as error:
            failed(error)
            wrong += isinstance(error, WrongContentError)
            failures = 1 if arrived() > most else failures + 1
            most = max(most, arrived())
            pause = min(
                limits.max_delay_seconds, limits.first_delay_seconds * 2.0 ** (failures - 1)
            )
            share = random.uniform(0.5, 1.0)  # noqa: S311 - only spreads retries
            pause = max(pause * share, error.retry_after)
            over = failures >= limits.attempts or wrong >= limits.wrong_attempts
            if over or time.monotonic() + pause > deadline:
                seconds = time.monotonic() - began
                raise RemoteError(
                    f"{error}; given up after {tries} tries in {seconds:.0f} s"
                ) from None
            _tell_once(
                url, f"{error}; trying again, up to {limits.attempts - 1} times without progress"
            )
        if stop.wait(pause):
            raise StoppedError(f"{redact(url)}: not read to its end, the loader was closed")


def _tell_once(url: str, message: str) -> None:
    """Log the first failure of each host in this process: without it, pauses would look like a
    hang."""
    host = split_url(redact(url))[0]
    with _lock:
        if host in _told:
            return
        _told.add(host)
    logging.getLogger(__name__).warning(message)
