"""Where a loader's time goes, and whether the trainer waits for it.

Two threads form a pipeline: one reads and draws, the other decodes, augments and delivers. The
slower thread sets the pace, and its longest stage is what to improve. Measuring costs two clock
readings a stage and batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from fastmoco_pipelines.loading import step_parts

READ, DRAW = "read", "draw"
DECODE, AUGMENT, TRANSFER, HEAL = "decode", "augment", "transfer", "heal"
STAGES = {
    READ: "reading the shards",
    DRAW: "drawing the augmentations",
    DECODE: "decoding (and augmenting, where DALI does)",
    AUGMENT: "cutting the views and changing their colors",
    TRANSFER: "copying batches to pinned memory",
    HEAL: "replacing bad images",
}
"""The stages, by the names of their figures."""
FAST_ENOUGH = 0.05
"""Share of the time that a trainer may wait before its loader is called slow."""
_READER = (READ, DRAW)
_PARTS = {
    READ: step_parts.READ,
    DRAW: step_parts.AUGMENT,
    DECODE: step_parts.DECODE,
    AUGMENT: step_parts.AUGMENT,
    TRANSFER: step_parts.TRANSFER,
    HEAL: step_parts.READ,
}
"""The part of a step that a stage belongs to."""
_ADVICE = {
    READ: "a faster disk, a local copy, or smaller images (fastmoco data pack --max-side)",
    DRAW: "more CPU cores for this process",
    DECODE: "more --data.threads, or smaller images (fastmoco data pack --max-side)",
    AUGMENT: "more --data.threads, or augmenting on the GPU (--data.device gpu)",
    TRANSFER: "decoding on the device itself (--data.device gpu)",
    HEAL: "fastmoco data check, so that bad images are known from the start",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFigures:
    """What a loader has done up to a moment; the difference of two is what it did in between.

    Attributes:
        steps: batches taken by the trainer.
        wall_s: seconds since the loader was built.
        wait_s: seconds of these that the trainer waited in `next`.
        stage_s: seconds of work by stage; the two threads work at the same time, so the sum may
            exceed `wall_s`.
        queued: sum over the steps of the batches that were ready when the trainer asked.
        prefetch: batches that may be ready at most.
        left_out: images that are not delivered, on any rank as far as is known, at that moment.
    """

    steps: int = 0
    wall_s: float = 0.0
    wait_s: float = 0.0
    stage_s: Mapping[str, float] = field(default_factory=dict)
    queued: int = 0
    prefetch: int = 0
    left_out: int = 0

    def __sub__(self, earlier: StageFigures) -> StageFigures:
        return StageFigures(
            steps=self.steps - earlier.steps,
            wall_s=self.wall_s - earlier.wall_s,
            wait_s=self.wait_s - earlier.wait_s,
            stage_s={name: s - earlier.stage_s.get(name, 0.0) for name, s in self.stage_s.items()},
            queued=self.queued - earlier.queued,
            prefetch=self.prefetch,
            left_out=self.left_out,
        )

    @property
    def wait_share(self) -> float:
        """Share of the time that the trainer waited, 0 to 1."""
        return min(1.0, self.wait_s / self.wall_s) if self.wall_s > 0 else 0.0

    @property
    def queue_depth(self) -> float:
        """Batches that were ready when the trainer asked, on average; 0: it waited for each."""
        return self.queued / self.steps if self.steps else 0.0

    def metrics(self) -> dict[str, float]:
        """The figures by step, by name: `loader/read_ms`, ..., `loader/queue_depth`,
        `loader/quarantined`."""
        steps = max(1, self.steps)
        found = {
            f"loader/{name}_ms": 1000 * seconds / steps for name, seconds in self.stage_s.items()
        }
        return found | {
            "loader/queue_depth": self.queue_depth,
            "loader/quarantined": float(self.left_out),
        }

    def summary(self) -> str:
        """One sentence: is the loader the bottleneck, and if so, which part of it?"""
        waits = f"the trainer waits for the loader {self.wait_share:.0%} of the time"
        if self.wait_share <= FAST_ENOUGH:
            return f"{waits}: it is not the bottleneck"
        reader = sum(s for name, s in self.stage_s.items() if name in _READER)
        total = sum(self.stage_s.values())
        own = {
            name: s for name, s in self.stage_s.items() if (name in _READER) == (reader > total / 2)
        }
        if not own or total <= 0:
            return waits
        slowest = max(own, key=lambda name: own[name])
        share = own[slowest] / total
        return (
            f"{waits}: {STAGES[slowest]} is its slowest stage, {share:.0%} of its work; to speed "
            f"it up: {_ADVICE[slowest]}"
        )


class StageClock:
    """Adds up the figures of one loader. Each stage belongs to one thread, `waited` to the
    trainer's."""

    def __init__(self, prefetch: int) -> None:
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = dict.fromkeys((READ, DRAW, DECODE), 0.0)
        self._steps = 0
        self._waited = 0.0
        self._queued = 0
        self._prefetch = prefetch
        self._doing: dict[str, tuple[str, int, float]] = {}

    @contextmanager
    def stage(self, name: str, step: int) -> Iterator[None]:
        """Count the time in the context for a stage of a step."""
        start = time.perf_counter()
        thread = READ if name in _READER else DECODE
        self._doing[thread] = (name, step, start)
        try:
            with step_parts.part(_PARTS[name], helpers=thread != READ):
                yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
            self._doing.pop(thread, None)

    def within(self, outer: str, inner: str, seconds: float) -> None:
        """Move seconds from a stage that has just ended to another one."""
        self._seconds[outer] -= seconds
        self._seconds[inner] = self._seconds.get(inner, 0.0) + seconds

    def waited(self, seconds: float, queued: int) -> None:
        """Count a batch that the trainer took: the seconds that it waited, and the batches that
        were ready."""
        self._steps += 1
        self._waited += seconds
        self._queued += queued

    @property
    def busy(self) -> bool:
        """Whether any stage is under way."""
        return bool(self._doing)

    def doing(self, reading: str) -> str:
        """What the threads do now, and since when, for people. `reading`: what is read now or was
        read last."""
        now = time.perf_counter()
        parts = []
        for name, step, since in list(self._doing.values()):
            where = f" ({reading})" if name in (READ, HEAL) else ""
            parts.append(f"{STAGES[name]} for step {step}{where} since {now - since:.0f} s")
        return "; ".join(parts) or "nothing is under way"

    def figures(self, left_out: int) -> StageFigures:
        """The figures up to now."""
        return StageFigures(
            steps=self._steps,
            wall_s=time.perf_counter() - self._start,
            wait_s=self._waited,
            stage_s=dict(self._seconds),
            queued=self._queued,
            prefetch=self._prefetch,
            left_out=left_out,
        )
