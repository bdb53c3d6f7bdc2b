"""The linear top-1 that a recipe is expected to reach on ImageNet, who reports it, and on what
hardware."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastmoco.config import Config

RELEASE = "official release"
PAPER = "as remembered from the paper"
ON_VIT = "The paper of MoCo v3 compares it there."


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What is known of a recipe; a difference of 0.5 points is noise.

    Attributes:
        linear: top-1 accuracy of a linear probe on ImageNet, in percent; None: not published.
        source: who reports it; without a number, whose hyper-parameters these are.
        hardware: on which it is stated to run; empty if it is not stated.
        note: other reports and restrictions, as sentences; may be empty.
        measure: what `linear` is, where it is not the accuracy of a linear probe.
    """

    linear: float | None
    source: str
    hardware: str = ""
    note: str = ""
    measure: str = "Linear top-1"

    @property
    def brief(self) -> str:
        """One sentence: accuracy, source, hardware."""
        if self.linear is None:
            what = f"{self.measure} not published; numbers of {self.source}"
        else:
            what = f"{self.measure} {self.linear} % ({self.source})"
        return what + (f"; on {self.hardware}." if self.hardware else ".")

    def __str__(self) -> str:
        """`brief` and the note."""
        return f"{self.brief} {self.note}".rstrip()


EXPECTED: dict[str, Expected] = {}
"""By name of the recipe."""

Recipe = Callable[[], "Config"]


def expects(expected: Expected) -> Callable[[Recipe], Recipe]:
    """Record what a recipe is expected to reach, and state it in its docstring."""

    def of(recipe: Recipe) -> Recipe:
        EXPECTED[recipe.__name__] = expected
        recipe.__doc__ = f"{recipe.__doc__ or ''}\n\n    {expected}\n    "
        return recipe

    return of
