import json
import os
import stat
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastmoco.checkpoint import (
    JSON,
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    save_checkpoint,
    unfinished_saves,
)
from tests.checkpoint_content import assert_same, content, flip_bit, loaded_step, save


@pytest.mark.parametrize("name", ["c", "run [1] {a}*", os.fsdecode(b"na\xefve\n")])
def test_every_dtype_and_the_state_come_back_bit_exact(tmp_path: Path, name: str) -> None:
    state: dict[str, JSON] = {
        "config": {"lr": 1.5e-4, "views": (1, 2)},
        "name": "ä☃\ud800",
        "none": None,
        "flags": [True, False],
        "n": 2**70,
    }
    path = save_checkpoint(tmp_path / name, step=123, tensors=content(123), state=state, keep=1)
    loaded = load_latest(tmp_path / name)
    assert path.name == "step_00000123"
    assert loaded is not None
    assert (loaded.step, loaded.path, loaded.skipped) == (123, path, ())
    assert_same(loaded.tensors, content(123))
    assert loaded.state == {**state, "config": {"lr": 1.5e-4, "views": [1, 2]}}


def test_views_and_shared_storage_are_stored_whole(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    weight = nn.Parameter(torch.ones(3))
    tensors = {
        "base": base,
        "transposed": base.t(),
        "strided": base[::2, 1::3],
        "row": base[1],
        "tied_a": weight,
        "tied_b": weight,
        "expanded": torch.ones(1).expand(5),
    }
    save_checkpoint(tmp_path, step=0, tensors=tensors, state={}, keep=1)
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert_same(loaded.tensors, {name: tensor.detach() for name, tensor in tensors.items()})


def test_loaded_tensors_own_their_memory(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    loaded = load_checkpoint(path)
    assert loaded.tensors is loaded.tensors
    (path / "tensors.safetensors").write_bytes(
        b"\0" * (path / "tensors.safetensors").stat().st_size
    )
    loaded.tensors["scalar"] += 1
    assert_same({**loaded.tensors, "scalar": torch.tensor(1.0)}, content(1))


def test_files_and_folders_are_private(tmp_path: Path) -> None:
    path = save(tmp_path / "run" / "checkpoints", 1)
    assert [stat.S_IMODE(p.stat().st_mode) for p in (path.parent, path)] == [0o700, 0o700]
    assert {p.name: stat.S_IMODE(p.stat().st_mode) for p in path.iterdir()} == dict.fromkeys(
        ["tensors.safetensors", "state.json", "COMMITTED"], 0o600
    )


def test_nothing_saved_is_none_and_last_n_are_kept(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "absent") is None
    assert load_latest(tmp_path) is None
    for step in (10, 20, 30, 40):
        save(tmp_path, step, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000030", "step_00000040"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000030", "step_00000040"]


def test_a_run_that_fell_back_keeps_what_it_stands_on(tmp_path: Path) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 3)
    flip_bit(newest / "tensors.safetensors", 900)
    save(tmp_path, 2, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000002", "step_00000003"]
    assert loaded_step(tmp_path) == 2
    save(tmp_path, 3, keep=1)
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert (loaded.step, loaded.skipped) == (3, ())
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def test_a_valid_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    marker = (path / "COMMITTED").stat()
    assert save(tmp_path, 1) == path
    again = (
        path / "COMMITTED"
    ).stat()  # which reading may have changed: the time of the last access
    assert (again.st_ino, again.st_size, again.st_mtime_ns) == (
        marker.st_ino,
        marker.st_size,
        marker.st_mtime_ns,
    )
    with pytest.raises(CheckpointError, match="never overwritten"):
        save_checkpoint(tmp_path, step=1, tensors=content(2), state={}, keep=1)
    assert_same(load_checkpoint(path).tensors, content(1))
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


def test_leftovers_of_killed_saves_are_ignored_then_swept(tmp_path: Path) -> None:
    (tmp_path / ".writing-step_00000007-0123abcd").mkdir()
    half = tmp_path / "step_00000008"
    half.mkdir()
    (half / "tensors.safetensors").write_bytes(b"half")
    (tmp_path / "mine").mkdir()
    assert load_latest(tmp_path) is None
    assert len(unfinished_saves(tmp_path)) == 2
    save(tmp_path, 9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "step_00000009"]


def test_what_cannot_be_stored_is_named(tmp_path: Path) -> None:
    def refused(
        match: str, tensors: dict[str, Tensor] | None = None, state: dict[str, object] | None = None
    ) -> None:
        with pytest.raises(CheckpointError, match=match):
            save_checkpoint(tmp_path, step=1, tensors=tensors or {}, state=state or {}, keep=1)  # type: ignore[arg-type]
        assert list(tmp_path.iterdir()) == []

    refused("'a.b' is torch.sparse_coo", {"a.b": torch.eye(2).to_sparse()})
    refused("'a.b' is .* on meta", {"a.b": torch.empty(2, device="meta")})
    refused(
        r"\['a.b'\] are torch.complex128",
        {"ok": torch.ones(1), "a.b": torch.zeros(2, dtype=torch.complex128)},
    )
    refused("__metadata__", {"__metadata__": torch.ones(1)})
    refused(r"state.best\[1\] is nan", state={"best": [1, float("nan")]})
    refused("state.rng is Tensor", state={"rng": torch.ones(1)})
    refused("state.path is PosixPath", state={"path": tmp_path})
    refused(r"state.map has the key 3", state={"map": {3: "x"}})


@pytest.mark.parametrize(("step", "keep", "match"), [(-1, 1, "step=-1"), (0, 0, "keep=0")])
def test_numbers_out_of_range_are_named(tmp_path: Path, step: int, keep: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        save_checkpoint(tmp_path, step=step, tensors={}, state={}, keep=keep)


def test_the_marker_names_what_it_vouches_for(tmp_path: Path) -> None:
    marker = json.loads((save(tmp_path, 5) / "COMMITTED").read_text())
    assert (marker["step"], sorted(marker["files"])) == (5, ["state.json", "tensors.safetensors"])
