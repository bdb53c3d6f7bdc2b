"""Forked processes that give inputs to parsers: a crash, a hang or a bomb costs one process, and is
an outcome of its input."""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import select
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from benchmarks.fuzz.judged import pith
from benchmarks.fuzz.table import all_targets, read_seeds
from benchmarks.fuzz.target import Target, input_of
from fastmoco_pipelines.views.decode_child import limit_memory, limit_time

SECONDS = 5.0
"""Longest processor time of one input, or sleep."""
MEMORY_BYTES = 2 << 30
"""The limit of the operating system on the growth of a process."""
MOST_MIB = 1024
"""More memory than this for one input is a violation."""
_BATCH = 32
_START_SECONDS = 30.0  # of a library


class Job(NamedTuple):
    """One input: its target, its number, the seed of all."""

    target: str
    number: int
    seed: int


class Outcome(NamedTuple):
    """What became of an input: in a word, in detail; processor time and growth of memory."""

    kind: str
    detail: str
    ms: int = 0
    mib: int = 0


def run(jobs: Sequence[Job], folder: Path, workers: int) -> Iterator[tuple[Job, Outcome]]:
    """The outcome of every input, in any order.

    Args:
        jobs: the inputs.
        folder: of the sound inputs; its processes make folders of their own in it.
        workers: processes at a time.
    """
    waiting = deque(list(jobs[at : at + _BATCH]) for at in range(0, len(jobs), _BATCH))
    busy: dict[int, _Worker] = {}
    try:
        while waiting or busy:
            while waiting and len(busy) < workers:
                worker = _Worker(folder)
                busy[worker.answers] = worker
                worker.send(waiting.popleft())
            due = min(worker.deadline for worker in busy.values())
            ready = select.select([*busy], [], [], max(0.0, due - time.monotonic()))[0]
            for worker in [busy[descriptor] for descriptor in ready]:
                yield from worker.receive()
            for worker in [one for one in busy.values() if one.ended or not one.jobs or one.late]:
                if not worker.jobs and waiting and not worker.ended:
                    worker.send(waiting.popleft())
                    continue
                del busy[worker.answers]
                cause = worker.close()
                if worker.jobs:
                    # An earlier input may have damaged the heap: only one that fails in a fresh
                    # process is to blame.
                    yield worker.jobs[0], _alone(worker.jobs[0], folder, cause)
                    if worker.jobs[1:]:
                        waiting.append(worker.jobs[1:])
    finally:
        for worker in busy.values():
            worker.close()


def _alone(job: Job, folder: Path, cause: Outcome) -> Outcome:
    """The outcome of an input in a process of its own."""
    worker = _Worker(folder)
    worker.send([job])
    found: list[tuple[Job, Outcome]] = []
    while worker.jobs and not worker.ended and not worker.late:
        if select.select([worker.answers], [], [], max(0.0, worker.deadline - time.monotonic()))[0]:
            found += worker.receive()
    again = worker.close()
    return found[0][1] if found else (again if again.kind else cause)


class _Worker:
    """One forked process and its two pipes."""

    def __init__(self, folder: Path) -> None:
        self.jobs: list[Job] = []
        self.ended = False
        self.deadline = 0.0
        self._before = self._looked = 0.0
        self._rest = b""
        orders, self._orders = os.pipe()
        self.answers, answers = os.pipe()
        sys.stdout.flush()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.close(self._orders)
                _work(folder, orders, answers)
            finally:
                os._exit(0)
        os.close(orders)
        os.close(answers)

    @property
    def late(self) -> bool:
        """Whether an answer is overdue: this process has used the time of an input, or sleeps. One
        that waits for a processor, or is stopped for a moment, is not."""
        if not self.jobs or time.monotonic() < self.deadline:
            return False
        if select.select([self.answers], [], [], 0)[0]:
            return False
        state, used = self._now()
        asleep = state == "S" and used == self._looked
        self._looked = used
        self.deadline = time.monotonic() + 1.0
        return asleep or used - self._before >= SECONDS

    def _now(self) -> tuple[str, float]:
        """State of the process, and its processor time in s."""
        fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        ticks = os.sysconf("SC_CLK_TCK")
        return fields[0], (int(fields[11]) + int(fields[12])) / ticks

    def send(self, jobs: list[Job]) -> None:
        """Order the next inputs."""
        self.jobs = jobs
        starts = any(all_targets()[job.target].warm_up is not None for job in jobs)
        self._wait(SECONDS + (_START_SECONDS if starts else 0.0))
        with suppress(BrokenPipeError):  # its end is found when its answers are read
            os.write(self._orders, json.dumps(jobs).encode("ascii") + b"\n")

    def _wait(self, seconds: float) -> None:
        """Look at the process after so long, unless it answers before."""
        self.deadline = time.monotonic() + seconds
        self._looked = -1.0
        self._before = self._now()[1] + seconds - SECONDS

    def receive(self) -> Iterator[tuple[Job, Outcome]]:
        """The answers that have come."""
        chunk = os.read(self.answers, 1 << 16)
        self.ended = not chunk
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        if lines:
            self._wait(SECONDS)
        for line in lines:
            yield self.jobs.pop(0), Outcome(*json.loads(line))

    def close(self) -> Outcome:
        """End it; how it had ended before, if it had."""
        if not self.ended:
            os.kill(self._pid, signal.SIGKILL)
        os.close(self._orders)
        os.close(self.answers)
        code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        if not self.ended:
            return Outcome("hang", f"no end within {SECONDS:g} s")
        if code == -signal.SIGXCPU:
            return Outcome("hang", "used up its processor time")
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return Outcome("crash", how)


def _work(folder: Path, orders: int, answers: int) -> None:
    """The child: answer until the other side closes."""
    faulthandler.disable()  # a crash is counted, not shown
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    quiet = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(quiet, descriptor)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (to the end of the process)
    warnings.simplefilter("ignore")
    targets = all_targets()
    seeds: dict[str, list[bytes]] = {}
    own = folder / f"worker-{os.getpid()}"
    limited = False
    with open(orders, "rb") as file:
        for line in file:
            for name, number, seed in json.loads(line):
                if name not in seeds:
                    seeds[name] = read_seeds(folder, name)
                    warm_up = targets[name].warm_up
                    if warm_up is not None:  # before memory is limited
                        warm_up()
                if not limited:
                    limit_memory(MEMORY_BYTES, file_bytes=8 << 20)
                    limited = True
                limit_time(int(4 * SECONDS))
                data, sound = input_of(targets, seeds[name], seed, name, number)
                outcome = _examine(targets[name], own, data, sound)
                os.write(answers, json.dumps(outcome).encode("ascii") + b"\n")


def _examine(target: Target, own: Path, data: bytes, sound: bytes) -> Outcome:
    """Give an input to its parser, in an empty folder."""
    own.mkdir(exist_ok=True)
    os.chdir(own)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    kind, detail = _outcome(target, own, data, sound)
    ms = int(1000 * (time.process_time() - began))
    mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    if mib > MOST_MIB:
        kind, detail = "VIOLATION: memory", f"{mib} MiB"
    os.chdir("/")
    shutil.rmtree(own, ignore_errors=True)
    return Outcome(kind, pith(detail.replace(str(own), "")), ms, mib)


def _outcome(target: Target, own: Path, data: bytes, sound: bytes) -> tuple[str, str]:
    try:
        return target.read(own, data, sound), ""
    except target.refusals as error:
        if _is_of_memory(error):  # without a limit it would have taken more
            return "VIOLATION: memory", str(error)
        return "refused by name", str(error)
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        first = (str(error).splitlines() or [""])[0]
        return (
            f"VIOLATION: {type(error).__name__}",
            f"{first} ({Path(last.filename).name}, {last.name})",
        )


def _is_of_memory(error: BaseException | None) -> bool:
    """Whether an error was caused by one of memory."""
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False
