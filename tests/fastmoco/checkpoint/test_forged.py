"""Checkpoints whose files agree with each other and say what no run can have written: refused by
name, and the checkpoint before is loaded.

One pair of checkpoints is saved for the module; each case changes the newer one and puts it back.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmoco.checkpoint import (
    CheckpointError,
    inspect_checkpoints,
    load_checkpoint,
    load_latest,
    read_state,
    save_checkpoint,
)
from fastmoco.checkpoint.folder import fingerprint, marker_text
from fastmoco.config.serial import to_json
from fastmoco.recipes import quickstart_digits
from tests.checkpoint_content import content

pytestmark = pytest.mark.faults

RUN = "0123456789abcdef"


def state_of_a_run() -> dict[str, Any]:
    config = quickstart_digits()
    return {
        "run_id": RUN,
        "config": to_json(config),
        "resolved": {
            "world_size": 1,
            "sample_count": 1437,
            "steps_per_epoch": 5,
            "total_steps": 650,
            "local_batch_size": 256,
            "peak_lr": 0.0015,
            "precision": "fp32",
        },
        "data": {"step": 2, "digest": "ab", "order_digest": "cd", "shuffle_window": 0},
        "monitors": {
            "knn": {"last_epoch": 1.0, "last": {"knn": 0.5}, "best": {"knn": 0.5}, "best_step": {}}
        },
        "rollback": {"history": [[1, {"all": 2.0}]], "total": 0, "row": 0, "last": None},
        "score": {"name": "knn", "label": "kNN", "value": 0.5},
        "twin_advanced": True,
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("forged")
    for step in (1, 2):
        path = save_checkpoint(
            root, step=step, tensors=content(step), state=state_of_a_run(), keep=2
        )
    return path


@pytest.fixture
def folder(saved: Path) -> Iterator[Path]:
    """The newer one of two sound checkpoints."""
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    yield saved
    shutil.rmtree(saved)
    saved.mkdir()
    for name, data in before.items():
        (saved / name).write_bytes(data)


def vouch(folder: Path, **changes: Any) -> None:
    """Bring the marker in line with the files, as an attacker does, who may then change it."""
    files = {name: fingerprint(folder / name) for name in ("tensors.safetensors", "state.json")}
    text = marker_text(2, files, world_size=1, saved_at="2026-01-01T00:00:00Z", run_id=RUN)
    if changes:
        body = {k: v for k, v in json.loads(text).items() if k != "sha256"}
        for name, value in changes.items():
            body[name] = value(body[name]) if callable(value) else value
        body = {name: value for name, value in body.items() if value is not ...}
        digest = hashlib.sha256(json.dumps(body, indent=1).encode()).hexdigest()
        text = json.dumps(body | {"sha256": digest}, indent=1)
    (folder / "COMMITTED").write_text(text)


def refused(folder: Path, words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(folder)
    assert words in str(error.value)
    loaded = load_latest(folder.parent)
    assert loaded is not None
    assert (loaded.step, loaded.skipped[0][0]) == (1, folder)
    faults = {found.step: found.fault for found in inspect_checkpoints(folder.parent)}
    assert words in faults[2]
    assert not faults[1]


def test_the_pair_is_sound(folder: Path) -> None:
    vouch(folder)
    loaded = load_latest(folder.parent)
    assert loaded is not None
    assert loaded.step == 2
    assert loaded.state == json.loads(json.dumps(state_of_a_run()))


def put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Another value at a dotted name; ... removes it."""
    *groups, last = path.split(".")

    def change(state: dict[str, Any]) -> None:
        for group in groups:
            state = state[group]
        if value is ...:
            del state[last]
        else:
            state[last] = value

    return change


STATES = [
    (put("config", ...), "config has no entries"),
    (put("config", 3), "config is 3: it must be an object"),
    (put("config.epochs", "many"), "epochs"),
    (put("config.knn.k", -1), "config.knn.k"),
    (put("config.data.shards", 5), "config.data.shards"),
    (put("config.batch.cuda_graphs", "no"), "config.batch.cuda_graphs"),
    (put("config.forged", 1), "unknown fields"),
    (put("config.of_tomorrow", 1), "if another version of fastmoco has written it, use that one"),
    (put("config.optim", []), "config.optim"),
    (put("config.seed", True), "config.seed=True: must be a whole number"),
    (put("data.order_version", -1), "data.order_version is -1"),
    (put("resolved", ...), "resolved has no world_size"),
    (put("resolved", None), "resolved is None: it must be an object"),
    (put("resolved.sample_count", ...), "resolved has no sample_count"),
    (put("resolved.sample_count", "1437"), "resolved.sample_count is '1437'"),
    (put("resolved.sample_count", 1e300), "resolved.sample_count is 1e+300"),
    (put("resolved.sample_count", 10**400), "resolved.sample_count is 1000"),
    (put("resolved.sample_count", 9999), "resolved.steps_per_epoch is 5, by its config 39"),
    (put("resolved.world_size", -1), "resolved.world_size is -1"),
    (put("resolved.world_size", True), "resolved.world_size is True"),
    (put("resolved.world_size", 3), "multiple of the 3 processes"),
    (put("resolved.total_steps", 2), "resolved.total_steps is 2, by its config 650"),
    (put("resolved.precision", 32), "resolved.precision is 32"),
    (put("data", ...), "data has no digest"),
    (put("data.step", -2), "data.step is -2"),
    (put("data.digest", ["a"]), "data.digest is a list or object"),
    (put("data.shuffle_window", 0.5), "data.shuffle_window is 0.5"),
    (put("monitors", []), "monitors is a list or object"),
    (put("monitors.knn", 7), "monitors.knn is 7"),
    (put("monitors.knn.last", "x"), "monitors.knn.last is 'x'"),
    (put("monitors.knn.best_step", {"knn": -1}), "monitors.knn.best_step"),
    (put("rollback.history", [[1]]), "rollback.history"),
    (put("rollback.history", [[1, {"all": "x"}]]), "rollback.history"),
    (put("rollback.pending", 5), "rollback.pending is 5"),
    (put("rollback.last", [1]), "rollback.last"),
    (put("rollback.total", -3), "rollback.total is -3"),
    (put("score", 0.9), "score is 0.9: it must be an object"),
    (put("score.value", 7.0), "score.value is 7.0: it must be a share from 0 to 1"),
    (put("twin_advanced", "no"), "twin_advanced is 'no'"),
    (put("run_id", "another"), "run_id is another one than that of the marker"),
    (put("run_id", 5), "run_id is 5"),
]


def test_a_forged_state_is_refused_by_its_entry(folder: Path) -> None:
    for change, words in STATES:
        state = copy.deepcopy(state_of_a_run())
        change(state)
        (folder / "state.json").write_text(json.dumps(state))
        vouch(folder)
        refused(folder, words)
        with pytest.raises(CheckpointError, match=r"state\.json"):
            read_state(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "nested deeper"),
        (b'{"a": NaN}', "NaN is no finite number"),
        (b'{"a": 1e999}', "1e999 is no finite number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number is too long"),
        (b'{"a": 1, "a": 2}', "a has two values"),
        (b'{"a": "\xff"}', "0xff is not UTF-8"),
        (b"[1]", "holds no JSON object"),
        (b"", "not JSON"),
    ],
    ids=str,
)
def test_a_state_that_is_no_json_of_ours_is_refused(folder: Path, text: bytes, words: str) -> None:
    (folder / "state.json").write_bytes(text)
    vouch(folder)
    refused(folder, words)


HASH = "0" * 64
MARKERS: list[tuple[dict[str, Any], str]] = [
    ({"step": 3}, "step is not that of the folder's name"),
    ({"step": -2}, "step is not that"),
    ({"step": 2.0}, "step is not that"),
    ({"step": "2"}, "step is not that"),
    ({"step": ...}, "other entries"),
    ({"world_size": 0}, "world_size is no number of ranks"),
    ({"world_size": "many"}, "world_size is no number of ranks"),
    ({"world_size": 10**30}, "world_size is no number of ranks"),
    ({"saved_at": "\x1b[2Jgone"}, "saved_at or run_id is no plain text"),
    ({"saved_at": None}, "saved_at or run_id is no plain text"),
    ({"run_id": ["a"]}, "saved_at or run_id is no plain text"),
    ({"format": ["fastmoco-checkpoint-3"]}, "marker is damaged"),
    ({"format": "fastmoco-checkpoint-9"}, "its format is not"),
    ({"files": []}, "files does not list state.json"),
    ({"files": {"state.json": {"bytes": 1, "sha256": HASH}}}, "files lists neither"),
    ({"files": lambda f: f | {"/etc/passwd": f["state.json"]}}, "files lists neither"),
    ({"files": lambda f: f | {".metadata": f["state.json"]}}, "files lists neither"),
    ({"files": lambda f: f | {"__0_0.distcp": f["state.json"]}}, "files lists neither"),
    ({"files": lambda f: f | {"state.json": None}}, "no size and SHA-256 of state.json"),
    ({"files": lambda f: f | {"state.json": {"bytes": 1}}}, "no size and SHA-256 of state.json"),
    (
        {"files": lambda f: f | {"state.json": f["state.json"] | {"bytes": -1}}},
        "no size and SHA-256 of state.json",
    ),
    (
        {"files": lambda f: f | {"state.json": {"bytes": 1e300, "sha256": HASH}}},
        "no size and SHA-256 of state.json",
    ),
    (
        {"files": lambda f: {"state.json": f["state.json"], ".metadata": f["state.json"]}
            | {"__1_0.distcp": f["state.json"]}},
        "'__1_0.distcp', which is no file of its 1 rank(s)",
    ),
    (
        {"files": lambda f: {"state.json": f["state.json"], ".metadata": f["state.json"]}
            | {"../x.distcp": f["state.json"]}},
        "'../x.distcp', which is no file",
    ),
]  # fmt: skip


def test_a_forged_marker_is_refused_by_what_is_wrong(folder: Path) -> None:
    for changes, words in MARKERS:
        vouch(folder, **changes)
        refused(folder, words)


@pytest.mark.parametrize("text", [b"[" * 50_000, b"{}", b"3", b"\xff", b'{"format": NaN}', b""])
def test_a_marker_that_is_none_is_refused(folder: Path, text: bytes) -> None:
    (folder / "COMMITTED").write_bytes(text)
    refused(folder, "marker is damaged")


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "COMMITTED"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_file_is_never_opened(folder: Path, name: str, kind: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).unlink()
    if kind == "link":
        (folder.parent / "elsewhere").write_bytes(data)
        (folder / name).symlink_to(folder.parent / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).mkdir()
    with pytest.raises(CheckpointError, match=r"not a plain file|symbolic link|no usable COMM"):
        load_checkpoint(folder)
    loaded = load_latest(folder.parent)
    assert loaded is not None
    assert loaded.step == 1


@pytest.mark.parametrize("data", [b"", b"\xff" * 99])
def test_a_file_that_changes_after_its_check_is_a_named_error(folder: Path, data: bytes) -> None:
    loaded = load_checkpoint(folder)
    (folder / "tensors.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"step_00000002 cannot be read any more"):
        _ = loaded.tensors


def reheaded(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """The same bytes of tensors behind another header."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    made = change(header)
    text = made if isinstance(made, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def shifted(header: dict[str, Any]) -> None:
    """A tensor that begins inside the one before it."""
    begin, end = header["bool"]["data_offsets"]
    header["bool"]["data_offsets"] = [begin - 1, end - 1]


def twice(header: dict[str, Any]) -> bytes:
    """Two entries of one name, of which safetensors takes the last."""
    return (
        json.dumps(header)[:-1].encode()
        + b', "bool": '
        + json.dumps(header["bool"]).encode()
        + b"}"
    )


HEADERS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (put("float32.dtype", "I64"), "float32 of shape [40, 50] and I64 has 8000 bytes"),
    (put("float32.dtype", "X9"), "the dtype X9, which is unknown"),
    (put("float32.dtype", None), "the dtype NoneType"),
    (put("float32.shape", [40, 51]), "float32 of shape [40, 51]"),
    (put("float32.shape", [-40, -50]), "float32 has no shape"),
    (put("float32.shape", "40"), "float32 has no shape"),
    (put("float32.shape", [1] * 65), "float32 has no shape"),
    (put("empty.shape", [0, 2**61, 2**61]), "empty has no possible shape"),
    (put("float32.data_offsets", [0]), "float32 has no data_offsets"),
    (put("float32.data_offsets", [0, 10**30]), "float32 has no data_offsets"),
    (put("float32.extra", 1), "has not the entries"),
    (put("float32", 3), "has not the entries"),
    (put("float32", ...), "overlaps another tensor, or leaves a gap"),
    (put("__metadata__", {"a": 1}), "are not texts by name"),
    (put("__metadata__", []), "are not texts by name"),
    (shifted, "overlaps another tensor, or leaves a gap"),
    (twice, "bool has two values"),
    (lambda header: b"[]", "no object of JSON"),
    (lambda header: b'{"a": ' * 40 + b"1" + b"}" * 40, "nested deeper"),
    (lambda header: b'{"a": NaN}', "no finite number"),
    (lambda header: b"{", "not JSON"),
    (lambda header: b"\xef\xbb\xbf" + json.dumps(header).encode(), "no object of JSON"),
    (lambda header: b" " + json.dumps(header).encode(), "no object of JSON"),
    (lambda header: header.update({"\ud800": header.pop("empty")}), r"\ud800 in its header"),
    (put("__metadata__", {"a": "\udfff"}), r"\udfff in its header"),
]


def test_a_forged_header_of_the_tensors_is_refused(folder: Path) -> None:
    file = folder / "tensors.safetensors"
    sound = file.read_bytes()
    for change, words in HEADERS:
        file.write_bytes(sound)
        reheaded(file, change)
        vouch(folder)
        refused(folder, words)
    for data, words in (
        (b"", "it has 0 bytes"),
        (sound[:8], "a header of"),
        ((1 << 40).to_bytes(8, "little") + sound[8:], "a header of 1099511627776"),
        (sound + b"more", "its tensors end at byte"),
    ):
        file.write_bytes(data)
        vouch(folder)
        refused(folder, words)


@pytest.mark.parametrize(
    ("name", "dtype", "was"),
    [
        ("float32", "I32", torch.float32),
        ("float32", "U32", torch.float32),
        ("float64", "I64", torch.float64),
        ("bfloat16", "F16", torch.bfloat16),
        ("bool", "U8", torch.bool),
        ("int64", "F64", torch.int64),
    ],
)
def test_another_dtype_of_the_same_size_is_refused_by_the_model(
    folder: Path, name: str, dtype: str, was: torch.dtype
) -> None:
    reheaded(folder / "tensors.safetensors", put(f"{name}.dtype", dtype))
    vouch(folder)
    loaded = load_checkpoint(folder)
    target = {name: torch.zeros(loaded.entries[name].shape, dtype=was)}
    with pytest.raises(CheckpointError, match=rf"{name} is torch\.\S+ .*the model has {was}"):
        loaded.read_into(target)
