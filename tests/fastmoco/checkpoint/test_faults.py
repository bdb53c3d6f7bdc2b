import json
import os
import pickle
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from fastmoco.checkpoint import CheckpointError, load_latest, save_checkpoint
from tests.checkpoint_content import content, flip_bit, full_disk, group_of_one, loaded_step, save

pytestmark = pytest.mark.faults

TENSORS = {"one file": ["tensors.safetensors"], "shards": ["__0_0.distcp", ".metadata"]}


@pytest.fixture(params=TENSORS)
def layout(request: pytest.FixtureRequest) -> Iterator[tuple[list[str], dist.ProcessGroup | None]]:
    """Names of the files with the tensors, and the group that makes a save write them so."""
    files = [*TENSORS[request.param], "state.json"]
    if request.param == "one file":
        yield files, None
        return
    with group_of_one() as group:
        yield files, group


Layout = tuple[list[str], dist.ProcessGroup | None]


def test_two_hundred_flipped_bits_are_all_detected(tmp_path: Path, layout: Layout) -> None:
    """A hundred in each layout."""
    files, group = layout
    save(tmp_path, 1, group=group)
    newest = save(tmp_path, 2, group=group)
    rng = random.Random(0)
    for trial in range(100):
        file = newest / [*files, "COMMITTED"][trial % (len(files) + 1)]
        bit = rng.randrange(file.stat().st_size * 8)
        flip_bit(file, bit)
        loaded = load_latest(tmp_path)
        assert loaded is not None
        assert loaded.step == 1, (file.name, bit)
        assert loaded.skipped[0][0] == newest
        assert file.name in loaded.skipped[0][1]
        flip_bit(file, bit)
    assert loaded_step(tmp_path) == 2


@pytest.mark.parametrize(
    "fault", ["missing", "truncated", "other step's", "longer", "symlink", "empty"]
)
def test_a_damaged_file_falls_back_and_says_which(
    tmp_path: Path, layout: Layout, fault: str
) -> None:
    files, group = layout
    older, newest = save(tmp_path, 1, group=group), save(tmp_path, 2, group=group)
    for file in [
        name for name in files if (name, fault) != (".metadata", "other step's")
    ]:  # it is the same at any step
        target, data = newest / file, (newest / file).read_bytes()
        target.unlink()
        if fault == "truncated":
            target.write_bytes(data[:-1])
        elif fault == "other step's":
            target.write_bytes((older / file).read_bytes())
        elif fault == "longer":
            target.write_bytes(data + b" ")
        elif fault == "empty":
            target.touch()
        elif fault == "symlink":
            (tmp_path / "elsewhere").write_bytes(data)
            target.symlink_to(tmp_path / "elsewhere")
        loaded = load_latest(tmp_path)
        assert loaded is not None
        assert loaded.step == 1
        ((path, reason),) = loaded.skipped
        assert path == newest
        assert file in reason
        assert "Restore step_00000002" in reason
        target.unlink(missing_ok=True)
        target.write_bytes(data)
    assert loaded_step(tmp_path) == 2


def test_a_renamed_folder_is_not_another_step(tmp_path: Path) -> None:
    save(tmp_path, 1).rename(tmp_path / "step_00000009")
    with pytest.raises(CheckpointError, match="marker is damaged"):
        load_latest(tmp_path)


def test_never_from_scratch_when_no_checkpoint_can_be_trusted(
    tmp_path: Path, layout: Layout
) -> None:
    files, group = layout
    for step in (1, 2):
        flip_bit(save(tmp_path, step, group=group) / files[0], 900)
    with pytest.raises(
        CheckpointError, match=r"(?s)2 checkpoint.*step_00000002.*step_00000001.*start from scratch"
    ):
        load_latest(tmp_path)


def test_the_last_verified_checkpoint_survives_any_number_of_damaged_ones(
    tmp_path: Path, layout: Layout
) -> None:
    files, group = layout
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3, group=group)
    for step in (2, 3):
        flip_bit(tmp_path / f"step_{step:08d}" / files[0], 900)
    assert loaded_step(tmp_path) == 1
    with pytest.raises(CheckpointError), full_disk():
        save(tmp_path, 4, keep=1, group=group)
    assert loaded_step(tmp_path) == 1
    save(tmp_path, 2, keep=1, group=group)
    assert loaded_step(tmp_path) == 2


@pytest.mark.parametrize("number", [1, 2])
def test_a_checkpoint_of_an_unreleased_format_is_refused_by_name(
    tmp_path: Path, number: int
) -> None:
    marker = save(tmp_path, 1) / "COMMITTED"
    promised = json.loads(marker.read_text())
    old = {"format": f"fastmoco-checkpoint-{number}", "step": 1, "files": promised["files"]}
    marker.write_text(json.dumps(old, indent=1))
    error = rf"(?s)step_00000001: the COMMITTED marker has the format fastmoco-checkpoint-{number}.*start from scratch"
    with pytest.raises(CheckpointError, match=error):
        load_latest(tmp_path)


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.mkdir, (str(self.marker),)


def test_hostile_pickles_are_never_opened(tmp_path: Path) -> None:
    exploded = tmp_path / "exploded"
    payload = pickle.dumps(Bomb(exploded))
    older, newest = save(tmp_path / "c", 1), save(tmp_path / "c", 2)
    for name in (".metadata", "state.pkl", "model.pt", "pytorch_model.bin", "__init__.py"):
        (newest / name).write_bytes(payload)
    opened: list[str] = []
    armed = True

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if armed and event == "open":
            opened.append(str(arguments[0]))

    sys.addaudithook(watch)
    assert loaded_step(tmp_path / "c") == 2
    for file in ("tensors.safetensors", "state.json"):
        (newest / file).write_bytes(payload)
        assert loaded_step(tmp_path / "c") == 1
    armed = False
    assert {Path(path).name for path in opened} <= {
        "tensors.safetensors",
        "state.json",
        "COMMITTED",
    }
    assert any(str(older) in path for path in opened)
    assert not exploded.exists()
    pickle.loads(payload)  # noqa: S301 - the bomb was live
    assert exploded.exists()


def test_a_full_disk_leaves_the_last_checkpoint_alone(tmp_path: Path, layout: Layout) -> None:
    _, group = layout
    save(tmp_path, 1, group=group)
    with (
        full_disk(),
        pytest.raises(
            CheckpointError,
            match=r"step 2 was not written.*Earlier checkpoints are untouched. Free space",
        ),
    ):
        save(tmp_path, 2, group=group)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert loaded_step(tmp_path) == 1
    save(tmp_path, 2, group=group)
    assert loaded_step(tmp_path) == 2


def test_a_folder_of_the_step_that_is_valid_is_never_mixed_with_another(
    tmp_path: Path, layout: Layout
) -> None:
    files, group = layout
    path = save(tmp_path, 1, group=group)
    before = {name: (path / name).read_bytes() for name in files}
    with pytest.raises(CheckpointError, match="never overwritten"):
        save_checkpoint(tmp_path, step=1, tensors=content(2), state={}, keep=1, group=group)
    assert {name: (path / name).read_bytes() for name in files} == before
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    flip_bit(path / files[0], 900)
    save(tmp_path, 1, group=group)
    assert {name: (path / name).read_bytes() for name in files} == before


@pytest.mark.parametrize("name", ["step_00000001", ".writing-step_00000007-0a0a0a0a"])
@pytest.mark.parametrize("target", ["checkpoint", "run", "file", "absent", "pipe"])
def test_links_in_the_place_of_folders_are_taken_away_and_not_followed(
    tmp_path: Path, name: str, target: str
) -> None:
    """Also one to a checkpoint with the very content that is saved."""
    elsewhere = tmp_path / "elsewhere"
    copied = save(elsewhere / "checkpoint", 1)
    (elsewhere / "run").mkdir()
    (elsewhere / "run" / "precious").write_text("all of it")
    (elsewhere / "file").write_text("all of it")
    os.mkfifo(elsewhere / "pipe")
    place = tmp_path / "root" / name
    place.parent.mkdir()
    place.symlink_to(copied if target == "checkpoint" else elsewhere / target)
    before = {path: path.lstat().st_mtime_ns for path in elsewhere.rglob("*")}
    path = save(place.parent, 1)
    assert not path.is_symlink()
    assert [one.name for one in place.parent.iterdir()] == ["step_00000001"]
    assert loaded_step(place.parent) == 1
    assert {path: path.lstat().st_mtime_ns for path in elsewhere.rglob("*")} == before


def test_a_root_that_is_a_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("")
    with pytest.raises(CheckpointError, match="step 2 was not written"):
        save(tmp_path / "c", 2)
