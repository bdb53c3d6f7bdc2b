"""The part of a config that is about what may go wrong: how long to wait, how much to bear."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastmoco_pipelines.spec import require


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultConfig:
    """What a run bears before it gives up."""

    max_skipped_steps: int = 5
    """Steps in a row with a loss or gradient that is not finite, each skipped without a trace, after which the run ends."""
    rollback_spike: float = 0
    """Go back to the last checkpoint by steps after a gradient norm (of any place that is logged) above so many times its
    running median, and on from there with the data that come next; e.g. 10. 0: never. Needs ``checkpoint.every_steps``."""
    max_rollbacks: int = 3
    """Rollbacks without a quiet stretch of ``checkpoint.every_steps`` steps between them, before the next one ends the run."""
    hang_timeout_s: float = 120
    """Seconds without progress after which a rank is named as hung and the run ends; five times the last step, if longer."""
    first_step_timeout_s: float = 900
    """The same for the first step, which compiles and fills caches."""
    stop_within_s: float = 10
    """Seconds after SIGTERM, SIGINT or SIGUSR1 for the step to end (three times the last step and its wait for data, if longer),
    before the process ends without saving, as it must where a peer is lost. A save that has begun is waited for."""

    def __post_init__(self) -> None:
        require(self.max_skipped_steps >= 1, "max_skipped_steps", self.max_skipped_steps, "must be at least 1")
        spike = self.rollback_spike
        require(spike == 0 or 1 < spike < math.inf, "rollback_spike", spike, "must be 0 or a number above 1")
        require(self.max_rollbacks >= 0, "max_rollbacks", self.max_rollbacks, "must not be negative")
        for name in ("hang_timeout_s", "first_step_timeout_s", "stop_within_s"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
