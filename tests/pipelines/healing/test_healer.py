"""A loader over bad samples: the batches of the clean set but for the places of the bad ones,
whoever knows it when."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmoco_pipelines.errors import TooManyBadSamplesError
from fastmoco_pipelines.formats.quarantine import NAME, Quarantine, append_entry
from fastmoco_pipelines.loading.batch import Batch
from fastmoco_pipelines.loading.loader import build_loader
from fastmoco_pipelines.sampling.order import epoch_order
from fastmoco_pipelines.sets.shard_set import ShardSet
from fastmoco_pipelines.spec import LoaderSpec, moco_v3_views
from fastmoco_pipelines.views.dali import ViewPipeline
from fastmoco_pipelines.views.draws import draw_views
from tests.pipelines.damage import damage, damaged_copy

STEPS = 9  # 45 images, 12 a step: 3 steps an epoch, so that three epochs are seen
# Of every kind, and two in one global batch: the first two of step 0.
FIRST = epoch_order(7, 0, 45)
BAD = {
    int(FIRST[0]): "garbage",
    int(FIRST[1]): "truncated",
    int(FIRST[20]): "changed",
    int(FIRST[40]): "empty",
}
VIEW1, VIEW2 = moco_v3_views(16)


def spec_of(folder: Path | str, **changes) -> LoaderSpec:
    options = {
        "shards": str(folder),
        "views": (VIEW1, VIEW2),
        "global_batch_size": 12,
        "seed": 7,
        "threads": 1,
    }
    return LoaderSpec(**options | changes)


def take(
    folder: Path, steps: int = STEPS, *, changes: dict | None = None, **options
) -> list[Batch]:
    with build_loader(spec_of(folder, **changes or {}), **options) as loader:
        return [loader.next() for _ in range(steps)]


def assert_same(got: Batch, wanted: Batch) -> None:
    assert got.step == wanted.step
    assert np.array_equal(got.sample_ids, wanted.sample_ids)
    assert torch.equal(got.views[0], wanted.views[0])
    assert torch.equal(got.views[1], wanted.views[1])


@pytest.fixture(scope="module")
def clean(packed) -> list[Batch]:
    return take(packed)


@pytest.fixture(scope="module")
def faulty(packed, tmp_path_factory) -> Path:
    return damaged_copy(packed, tmp_path_factory.mktemp("bad") / "set", BAD)


@pytest.fixture(scope="module")
def healed(faulty) -> list[Batch]:
    return take(faulty)


def test_only_the_places_of_bad_samples_differ(packed, clean, healed):
    replaced = 0
    with ShardSet.open(str(packed)) as shards:
        for got, wanted in zip(healed, clean, strict=True):
            bad = np.isin(wanted.sample_ids, list(BAD))
            replaced += int(bad.sum())
            keep = torch.from_numpy(~bad)
            assert torch.equal(got.views[0][keep], wanted.views[0][keep])
            assert torch.equal(got.views[1][keep], wanted.views[1][keep])
            assert np.array_equal(got.sample_ids[~bad], wanted.sample_ids[~bad])
            for row in np.flatnonzero(bad).tolist():
                stand_in = int(got.sample_ids[row])
                assert stand_in not in BAD
                assert stand_in not in wanted.sample_ids
                assert_is_drawn_for_its_place(shards, got, row)
    assert replaced == len(
        [i for epoch in range(3) for i in epoch_order(7, epoch, 45)[:36] if int(i) in BAD]
    )


def assert_is_drawn_for_its_place(shards: ShardSet, batch: Batch, row: int) -> None:
    """The views of a stand-in are those of its number, the epoch and the place; not those of its
    own turn."""
    sample_id = batch.sample_ids[row : row + 1]
    position = batch.step % 3 * 12 + row
    pipeline = ViewPipeline((VIEW1, VIEW2), batch_size=1, threads=1)
    for places in (np.array([position + 1]), np.array([0])):
        draws1, draws2 = (
            draw_views(
                view,
                seed=7,
                epoch=batch.step // 3,
                sample_ids=sample_id,
                sizes=shards.sizes[sample_id],
                view=number,
                places=places,
            )
            for number, view in ((1, VIEW1), (2, VIEW2))
        )
        view1, view2 = pipeline.run(shards.read(sample_id), (draws1, draws2))
        own = bool(places[0])
        assert torch.equal(view1[0], batch.views[0][row]) == own
        assert torch.equal(view2[0], batch.views[1][row]) == own


def test_labels_are_those_of_the_images_that_are_delivered(packed, faulty, healed):
    """Of stand-ins too, from any step; and asking for them changes no view."""
    with ShardSet.open(str(packed)) as shards:
        labels, classes = shards.labels, shards.class_count
    assert all(batch.labels is None for batch in healed)
    for start in (0, 4):
        asked = take(faulty, 2, changes={"classes": classes}, start_step=start)
        for batch, plain in zip(asked, healed[start:], strict=False):
            assert_same(batch, plain)
            assert np.array_equal(batch.labels, labels[batch.sample_ids])
    stood_in = [row for row in range(12) if int(FIRST[row]) in BAD]
    assert stood_in
    assert not set(healed[0].sample_ids[stood_in]) & set(BAD)


@pytest.mark.parametrize("start", range(1, STEPS))
def test_a_restart_at_any_step_is_bit_identical(faulty, healed, start):
    for got, wanted in zip(take(faulty, 3, start_step=start), healed[start:], strict=False):
        assert_same(got, wanted)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_are_bit_identical_to_one(faulty, healed, world_size):
    ranks = [take(faulty, 5, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in range(5):
        parts = [batches[step] for batches in ranks]
        together = Batch(
            views=tuple(map(torch.cat, zip(*(part.views for part in parts), strict=True))),
            sample_ids=np.concatenate([part.sample_ids for part in parts]),
            step=step,
        )
        assert_same(together, healed[step])


def test_knowing_it_from_the_start_changes_nothing(faulty, healed, tmp_path):
    """By the list beside the shards, or by the run's own."""
    run_list = tmp_path / NAME
    with build_loader(spec_of(faulty), quarantine_list=run_list) as loader:
        for wanted in healed:
            assert_same(loader.next(), wanted)
        assert loader.figures().left_out == len(BAD)
    found = Quarantine.read(run_list)
    assert len(found) == len(BAD)
    reasons = {entry.offset: entry.reason for entry in found}
    assert sum("bytes differ" in reason for reason in reasons.values()) == 1
    assert sum("cannot be decoded" in reason for reason in reasons.values()) == 3
    known = Path(shutil.copytree(faulty, tmp_path / "known"))
    shutil.copy(run_list, known / NAME)
    for folder, options in ((faulty, {"quarantine_list": run_list}), (known, {})):
        with build_loader(spec_of(folder), **options) as loader:
            assert loader.figures().left_out == len(BAD)  # before the first step
            for wanted in healed:
                assert_same(loader.next(), wanted)
    assert len(run_list.read_text().splitlines()) == len(BAD)  # nothing is noted twice


def test_a_list_half_known_and_stale_lines(faulty, healed, tmp_path):
    folder = Path(shutil.copytree(faulty, tmp_path / "set"))
    with ShardSet.open(str(folder)) as shards:
        entries = [shards.entry(sample_id) for sample_id in BAD]
    listed = Quarantine()
    listed.add(**entries[0], reason="known")
    stale = listed.add(**entries[1] | {"crc32": 1}, reason="of an older tar")
    listed.write(folder / NAME)
    told: list[str] = []
    with build_loader(spec_of(folder)) as loader:
        loader.report = told.append
        for wanted in healed:
            assert_same(loader.next(), wanted)
    assert stale is not None
    assert (
        "1 of 45 images are left out: listed in quarantine.jsonl; 1 of its lines match no sample any more"
        in told
    )
    assert sum(text.startswith("left out ") for text in told) == len(BAD) - 1


def test_a_wrong_line_in_a_list_costs_its_sample_alone(packed, clean, tmp_path):
    """A list is believed: a good sample on it is left out like a bad one, and nothing else
    changes."""
    folder = Path(shutil.copytree(packed, tmp_path / "set"))
    with ShardSet.open(str(folder)) as shards:
        entry = Quarantine().add(**shards.entry(int(FIRST[5])), reason="somebody's dislike")
    append_entry(folder / NAME, entry)
    got = take(folder, 1)[0]
    differs = [i for i in range(12) if not torch.equal(got.views[0][i], clean[0].views[0][i])]
    assert differs == [5]


def test_bad_candidates_are_passed_over(packed, tmp_path):
    """So many are bad that most places go through several candidates; ranks agree all the same."""
    rng = np.random.default_rng(0)
    bad = {int(i): "garbage" for i in rng.choice(45, 30, replace=False)}
    folder = damaged_copy(packed, tmp_path / "set", bad)
    whole = take(folder, 2, changes={"max_bad_share": 1.0})
    halves = [
        take(folder, 2, changes={"max_bad_share": 1.0}, rank=rank, world_size=2)
        for rank in range(2)
    ]
    for step, batch in enumerate(whole):
        assert not set(batch.sample_ids.tolist()) & bad.keys()
        assert torch.equal(batch.views[0], torch.cat([half[step].views[0] for half in halves]))


def test_the_limit_names_counts_culprits_and_the_cure(packed, tmp_path):
    order = epoch_order(7, 0, 45)
    bad = {
        int(i): ("garbage", "changed")[n % 2] for n, i in enumerate(order[12:23])
    }  # 11, 10 are allowed
    folder = damaged_copy(packed, tmp_path / "set", bad)
    name = damage(folder, int(order[23]), "empty")
    run_list = tmp_path / NAME
    with build_loader(spec_of(folder), quarantine_list=run_list) as loader:
        loader.next()
        for _ in range(2):  # and again when asked again
            with pytest.raises(TooManyBadSamplesError) as raised:
                loader.next()
    words = str(raised.value)
    assert "11 of 45 images cannot be used, 10 are allowed" in words
    assert "its bytes differ from the index" in words
    assert "`fastmoco data check`" in words
    assert "--data.max-bad-share" in words
    assert words.count(".tar: ") == 5
    assert "and 6 more" in words
    # A restart says it at once; with more allowed it goes on; and a list beside the shards is the
    # cure.
    with pytest.raises(TooManyBadSamplesError, match="11 of 45"):
        build_loader(spec_of(folder), quarantine_list=run_list)
    wanted = take(folder, 3, changes={"max_bad_share": 0.5}, quarantine_list=run_list)
    assert name.split(": ")[1].split(".")[0] in {entry.key for entry in Quarantine.read(run_list)}
    shutil.copy(run_list, folder / NAME)
    for got, batch in zip(take(folder, 3, quarantine_list=run_list), wanted, strict=True):
        assert_same(got, batch)


def test_none_may_be_bad_where_the_share_is_zero(faulty):
    with pytest.raises(
        TooManyBadSamplesError, match=r"[12] of 45 images cannot be used, 0 are allowed"
    ):
        take(faulty, 1, changes={"max_bad_share": 0.0})


def test_a_list_that_cannot_be_written_costs_nothing_but_a_word(faulty, healed, tmp_path):
    told: list[str] = []
    with build_loader(spec_of(faulty), quarantine_list=tmp_path / "no" / "such" / NAME) as loader:
        loader.report = told.append
        for wanted in healed[:4]:
            assert_same(loader.next(), wanted)
    assert any("cannot write" in text for text in told)
