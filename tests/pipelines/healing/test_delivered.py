"""The samples of a step, computed: those that the loader has delivered, on every rank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastmoco_pipelines.formats.quarantine import Quarantine, append_entry, quarantine_path
from fastmoco_pipelines.healing.bad_samples import UNREADABLE
from fastmoco_pipelines.healing.delivered import DeliveredSamples
from fastmoco_pipelines.loading.loader import build_loader
from fastmoco_pipelines.sampling.stand_ins import Plan
from fastmoco_pipelines.sets.shard_set import ShardSet
from tests.pipelines.damage import damaged_copy
from tests.pipelines.healing.test_healer import BAD, FIRST, STEPS, spec_of


def delivered(folder: Path, run_list: Path, *, window: int = 0, version: int = 2):
    with ShardSet.open(str(folder)) as shards:
        plan = Plan(
            seed=7,
            windows=shards.windows(window),
            global_batch_size=12,
            order_version=version,
        )
        return DeliveredSamples(shards, plan, run_list=run_list)


@pytest.mark.parametrize(("ranks", "window", "version"), [(1, 0, 2), (2, 1, 2), (3, 0, 1)], ids=str)
def test_the_samples_are_those_of_the_loader(packed, tmp_path, ranks, window, version):
    folder = damaged_copy(packed, tmp_path / "set", BAD)
    run_list = tmp_path / "run.jsonl"
    # One of the bad samples is known before, the others are found by the run.
    with ShardSet.open(str(folder)) as shards:
        known = Quarantine()
        known.add(**shards.entry(int(FIRST[1])), reason="known")
    known.write(quarantine_path(folder))
    spec = spec_of(folder, shuffle_window=window)
    batches = []
    for rank in range(ranks):
        options = {"rank": rank, "world_size": ranks, "order_version": version}
        with build_loader(spec, quarantine_list=run_list, **options) as loader:
            batches.append([loader.next().sample_ids for _ in range(STEPS)])

    computed = delivered(folder, run_list, window=window, version=version)
    assert computed.bad.keys() == BAD.keys()
    replaced = 0
    for step in range(STEPS):
        of_step = computed.of_step(step, world_size=ranks)
        assert [one.rank for one in of_step] == list(range(ranks))
        for one in of_step:
            assert np.array_equal(one.sample_ids, batches[one.rank][step])
            changed = one.wanted_ids[one.wanted_ids != one.sample_ids].tolist()
            assert set(changed) <= BAD.keys()
            replaced += len(changed)
        # Any other number of ranks shares out the same samples.
        alone = computed.of_step(step, world_size=1)[0].sample_ids
        assert np.array_equal(np.concatenate([one.sample_ids for one in of_step]), alone)
    assert replaced > 5


def test_what_could_not_be_read_once_counts_as_good_and_is_named(packed, tmp_path):
    run_list = tmp_path / "run.jsonl"
    with ShardSet.open(str(packed)) as shards:
        entry = Quarantine().add(**shards.entry(5), reason=f"{UNREADABLE}the disk failed")
    append_entry(run_list, entry)
    computed = delivered(packed, run_list)
    assert computed.bad == {}
    assert computed.unreadable == {5: f"{UNREADABLE}the disk failed"}
    ids = np.concatenate([computed.of_step(step, world_size=1)[0].sample_ids for step in range(3)])
    assert 5 in ids
