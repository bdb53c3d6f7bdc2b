"""Disposable processes that decode: a crash, a hang or a bomb costs one sample, which is named, and
one process."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

from fastmoco_pipelines.errors import DecoderBrokenError
from fastmoco_pipelines.processes import child_environment, python_command
from fastmoco_pipelines.spec import SECONDS_PER_IMAGE

MODULE = "fastmoco_pipelines.views.decode_child"
_BATCH = 16
_START_SECONDS = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildLimits:
    """What one image may cost.

    Attributes:
        memory_bytes: beyond what the process needs when idle. The largest image that is let in
            takes less than 1 GB.
        seconds: wall-clock time of one image.
    """

    memory_bytes: int = 2 << 30
    seconds: float = SECONDS_PER_IMAGE


@dataclass(frozen=True, slots=True)
class Item:
    """Bytes to decode: their position, and the crc32 that they should have (None: unknown)."""

    path: str
    offset: int
    size: int
    crc32: int | None = None


@dataclass(frozen=True, slots=True)
class Decoded:
    """What became of an item: `kind` is empty for a good image; `listed`: an index would list it;
    `shape` is (height, width) in pixels by its header; `crc32` is None if the process died."""

    kind: str
    reason: str
    listed: bool
    crc32: int | None
    shape: tuple[int, int] | None


class _ChildEndedError(Exception):
    """A child crashed, hung or was killed; the text names which."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class DecodePool:
    """A number of children, and the threads that feed them.

    Attributes:
        restarts: children that ended at work.

    Args:
        workers: children at a time.
        limits: for each image.
        module: what a child runs; it has the protocol of `decode_child`.
    """

    def __init__(
        self, workers: int, limits: ChildLimits | None = None, module: str = MODULE
    ) -> None:
        self.restarts = 0
        self._limits = limits or ChildLimits()
        self._module = module
        self._idle: list[_Child] = []
        self._busy: set[_Child] = set()
        self._workers = workers
        self._lock = threading.Lock()
        self._closed = False

    def run(
        self, items: Sequence[Item], advance: Callable[[Item], None] | None = None
    ) -> list[Decoded]:
        """Decode all items; result i belongs to item i. `advance` is called, in any thread, as each
        is done.

        Raises:
            DecoderBrokenError: if a child cannot be started at all.
        """
        results: list[Decoded | None] = [None] * len(items)
        starts = iter(range(0, len(items), _BATCH))

        def work() -> None:
            while (start := self._next(starts)) is not None:
                for i, result in enumerate(self._decode(items[start : start + _BATCH]), start):
                    results[i] = result
                    if advance is not None:
                        advance(items[i])

        threads = min(self._workers, -(-len(items) // _BATCH))
        if threads:
            with ThreadPoolExecutor(threads, thread_name_prefix="fastmoco-check") as pool:
                try:
                    for future in [pool.submit(work) for _ in range(threads)]:
                        future.result()
                except BaseException:
                    self.close()  # so that no thread waits for a child
                    raise
        return [result for result in results if result is not None]

    def close(self) -> None:
        """End all children."""
        with self._lock:
            self._closed = True
            children = [*self._idle, *self._busy]
            self._idle.clear()
        for child in children:
            child.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _next(self, starts: Iterator[int]) -> int | None:
        with self._lock:
            return None if self._closed else next(starts, None)

    def _decode(self, items: Sequence[Item]) -> Iterator[Decoded]:
        done = 0
        while done < len(items):
            try:
                for result in self._ask(items[done:]):
                    done += 1
                    yield result
            except _ChildEndedError:
                # The heap may have been corrupted by an earlier image: only an image that fails in
                # a fresh process is to blame.
                yield self._alone(items[done])
                done += 1

    def _alone(self, item: Item) -> Decoded:
        try:
            child = self._start()
            try:
                (result,) = child.ask([item])
                return result
            finally:
                self._give_back(child)
        except _ChildEndedError as ended:
            self.restarts += 1
            return Decoded(ended.kind, str(ended), True, item.crc32, None)

    def _ask(self, items: Sequence[Item]) -> Iterator[Decoded]:
        with self._lock:
            child = self._idle.pop() if self._idle else None
            if child is not None:
                self._busy.add(child)
        child = child or self._start()
        try:
            yield from child.ask(items)
        except _ChildEndedError:
            self.restarts += 1
            raise
        finally:
            self._give_back(child)

    def _start(self) -> _Child:
        if self._closed:
            raise RuntimeError("the check was stopped")
        child = _Child(self._module, self._limits)
        with self._lock:
            self._busy.add(child)
        child.wait_until_ready()
        return child

    def _give_back(self, child: _Child) -> None:
        with self._lock:
            self._busy.discard(child)
            if child.alive and not self._closed:
                self._idle.append(child)
                return
        child.kill()


def _not_started(why: object) -> str:
    return (
        f"the decoding process does not start: {why}; start the same command again, "
        "and see the kernel's log (dmesg) if it happens again"
    )


class _Child:
    """One process and its two pipes. One thread at a time uses it."""

    def __init__(self, module: str, limits: ChildLimits) -> None:
        self._limits = limits
        self._rest = b""
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter and our own module
            python_command(module),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=child_environment(OMP_NUM_THREADS="1"),
        )
        self.alive = True

    def wait_until_ready(self) -> None:
        """Send the limits and wait until libraries are loaded."""
        limits = {
            "memory_bytes": self._limits.memory_bytes,
            "cpu_seconds": int(4 * self._limits.seconds) + 1,
        }
        try:
            self._send(limits)
            answer = self._receive(_START_SECONDS)
        except _ChildEndedError as ended:
            raise DecoderBrokenError(_not_started(ended)) from ended
        if "failed" in answer:
            self.kill()
            raise DecoderBrokenError(_not_started(answer["failed"]))

    def ask(self, items: Sequence[Item]) -> Iterator[Decoded]:
        """What became of the items, in order; a child that is left in the middle of a batch cannot
        be used again."""
        finished = False
        try:
            self._send([[item.path, item.offset, item.size, item.crc32] for item in items])
            for _ in items:
                answer = self._receive(self._limits.seconds)
                shape = answer["shape"]
                yield Decoded(
                    answer["kind"],
                    answer["reason"],
                    answer["listed"],
                    answer["crc32"],
                    (shape[0], shape[1]) if shape else None,
                )
            finished = True
        finally:
            if not finished:
                self.kill()

    def kill(self) -> None:
        """End the process; may be called by any thread, and again."""
        self.alive = False
        self._process.kill()
        self._process.wait()

    def _send(self, content: Any) -> None:
        assert self._process.stdin is not None  # noqa: S101 - a type: it was opened with a pipe
        with suppress(OSError):  # if it has ended, reading finds out how
            self._process.stdin.write(json.dumps(content).encode("ascii") + b"\n")

    def _receive(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None  # noqa: S101 - a type: it was opened with a pipe
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + seconds
        while b"\n" not in self._rest:
            # What has arrived counts, even if this process comes late to read it.
            left = max(0.0, deadline - time.monotonic())
            if not select.select([descriptor], [], [], left)[0]:
                self.kill()
                raise _ChildEndedError("hang", f"the decoder did not finish within {seconds:g} s")
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                raise self._ended()
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ended(self) -> _ChildEndedError:
        self.alive = False
        code = self._process.wait()
        if code == -signal.SIGXCPU:
            return _ChildEndedError("hang", "the decoder used up its processor time")
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return _ChildEndedError("crash", f"the decoder's process ended ({how})")
