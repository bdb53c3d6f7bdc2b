import itertools
import os
import pickle
import random
import resource
import signal
import sys
import time
from pathlib import Path

import pytest

from fastmoco.checkpoint import (
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    unfinished_saves,
)
from tests.checkpoint_content import assert_same, content, flip_bit, loaded_step, save


def test_fifty_flipped_bits_are_all_detected(tmp_path: Path) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    rng = random.Random(0)
    for trial in range(50):
        file = newest / ("tensors.safetensors", "state.json", "COMMITTED")[trial % 3]
        bit = rng.randrange(file.stat().st_size * 8)
        flip_bit(file, bit)
        loaded = load_latest(tmp_path)
        assert loaded is not None
        assert loaded.step == 1, (file.name, bit)
        assert loaded.skipped[0][0] == newest
        assert file.name in loaded.skipped[0][1]
        flip_bit(file, bit)
    assert loaded_step(tmp_path) == 2


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json"])
@pytest.mark.parametrize("fault", ["missing", "truncated", "other step's", "longer", "symlink"])
def test_a_damaged_file_falls_back_and_says_which(tmp_path: Path, file: str, fault: str) -> None:
    older, newest = save(tmp_path, 1), save(tmp_path, 2)
    target, data = newest / file, (newest / file).read_bytes()
    target.unlink()
    if fault == "truncated":
        target.write_bytes(data[:-1])
    elif fault == "other step's":
        target.write_bytes((older / file).read_bytes())
    elif fault == "longer":
        target.write_bytes(data + b" ")
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


def test_a_renamed_folder_is_not_another_step(tmp_path: Path) -> None:
    save(tmp_path, 1).rename(tmp_path / "step_00000009")
    with pytest.raises(CheckpointError, match="marker is damaged"):
        load_latest(tmp_path)


def test_never_from_scratch_when_no_checkpoint_can_be_trusted(tmp_path: Path) -> None:
    for step in (1, 2):
        flip_bit(save(tmp_path, step) / "tensors.safetensors", 900)
    with pytest.raises(CheckpointError, match=r"(?s)2 checkpoint.*step_00000002.*step_00000001.*start from scratch"):
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
    assert {Path(path).name for path in opened} <= {"tensors.safetensors", "state.json", "COMMITTED"}
    assert any(str(older) in path for path in opened)
    assert not exploded.exists()
    pickle.loads(payload)  # the bomb was live
    assert exploded.exists()


def test_a_full_disk_leaves_the_last_checkpoint_alone(tmp_path: Path) -> None:
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # writing beyond it fails as on a full disk
    try:
        with pytest.raises(
            CheckpointError, match=r"step 2 was not written.*Earlier checkpoints are untouched. Free space"
        ):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert loaded_step(tmp_path) == 1


def test_a_root_that_is_a_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("")
    with pytest.raises(CheckpointError, match="step 2 was not written"):
        save(tmp_path / "c", 2)


def save_until_killed(root: Path, first: int) -> tuple[int, int]:
    """A child that saves step after step and reports each; returns its process id and the pipe it reports to."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    try:
        for step in itertools.count(first):
            save(root, step)
            os.write(writing, b"%d\n" % step)
    finally:
        os._exit(1)


def test_kill_9_while_saving_never_leaves_a_believable_half(tmp_path: Path) -> None:
    """Twenty kills. The children share one folder, as a run that is restarted again and again does."""
    rng, first, interrupted = random.Random(1), 1, 0
    for _ in range(20):
        pid, reading = save_until_killed(tmp_path, first)
        reported = os.read(reading, 100)  # the first save is done
        time.sleep(rng.uniform(0.0, 0.06))
        os.kill(pid, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL, "the child had ended by itself"
        with os.fdopen(reading, "rb") as pipe:
            last_done = int((reported + pipe.read()).split()[-1])
        interrupted += len(unfinished_saves(tmp_path))
        for path in list_checkpoints(tmp_path):
            loaded = load_checkpoint(path)
            assert_same(loaded.tensors, content(loaded.step))
            assert loaded.state == {"step": loaded.step, "lr": 0.1}
        newest = load_latest(tmp_path)
        assert newest is not None
        assert newest.skipped == ()
        assert newest.step >= last_done, "a save that was reported as done is gone"
        first = newest.step + 1
    assert interrupted > 0, "no kill hit a save: the test proves nothing"
