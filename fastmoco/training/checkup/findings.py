"""The result of a checkup: one finding a subject."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

State = Literal["works", "absent", "weak", "broken"]
"""`absent`: not installed and not needed; `weak`: works, but slowly or not for everything; `broken`: does
not work."""
MARK = "fastmoco-findings: "
"""Begins the line on which the process of a probe prints its findings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What was found of one subject."""

    name: str
    state: State
    text: str
    """What was found, in a line."""
    cure: str = ""
    """What to do, in a line; a command where there is one."""
    needed: bool = False
    """Training cannot run here while it is broken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkup:
    """The findings of one machine."""

    device: str
    """Where training would run: "cuda" or "cpu"."""
    findings: tuple[Finding, ...]

    @property
    def obstacles(self) -> Sequence[Finding]:
        """What keeps training from running."""
        return [found for found in self.findings if found.needed and found.state == "broken"]

    def as_json(self) -> dict[str, Any]:
        """The checkup as JSON: `trains`, `device`, and `findings` with the fields of `Finding`."""
        return {
            "trains": not self.obstacles,
            "device": self.device,
            "findings": [asdict(found) for found in self.findings],
        }
