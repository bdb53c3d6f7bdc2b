"""What the main thread is doing and since when, for the threads that check its progress."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

from fastmoco.config.faults import FaultConfig
from fastmoco.errors import BEGUN, tell_launcher


class Section(StrEnum):
    """What the main thread of a run is doing."""

    BETWEEN_STEPS = "between steps"
    DATA = "data"
    """Waiting for a batch."""
    STEP = "step"
    MEASUREMENT = "measurement"
    """An evaluation."""
    SAVE = "save"
    ROLLBACK = "rollback"


class Pulse:
    """The section of a run that the main thread is in; read by the watchdog and by the deadline
    after a signal.

    All ranks pass through the same sections in the same order, so the rank with the lowest `count`
    is the slowest.

    Args:
        rules: how long a step may take.
    """

    def __init__(self, rules: FaultConfig) -> None:
        self._rules = rules
        self._main = threading.get_ident()
        self._last_step = self._last_data = 0.0
        self._steps = 0
        # One tuple, replaced in one assignment: another thread never reads a partial update.
        begun = time.monotonic()
        self._now: tuple[int, Section, str, float, float] = (
            0,
            Section.BETWEEN_STEPS,
            Section.BETWEEN_STEPS.value,
            begun,
            rules.first_step_timeout_s,
        )

    @property
    def count(self) -> int:
        """Sections begun so far."""
        return self._now[0]

    @property
    def section(self) -> Section:
        """The section that the main thread is in."""
        return self._now[1]

    @property
    def doing(self) -> str:
        """The name of the section for messages, e.g. which measurement it is."""
        return self._now[2]

    @property
    def unstarted(self) -> bool:
        """Whether no step is done since this start; a process that ends now loses nothing."""
        return self._steps == 0

    def age(self) -> float:
        """Seconds since the section began."""
        return time.monotonic() - self._now[3]

    def overdue(self) -> bool:
        """Whether the section has exceeded its time limit."""
        *_, begun, patience_s = self._now
        return time.monotonic() - begun > patience_s

    def outlasts(self, seconds: float, limit_s: float | None = None) -> str | None:
        """The message if the section lasts too long after a signal to stop, else None.

        A save, a rollback or a measurement may finish. A measurement before the first step may not,
        because nothing depends on it.

        Args:
            seconds: time since the signal.
            limit_s: a shorter limit for everything but a save and a rollback.
        """
        _, section, doing, begun, patience_s = self._now
        finishes = section in (Section.SAVE, Section.ROLLBACK)
        if not finishes and (section is not Section.MEASUREMENT or self.unstarted):
            patience_s = max(self._rules.stop_within_s, 3 * (self._last_step + self._last_data))
        age = min(seconds, time.monotonic() - begun)
        if limit_s is not None and not finishes and limit_s < patience_s:
            age = seconds  # steps that go on do not count: a run may ask for signals at some only
            patience_s = limit_s
        if age <= patience_s:
            return None
        return f"{doing} did not end within {patience_s:.0f} s"

    def enter(self, section: Section, patience_s: float, doing: str = "") -> None:
        """Begin a section with a time limit of `patience_s`; `doing` is a more exact name."""
        self._now = (
            self._now[0] + 1,
            section,
            doing or section.value,
            time.monotonic(),
            patience_s,
        )

    @contextmanager
    def inside(self, section: Section, patience_s: float, doing: str = "") -> Iterator[None]:
        """A section that ends with the context; the next section is between steps."""
        self.enter(section, patience_s, doing)
        yield
        if section is Section.DATA:
            self._last_data = self.age()
        self.enter(Section.BETWEEN_STEPS, self._rules.hang_timeout_s)

    @contextmanager
    def step(self) -> Iterator[None]:
        """The section of one step without its wait for data.

        The first step has a longer limit; the limit of later ones grows with the last step.
        """
        rules = self._rules
        longest = max(rules.hang_timeout_s, 5 * self._last_step)
        self.enter(
            Section.STEP, longest if self._steps else max(longest, rules.first_step_timeout_s)
        )
        yield
        self._last_step = self.age()
        if not self._steps:
            tell_launcher(BEGUN)
        self._steps += 1
        self.enter(Section.BETWEEN_STEPS, longest)

    def place(self) -> str:
        """Position of the main thread: its innermost frames, newest last."""
        frame = sys._current_frames().get(self._main)
        places: list[str] = []
        while frame is not None and len(places) < 4:
            code = frame.f_code
            places.append(
                f"{'/'.join(code.co_filename.split('/')[-2:])}:{frame.f_lineno} {code.co_name}"
            )
            frame = frame.f_back
        return " > ".join(reversed(places))
