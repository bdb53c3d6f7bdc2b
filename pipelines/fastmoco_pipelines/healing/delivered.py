"""Which samples a loader delivers in a step, without reading one: the order, and the lists of bad
samples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastmoco_pipelines.formats.quarantine import Quarantine, QuarantineEntry, read_list
from fastmoco_pipelines.healing.bad_samples import UNREADABLE
from fastmoco_pipelines.healing.healer import to_good_candidate
from fastmoco_pipelines.sampling.stand_ins import Plan
from fastmoco_pipelines.sets.shard_set import ShardSet


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSamples:
    """The samples of one rank in one step, in the order of its batch.

    Attributes:
        rank: of the samples.
        sample_ids: [B] int64: delivered.
        wanted_ids: [B] int64: whose turn it was; another one where a stand-in was delivered.
    """

    rank: int
    sample_ids: NDArray[np.int64]
    wanted_ids: NDArray[np.int64]


class DeliveredSamples:
    """The samples of any step of a run.

    They are those of the loader if every bad sample of the step is in a list. A step that was
    trained on has put them there: a loader notes each bad sample that it meets.

    Args:
        shards: the set.
        plan: of the run, on any number of ranks.
        run_list: the run's own list of bad samples; None: it has none.

    Attributes:
        bad: reason by sample, of the samples in a list.
        unreadable: the same of samples that could not be read at some time. Their bytes may be
            good: a later process of the run tries them again, and they count as good here.
    """

    def __init__(self, shards: ShardSet, plan: Plan, *, run_list: Path | None = None) -> None:
        self._plan = plan
        beside, self.problems = shards.quarantine()
        found, problem = read_list(run_list) if run_list is not None else (Quarantine(), None)
        self.problems += [problem] if problem else []

        def of(entries: list[QuarantineEntry]) -> dict[int, str]:
            return shards.listed(Quarantine(entries))

        passing = [entry for entry in found if entry.reason.startswith(UNREADABLE)]
        lasting = [entry for entry in found if not entry.reason.startswith(UNREADABLE)]
        self.bad = of(lasting) | of(list(beside))
        self.unreadable = {i: why for i, why in of(passing).items() if i not in self.bad}

    def of_step(self, step: int, *, world_size: int) -> list[RankSamples]:
        """The samples of every rank.

        Args:
            step: from 0, as `Batch.step`.
            world_size: ranks that shared the batch; together they have the same samples for any
                number.

        Raises:
            ValueError: if the ranks cannot share the batch, or `step` is negative.
            ShardError: if no good sample was drawn to stand in for a bad one.
        """
        return [self._of_rank(step, rank, world_size) for rank in range(world_size)]

    def _of_rank(self, step: int, rank: int, world_size: int) -> RankSamples:
        plan = replace(self._plan, rank=rank, world_size=world_size)
        places = plan.places(step)
        wanted = places.ids.copy()
        for row, sample in enumerate(wanted.tolist()):
            if sample in self.bad:
                to_good_candidate(plan, places, row, self.bad.__contains__)
        return RankSamples(rank=rank, sample_ids=places.ids, wanted_ids=wanted)
