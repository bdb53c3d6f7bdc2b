"""How long a transfer over a network may take, and how often it is tried."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of a transfer; the defaults give up on a dead server after about two minutes."""

    connect_seconds: float = 15
    """Until a connection stands."""
    respond_seconds: float = 60
    """From the request until the head of the answer is complete."""
    read_seconds: float = 30
    """Between two pieces of a body."""
    speed_seconds: float = 30
    """Over which the speed is judged."""
    min_bytes_per_s: float = 16_384
    """A body slower than this is cut off and taken up again."""
    deadline_seconds: float = 600
    """For one file with all its retries, and 1 s more for each 10^6 bytes of it."""
    attempts: int = 8
    """Tries in a row without a byte of progress."""
    wrong_attempts: int = 3
    """Tries that end with other bytes than the index or the manifest promise."""
    first_delay_seconds: float = 0.5
    """Pause after the first failure; doubled with each one, and shortened by up to a half at random."""
    max_delay_seconds: float = 30
    """Longest pause."""
