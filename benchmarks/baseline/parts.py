"""The parts of a step, by name; costs nothing unless somebody listens."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext


def part(name: str) -> AbstractContextManager[None]:
    """The code inside is this part of a step."""
    return nullcontext()
