"""What will happen in a story: a function of the seed and the number of the story."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

MODES = {"one": (), "ddp": ("--gpus", "2"), "fsdp": ("--gpus", "2", "--parallel.strategy", "fsdp")}
"""Further words of the command, by mode."""
STEPS = 16
"""Steps of every run."""

BEFORE = (
    *("flip", "cut", "empty", "garbage", "zeros", "remove"),
    *("link", "endless link", "pipe", "folder"),
    *("unreadable", "read-only folder", "full disk"),
)
"""What is done to a file before a start."""
LIMITS = ("file size", "open files", "memory")
"""Limits under which one start may run."""
SIGNALS = ("TERM", "INT", "HUP", "USR1", "USR2", "XCPU", "TERM twice", "INT twice")
LIVE = ("kill", "stop", *SIGNALS)
"""What is done to a process during a start."""
_RANKS = ("run", "agent", "rank 0", "rank 1")
WHOM = {"one": ("run",), "ddp": _RANKS, "fsdp": _RANKS}
"""Which process is killed or stopped, by mode."""
WHERE = (
    *("checkpoint", "checkpoint", "checkpoint", "metrics", "config", "starts", "mark", "lock"),
    *("curves", "quarantine", "log", "index", "manifest", "list beside the shards"),
)
"""Which file is damaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happens.

    Attributes:
        number: counted over all stories.
        what: of `BEFORE`, `LIMITS` or `LIVE`.
        whom: the process, or the file.
        moment: of a process: "start", "step", "save" or "end".
        at: seconds after the start, or the step.
        seed: for what else is drawn: the bit, the length, the pause.
    """

    number: int
    what: str
    whom: str
    moment: str = ""
    at: float = 0.0
    seed: int = 0

    def __str__(self) -> str:
        when = {"start": f" {self.at:.2f} s after the start", "step": f" at step {self.at:.0f}"}
        later = {"save": " in a save", "end": " at the end"}
        return f"{self.what} {self.whom}{(when | later).get(self.moment, '')}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One start of the command: what is done before it, its limit, and what is done during it.

    Attributes:
        command: whether it is a process of its own interpreter, not a forked one; with several
            processes always.
    """

    before: Event | None = None
    limit: Event | None = None
    live: Event | None = None
    command: bool

    @property
    def events(self) -> list[Event]:
        """Of this start, in order."""
        return [event for event in (self.before, self.limit, self.live) if event is not None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """One run and what happens to it."""

    number: int
    mode: str
    rounds: tuple[Round, ...]

    @property
    def events(self) -> list[Event]:
        """All of them, in order."""
        return [event for one in self.rounds for event in one.events]


def stories(seed: int) -> Iterator[Story]:
    """All stories of a seed, without end."""
    number = events = 0
    while True:
        story = _story(Random(f"{seed} {number}"), number, events)
        yield story
        number += 1
        events += len(story.events)


def _story(rng: Random, number: int, first: int) -> Story:
    mode = ("one", "ddp", "one", "fsdp", "one")[number % 5]
    rounds: list[Round] = []
    count = rng.randint(3, 5)
    for i in range(count):
        before = rng.random() < 0.65 and (i > 0 or rng.random() < 0.3)
        limit = not before and rng.random() < 0.25
        drawn = []
        if before:
            drawn.append(_before(rng))
        if limit:
            drawn.append(
                Event(number=0, what=rng.choice(LIMITS), whom="run", seed=rng.getrandbits(30))
            )
        if not drawn or rng.random() < 0.75:
            drawn.append(_live(rng, mode, i, count))
        drawn = [_numbered(event, first + k) for k, event in enumerate(drawn)]
        first += len(drawn)
        kinds = {"before": BEFORE, "limit": LIMITS, "live": LIVE}
        found = {
            name: next((event for event in drawn if event.what in those), None)
            for name, those in kinds.items()
        }
        rounds.append(Round(**found, command=mode != "one" or rng.random() < 0.2))
    return Story(number=number, mode=mode, rounds=tuple(rounds))


def _before(rng: Random) -> Event:
    what = rng.choice(BEFORE)
    whom = {"read-only folder": rng.choice(("run", "checkpoints")), "full disk": "run"}
    return Event(
        number=0, what=what, whom=whom.get(what) or rng.choice(WHERE), seed=rng.getrandbits(30)
    )


def _live(rng: Random, mode: str, i: int, count: int) -> Event:
    moment = rng.choices(("start", "step", "save", "end"), (3, 6, 3, 1))[0]
    step = 1 + (STEPS - 2) * (i + rng.random()) / count
    at = {"start": rng.random() * (1.0 if mode == "one" else 6.0), "step": float(int(step))}
    what = rng.choices(LIVE, (6, 3, *[1] * len(SIGNALS)))[0]
    # Signals are for the process that a person knows; the others are found by the kernel.
    whom = rng.choice(WHOM[mode]) if what in ("kill", "stop") else "run"
    return Event(
        number=0,
        what=what,
        whom=whom,
        moment=moment,
        at=at.get(moment, step),
        seed=rng.getrandbits(30),
    )


def _numbered(event: Event, number: int) -> Event:
    return Event(
        number=number,
        what=event.what,
        whom=event.whom,
        moment=event.moment,
        at=event.at,
        seed=event.seed,
    )
