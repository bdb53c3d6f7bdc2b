"""Schedules of a run as data: how many tokens the trained encoder keeps, and how large its patches
are. Imports no torch.

A schedule is a list of values with the share of the run at which each begins, as in
`0.25@0,0.5@0.6,1@0.95`. All shapes are constant within a phase.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

from fastmoco_pipelines.spec import require

LAST_WHOLE = 0.05
"""Share of the run at its end that sees all tokens where `keep_tokens` is a single number."""

Value = TypeVar("Value", int, float)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A part of a run with constant shapes."""

    start: float = 0.0
    """Share of the run that is done when it begins, in [0, 1)."""
    keep: float = 1.0
    """Share of the patch tokens of a view that the trained encoder sees, in (0, 1]."""
    patch_size: int = 0
    """Pixels per side of a patch in the views as they are loaded; 0: that of the encoder."""

    def kept(self, tokens: int) -> int:
        """Patch tokens that stay of some."""
        return int(tokens * self.keep)

    def first_step(self, total_steps: int) -> int:
        """Number of the first step of the phase: the run up to it is at most `start`."""
        # 0.7 of 10 steps is 6.999...: what is meant is step 7.
        return math.floor(self.start * total_steps + 1e-9)

    def __str__(self) -> str:
        patch = f", patches of {self.patch_size} pixels" if self.patch_size else ""
        return f"from {self.start:.4g} of the run: {self.keep:.4g} of the tokens{patch}"


@dataclass(frozen=True, slots=True)
class Phases:
    """All phases of a run, the first of which starts at 0."""

    items: tuple[Phase, ...] = (Phase(),)

    def at(self, step: int, total_steps: int) -> Phase:
        """The phase of a step, a pure function of both numbers."""
        found = self.items[0]
        for phase in self.items[1:]:
            if step >= phase.first_step(total_steps):
                found = phase
        return found

    def shares(self) -> tuple[float, ...]:
        """Share of the run that each phase lasts; they add up to 1."""
        starts = [phase.start for phase in self.items]
        return tuple(end - start for start, end in zip(starts, [*starts[1:], 1.0], strict=True))

    def distinct(self) -> tuple[Phase, ...]:
        """One phase for each kind of step."""
        kinds = {(phase.keep, phase.patch_size): phase for phase in reversed(self.items)}
        return tuple(reversed(kinds.values()))

    def largest(self, patch_size: int) -> tuple[Phase, ...]:
        """Phases of which no other one has as many tokens, left and in all; mostly one.

        `patch_size`: of the encoder.
        """

        def size(phase: Phase) -> tuple[float, float]:
            tokens = 1 / (phase.patch_size or patch_size) ** 2
            return tokens * phase.keep, tokens

        kinds = self.distinct()
        sizes = [size(phase) for phase in kinds]

        def exceeded(own: tuple[float, float]) -> bool:
            return any(o != own and o[0] >= own[0] and o[1] >= own[1] for o in sizes)

        return tuple(p for p, own in zip(kinds, sizes, strict=True) if not exceeded(own))

    @property
    def drops_tokens(self) -> bool:
        """Whether a phase leaves out tokens."""
        return any(phase.keep < 1 for phase in self.items)

    @property
    def plain(self) -> bool:
        """Whether the run is one phase of all tokens and the encoder's own patches."""
        return self.items == (Phase(),)


def phases_of(keep_tokens: str, patch_schedule: str, patch_size: int) -> Phases:
    """The phases of both schedules together.

    Args:
        keep_tokens: as `ModelConfig.keep_tokens`.
        patch_schedule: as `ModelConfig.patch_schedule`.
        patch_size: of the encoder.

    Raises:
        FieldError: naming the field, its value and the rule.
    """
    keeps = _keep_schedule(keep_tokens)
    patches = _patch_schedule(patch_schedule, patch_size)
    found: list[Phase] = []
    for start in sorted({start for start, _ in keeps} | {start for start, _ in patches}):
        phase = Phase(start=start, keep=_at(keeps, start), patch_size=_at(patches, start))
        if not found or replace(phase, start=found[-1].start) != found[-1]:
            found.append(phase)
    return Phases(tuple(found))


def _keep_schedule(text: str) -> list[tuple[float, float]]:
    """Share of the run -> share of the tokens. A single number below 1 ends with all tokens."""
    found = _schedule("keep_tokens", text, float, "a share in (0, 1]")
    for _, keep in found:
        require(0 < keep <= 1, "keep_tokens", text, "every share of tokens must be in (0, 1]")
    if "@" not in text and found[0][1] < 1:
        found.append((1 - LAST_WHOLE, 1.0))
    return found


def _patch_schedule(text: str, patch_size: int) -> list[tuple[float, int]]:
    """Share of the run -> pixels of a patch; 0 for the encoder's own."""
    if not text:
        return [(0.0, 0)]
    found = _schedule("patch_schedule", text, int, "a whole number of pixels")
    for _, size in found:
        rule = f"every patch must be a multiple of patch_size={patch_size}"
        require(size >= patch_size and size % patch_size == 0, "patch_schedule", text, rule)
    rule = (
        f"must end with patch_size={patch_size}, by which the encoder is evaluated, "
        f"e.g. {2 * patch_size}@0,{patch_size}@0.3"
    )
    require(found[-1][1] == patch_size, "patch_schedule", text, rule)
    return [(start, 0 if size == patch_size else size) for start, size in found]


def _schedule(
    name: str, text: str, kind: Callable[[str], Value], what: str
) -> list[tuple[float, Value]]:
    """`VALUE@SHARE,...` in pairs, by share."""
    found: list[tuple[float, Value]] = []
    for item in text.split(","):
        value, at, share = item.partition("@")
        try:
            found.append((float(share) if at else 0.0, kind(value)))
        except ValueError:
            rule = f"{item!r} is not {what}, or VALUE@SHARE with a share of the run"
            require(False, name, text, rule)
    starts = [start for start, _ in found]
    rule = "shares of the run must start at 0, rise, and be less than 1, as in 0.5@0,1@0.9"
    rises = all(a < b for a, b in pairwise(starts))
    require(starts[0] == 0 and rises and starts[-1] < 1, name, text, rule)
    require(len(found) == 1 or text.count("@") == len(found), name, text, rule)
    return found


def _at(schedule: list[tuple[float, Value]], share: float) -> Value:
    """The value of a schedule at a share of the run."""
    return [value for start, value in schedule if start <= share][-1]
