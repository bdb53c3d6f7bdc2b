"""A newer checkpoint that was passed over is never lost by what the run saves afterwards, unless its
damage is proven.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastmoco.checkpoint import (
    list_checkpoints,
    load_latest,
    loading,
    save_checkpoint,
    unfinished_saves,
)
from fastmoco.checkpoint.folder import fingerprint, is_kept, marker_text
from fastmoco.distributed.mesh import World
from fastmoco.faults.pulse import Pulse
from fastmoco.recipes import quickstart_digits
from fastmoco.run.folder import RunFolder
from fastmoco.training.saving import Saving
from tests.checkpoint_content import content, flip_bit, save

pytestmark = pytest.mark.faults


def vouched(folder: Path, state: dict[str, Any]) -> None:
    """Another state, with a marker that agrees."""
    (folder / "state.json").write_text(json.dumps(state))
    files = {name: fingerprint(folder / name) for name in ("tensors.safetensors", "state.json")}
    text = marker_text(2, files, world_size=1, saved_at="2026-01-01T00:00:00Z", run_id="a")
    (folder / "COMMITTED").write_text(text)


def a_field_of_tomorrow(folder: Path, patch: pytest.MonkeyPatch) -> None:
    vouched(folder, {"run_id": "a", "config": {"of_tomorrow": 1}, "resolved": {}, "data": {}})


def a_format_of_tomorrow(folder: Path, patch: pytest.MonkeyPatch) -> None:
    marker = json.loads((folder / "COMMITTED").read_text())
    text = json.dumps(marker | {"format": "fastmoco-checkpoint-4", "more": 1}, indent=1)
    (folder / "COMMITTED").write_text(text)


def tensors_on_another_disk(folder: Path, patch: pytest.MonkeyPatch) -> None:
    (folder / "tensors.safetensors").rename(folder.parent / "elsewhere")
    (folder / "tensors.safetensors").symlink_to("../elsewhere")


def failing(error: BaseException, function: str = "verify") -> Any:
    """A disk, a descriptor or a memory that is missing while the checkpoint is opened."""

    def put(folder: Path, patch: pytest.MonkeyPatch) -> None:
        real = getattr(loading, function)

        def fails(path: Path, *rest: Any) -> Any:
            if folder in (path, path.parent):
                raise error
            return real(path, *rest)

        patch.setattr(loading, function, fails)

    return put


REASONS: dict[str, Callable[[Path, pytest.MonkeyPatch], None]] = {
    "a field of tomorrow": a_field_of_tomorrow,
    "a format of tomorrow": a_format_of_tomorrow,
    "tensors on another disk": tensors_on_another_disk,
    "permissions": failing(PermissionError(errno.EACCES, "Permission denied")),
    "disk": failing(OSError(errno.EIO, "Input/output error")),
    "open files": failing(OSError(errno.EMFILE, "Too many open files"), "state_of"),
    "memory": failing(MemoryError()),
    "memory for the tensors": failing(MemoryError(), "whole_entries"),
}


def going_on(out: Path) -> Saving:
    """What a run does that continues."""
    config = quickstart_digits()
    found = load_latest(out / "checkpoints")
    assert found is not None
    return Saving(
        config,
        World(),
        RunFolder(out),
        step=found.step,
        pulse=Pulse(config.faults),
        checkpoint=found,
    )


@pytest.mark.parametrize("reason", REASONS)
def test_what_was_passed_over_outlives_all_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    root = tmp_path / "checkpoints"
    save(root, 1)
    newest = save(root, 2)
    with monkeypatch.context() as patch:
        REASONS[reason](newest, patch)
        before = {file.name: file.read_bytes() for file in newest.iterdir()}
        found = load_latest(root)
        assert found is not None
        assert (found.step, found.kept) == (1, (newest,))
        (warning,) = found.warnings
        assert str(newest) in warning
        assert "It is kept: no save removes it." in warning
        going_on(tmp_path)

    # The trouble is over, or is not; later saves count without it, and it stays.
    for step in (3, 4, 5):
        save(root, step, keep=2)
    assert [path.name[-1] for path in list_checkpoints(root)] == ["2", "4", "5"]
    assert {file.name: file.read_bytes() for file in newest.iterdir()} == before

    # A save of its own step moves it aside.
    for path in list_checkpoints(root)[1:]:
        shutil.rmtree(path)
    save_checkpoint(root, step=2, tensors=content(9), state={}, keep=1)
    (aside,) = root.glob("step_00000002.kept-*")
    assert {file.name: file.read_bytes() for file in aside.iterdir()} == before
    save(root, 3, keep=1)
    assert [path.name for path in list_checkpoints(root)] == ["step_00000003"]
    assert aside.is_dir()


def test_what_is_proven_to_be_damaged_is_removed_in_its_turn(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    save(root, 1)
    flip_bit(save(root, 2) / "tensors.safetensors", 900)
    found = load_latest(root)
    assert found is not None
    assert (found.step, found.kept) == (1, ())
    assert "kept" not in found.warnings[0]
    going_on(tmp_path)
    for step in (3, 4):
        save(root, step, keep=1)
    assert [path.name for path in root.iterdir()] == ["step_00000004"]


def test_what_a_run_continues_from_after_all_is_removed_in_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "checkpoints"
    save(root, 1)
    newest = save(root, 2)
    with monkeypatch.context() as patch:
        REASONS["disk"](newest, patch)
        going_on(tmp_path)
    assert is_kept(newest)
    going_on(tmp_path)
    assert not is_kept(newest)
    save(root, 3, keep=1)
    assert [path.name for path in root.iterdir()] == ["step_00000003"]


def test_a_best_one_of_tomorrow_is_not_removed_because_its_score_is_unknown(tmp_path: Path) -> None:
    """Nobody has passed it over: an older version went on from a later checkpoint."""
    best = save(tmp_path, 2)
    vouched(best, {"run_id": "a", "config": {"of_tomorrow": 1}, "resolved": {}, "data": {}})
    for step in (3, 4):
        save(tmp_path, step, keep=1)
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["2", "4"]


def test_a_folder_whose_marker_cannot_be_looked_at_is_no_leftover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, 2)
    real = os.stat

    def stat(name: Any, *rest: Any, **named: Any) -> os.stat_result:
        if str(name).startswith(str(path)):
            raise PermissionError(errno.EACCES, "Permission denied", str(name))
        return real(name, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", stat)
        assert unfinished_saves(tmp_path) == []
        save(tmp_path, 3, keep=1)
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["2", "3"]
