"""Config of faults: how many a run tolerates, and how long it waits before it ends."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastmoco_pipelines.spec import require


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultConfig:
    """How many faults a run tolerates, and for how long."""

    max_skipped_steps: int = 5
    """Consecutive steps with a non-finite loss or gradient after which the run ends. Each of them
    is skipped: it changes nothing but the position in the data."""
    rollback_spike: float = 0
    """Factor above its running median at which a gradient norm (of any logged place) causes a
    rollback, e.g. 10; 0: never. A rollback returns to the last checkpoint of
    `checkpoint.every_steps`, which must be set, and continues from there with the data that come
    next."""
    max_rollbacks: int = 3
    """Consecutive rollbacks that are allowed; the next one ends the run. They are consecutive if
    fewer than `checkpoint.every_steps` steps without a spike are between them."""
    hang_timeout_s: float = 120
    """Seconds without progress after which a rank is reported as hanging and the run ends; five
    times the duration of the last step, if that is longer."""
    first_step_timeout_s: float = 900
    """The same for the first step, which compiles and fills caches."""
    stop_within_s: float = 10
    """Seconds that the current step may still take after SIGTERM, SIGINT or SIGUSR1; three times
    the last step and its wait for data, if that is longer. The process then ends without saving, as
    it must if a peer is lost. A save that has begun is completed."""

    def __post_init__(self) -> None:
        require(
            self.max_skipped_steps >= 1,
            "max_skipped_steps",
            self.max_skipped_steps,
            "must be at least 1",
        )
        spike = self.rollback_spike
        require(
            spike == 0 or 1 < spike < math.inf,
            "rollback_spike",
            spike,
            "must be 0 or a number above 1",
        )
        require(
            self.max_rollbacks >= 0, "max_rollbacks", self.max_rollbacks, "must not be negative"
        )
        for name in ("hang_timeout_s", "first_step_timeout_s", "stop_within_s"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
