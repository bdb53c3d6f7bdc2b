"""Plays one story: starts, disturbs and cures a run until it has finished, and compares its end."""

from __future__ import annotations

import os
import re
import resource
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from benchmarks.chaos.cures import cure
from benchmarks.chaos.damage import Folder
from benchmarks.chaos.ends import End, differences, end_of, row_differences
from benchmarks.chaos.plan import MODES, STEPS, Event, Round, Story
from benchmarks.chaos.processes import Command, wait_until
from fastmoco.errors import EXIT_FINISHED, RunError

SILENT_SECONDS = 60.0
"""A command that prints nothing for so long hangs."""
_MOST_TRIES = 12
_STEP = re.compile(rf"^step (\d+)/{STEPS} ", re.MULTILINE)
_BANNER = re.compile(r"importing torch, then|processes on the CPU|to continue: |^step \d+/")
_SECONDS = {"TERM": 2.2, "INT": 0.7}  # after which a second signal counts


def words_of(mode: str) -> list[str]:
    """The command of a mode."""
    return [
        *("train", "quickstart_digits", "--out", "run", "--data.shards", "data/train-000000.tar"),
        *("--epochs", str((STEPS + 0.4) / 22), "--optim.warmup-epochs", "0", "--threads", "1"),
        *("--global-batch-size", "64", "--device", "cpu", "--knn.test-shards="),
        *("--checkpoint.every-steps", "3", "--log-every-steps", "1"),
        *MODES[mode],
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Happened:
    """One event that took place.

    Attributes:
        event: as planned.
        to: the file or process.
        outcome: how its start of the command ended.
        seconds: from the event to that end.
    """

    event: Event
    to: str
    outcome: str
    seconds: float


@dataclass(kw_only=True)
class Told:
    """What came of a story.

    Attributes:
        story: as planned.
        happened: the events that took place.
        silent: differences without a word, in words.
        excused: rows of the metrics that differ, after an event that damaged them.
        refusals: starts that were refused by name.
        tracebacks: starts that printed one.
        cures: what was done because a message said so.
        left: processes that outlived their command by 10 s.
        hangs: commands without any output for 60 s.
        stuck: the last output of a run that could not be finished.
        runs: that were finished and compared.
        seconds: of the story.
    """

    story: Story
    happened: list[Happened] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    excused: list[str] = field(default_factory=list)
    refusals: int = 0
    tracebacks: list[str] = field(default_factory=list)
    cures: list[str] = field(default_factory=list)
    left: int = 0
    hangs: int = 0
    stuck: str = ""
    runs: int = 0
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        """Whether it ended as it must."""
        return not (self.silent or self.left or self.hangs or self.stuck or self.tracebacks)


def undisturbed(mode: str, folder: Path, shards: Path) -> End:
    """The end of the run of a mode to which nothing happens.

    Raises:
        RunError: if it does not finish.
    """
    place = Folder(folder, shards)
    command = Command(
        words_of(mode), place.path, place.path / "log", limits={}, forked=mode == "one"
    )
    while command.poll() is None:
        time.sleep(0.02)
    command.end_left()
    if command.poll() != EXIT_FINISHED:
        raise RunError(f"the undisturbed run of {mode} has failed:\n{command.text()}")
    return end_of(place.run)


def play(story: Story, folder: Path, shards: Path, truth: End, *, last: int | None = None) -> Told:
    """Play a story.

    Args:
        story: what happens.
        folder: does not exist; stays.
        shards: folder of the set, which is copied.
        truth: the end of the undisturbed run.
        last: number of the last event that happens; None: all do.
    """
    told = Told(story=story)
    began = time.monotonic()
    player = _Player(told, Folder(folder, shards))
    try:
        for one in story.rounds:
            if last is None or one.events[0].number <= last:
                if player.finished and one.live is not None:  # there is no step left to disturb
                    player.compare(truth)
                    player.folder.begin_again()
                player.start(one, last)
        player.finish()
        if not told.stuck:
            player.compare(truth)
    finally:
        player.folder.make_room()
        told.seconds = time.monotonic() - began
    return told


class _Player:
    def __init__(self, told: Told, folder: Folder) -> None:
        self.told = told
        self.folder = folder
        self._mode = told.story.mode
        self._words = words_of(self._mode)
        self._starts = 0
        self.finished = False

    def start(self, one: Round, last: int | None = None) -> int:
        """One start of the command, and what happens around it; its exit code.

        Args:
            one: what happens.
            last: number of the last event that does; None: all do.
        """
        before, limit, live = (
            event if event is not None and (last is None or event.number <= last) else None
            for event in (one.before, one.limit, one.live)
        )
        forked = self._mode == "one" and not one.command
        happened: list[tuple[Event, str, float]] = []
        if before is not None and (to := self.folder.damage(before)):
            happened.append((before, to, time.monotonic()))
        limits: dict[int, int] = {}
        if limit is not None:
            limits = self._limits(limit)
            self.folder.touched.add(limit.what)
            happened.append((limit, ", ".join(f"{v:,}" for v in limits.values()), time.monotonic()))
        self._starts += 1
        log = self.folder.path / f"log-{self._starts}"
        command = Command(self._words, self.folder.path, log, limits=limits, forked=forked)
        try:
            if live is not None and self._wait_for_moment(command, live):
                pid = command.find(live.whom)
                if pid is not None:
                    happened.append((live, f"process {pid}", time.monotonic()))
                    self._disturb(command, live, pid)
            code = self._end(command)
        finally:
            self.told.left += command.end_left()
        self.finished = code == EXIT_FINISHED
        outcome = self._outcome(code, command.text(), limited=bool(limits))
        for event, to, at in happened:
            self.told.happened.append(
                Happened(event=event, to=to, outcome=outcome, seconds=time.monotonic() - at)
            )
        return code

    def finish(self) -> None:
        """The same command without events until it has finished."""
        for _ in range(_MOST_TRIES):
            code = self.start(Round(command=False))
            if code == EXIT_FINISHED:
                return
        self.told.stuck = self._last_text()[-1500:]

    def compare(self, truth: End) -> None:
        """Note what differs from the undisturbed run."""
        self.told.runs += 1
        try:
            end = end_of(self.folder.run)
        except RunError as error:
            self.told.silent.append(str(error))
            return
        self.told.silent += differences(end, truth)
        rows = row_differences(end, truth)
        damaged = self.folder.touched & {"metrics", "disk", "file size"}
        (self.told.excused if damaged else self.told.silent).extend(f"metrics: {r}" for r in rows)
        if self.folder.precious_is_changed():
            self.told.silent.append("a file outside of the run was changed")

    def _limits(self, event: Event) -> dict[int, int]:
        rng = Random(event.seed)
        if event.what == "file size":
            return {resource.RLIMIT_FSIZE: rng.choice((0, 4096, 100_000, 2 << 20))}
        if event.what == "open files":
            return {resource.RLIMIT_NOFILE: rng.randint(8, 60)}
        return {resource.RLIMIT_AS: rng.randint(1 << 20, 400 << 20)}

    def _wait_for_moment(self, command: Command, event: Event) -> bool:
        """Wait for the moment of an event; False if the command ends before."""
        pause = Random(event.seed).random() * 0.05
        conditions: dict[str, Callable[[], bool]] = {
            "start": lambda: time.monotonic() > command.began + event.at,
            "step": lambda: any(int(s) >= event.at for s in _STEP.findall(command.text())),
            "save": lambda: any((self.folder.run / "checkpoints").glob(".writing-*")),
            "end": lambda: "finished after" in command.text(),
        }
        if not wait_until(conditions[event.moment], command, SILENT_SECONDS):
            return False
        if event.moment == "step":
            time.sleep(pause)
        return command.poll() is None

    def _disturb(self, command: Command, event: Event, pid: int) -> None:
        with suppress(ProcessLookupError):
            if event.what == "kill":
                os.kill(pid, signal.SIGKILL)
            elif event.what == "stop":
                os.kill(pid, signal.SIGSTOP)
                time.sleep(0.2 + 2.5 * Random(event.seed).random())
                os.kill(pid, signal.SIGCONT)
            else:
                name, _, twice = event.what.partition(" ")
                number = signal.Signals[f"SIG{name}"]
                os.kill(pid, number)
                if twice:
                    wait_until(lambda: False, command, _SECONDS[name])
                    if command.poll() is None:
                        os.kill(pid, number)

    def _end(self, command: Command) -> int:
        """Exit code of a command, which is killed if it is silent for too long."""
        size, since = -1, time.monotonic()
        while (code := command.poll()) is None:
            now = command.log.stat().st_size
            if now != size:
                size, since = now, time.monotonic()
            if time.monotonic() - since > SILENT_SECONDS:
                self.told.hangs += 1
                command.kill()
            time.sleep(0.02)
        return code

    def _outcome(self, code: int, text: str, *, limited: bool) -> str:
        """How a start has ended, in words; does the cure of a refusal.

        Args:
            code: exit code.
            text: the output.
            limited: whether it ran under a limit. Too little memory may end it anywhere, with a
                traceback.
        """
        if "Traceback (most recent call last)" in text and not limited:
            self.told.tracebacks.append(text.strip().splitlines()[-1][:300])
        if code == EXIT_FINISHED:
            return "finished"
        lines = [line for line in text.splitlines() if line.strip() and not _BANNER.search(line)]
        said = f": {lines[-1].removeprefix('fastmoco: ')[:160]}" if lines else ""
        if code in (1, 2):
            self.told.refusals += code == 2
            done = cure(text, self.folder, self._words)
            if done:
                self.told.cures.append(done)
                said += f" -> {done}"
        return f"code {code}{said}"

    def _last_text(self) -> str:
        return (self.folder.path / f"log-{self._starts}").read_text(errors="replace")
