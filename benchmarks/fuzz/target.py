"""What is fuzzed: sound inputs, their changes, a parser, and the errors that it may raise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

Read = Callable[[Path, bytes, bytes], str]
"""Gives an input to a parser: an empty folder to write to, the input, the sound one that it was made
of. Returns what came of it; a text that begins with `VIOLATION` breaks a rule."""
LARGEST = 4 << 20
"""Bytes of an input; what is longer is cut."""
Change = Callable[[Random, bytes, list[bytes]], bytes]
"""Changes a sound input; the last argument has all of the target."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One parser.

    Attributes:
        share: of the inputs, in parts of all.
        seeds: makes the sound inputs.
        change: makes an input of one.
        read: calls the parser.
        refusals: errors by which it may refuse an input.
        warm_up: starts a library with threads, which a fork does not take over; None: there is none.
    """

    share: float
    seeds: Callable[[], list[bytes]]
    change: Change
    read: Read
    refusals: tuple[type[BaseException], ...] = ()
    warm_up: Callable[[], None] | None = None


def random_of(seed: int, target: str, number: int) -> Random:
    """The random numbers of one input, the same on every machine."""
    return Random(f"{seed} {target} {number}")


def input_of(
    targets: dict[str, Target], seeds: list[bytes], seed: int, name: str, number: int
) -> tuple[bytes, bytes]:
    """An input, and the sound one that it was made of."""
    rng = random_of(seed, name, number)
    sound = rng.choice(seeds)
    return targets[name].change(rng, sound, seeds)[:LARGEST], sound
