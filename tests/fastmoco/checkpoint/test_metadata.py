"""`.metadata` is a pickle from the disk: whatever it says, nothing runs, and only tensors of this
checkpoint come out."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
)
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from fastmoco.checkpoint import (
    CheckpointError,
    dcp_metadata,
    load_checkpoint,
    load_latest,
    pickle_machine,
)
from fastmoco.checkpoint.dcp_metadata import read_metadata
from fastmoco.checkpoint.folder import fingerprint, marker_text
from tests.checkpoint_content import assert_same, content, group_of_one, save
from tests.hostile_pickles import HOSTILE

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def group() -> Iterator[dist.ProcessGroup]:
    with group_of_one() as group:
        yield group


@pytest.fixture
def folder(tmp_path: Path, group: dist.ProcessGroup) -> Path:
    """The newer of two sound checkpoints."""
    save(tmp_path / "c", 1, group=group)
    return save(tmp_path / "c", 2, group=group)


def vouch(folder: Path) -> None:
    """What an attacker does who may write: bring the marker in line with the files."""
    promised = json.loads((folder / "COMMITTED").read_text())
    files = {name: fingerprint(folder / name) for name in promised["files"]}
    text = marker_text(promised["step"], files, world_size=1, saved_at=promised["saved_at"])
    (folder / "COMMITTED").write_text(text)


def refused(folder: Path, match: str) -> None:
    """The folder is passed over, for this reason, and the one before it is loaded."""
    with pytest.raises(CheckpointError, match=match):
        load_checkpoint(folder)
    loaded = load_latest(folder.parent)
    assert loaded is not None
    assert (loaded.step, loaded.skipped[0][0]) == (1, folder)
    assert_same(loaded.tensors, content(1))


class Calls:
    """Unpickled by calling a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def hostile(marker: Path) -> dict[str, bytes]:
    """Pickles that make a folder when a plain unpickler reads them."""
    path = str(marker)
    bombs: dict[str, object] = {
        "os": Calls(os.mkdir, path),
        "a nested one": Metadata(state_dict_metadata={"w": Calls(os.mkdir, path)}),  # type: ignore[dict-item]
        "eval": Calls(eval, f"__import__('os').mkdir({path!r})"),
        "getattr": Calls(getattr(os, "mkdir"), path),  # noqa: B009
        "torch": Calls(torch.hub.load_state_dict_from_url, f"file://{path}", path),
    }
    old_style = f"cposix\nmkdir\n(V{path}\ntR.".encode()
    by_instance = f"(V{path}\niposix\nmkdir\n.".encode()
    dotted = b"\x80\x04\x8c\x05torch\x8c\x0cos.path.join\x93."
    return {name: pickle.dumps(bomb) for name, bomb in bombs.items()} | {
        "protocol 0": old_style,
        "by instance": by_instance,
        "a dotted name": dotted,
    }


@pytest.mark.parametrize(
    "kind",
    [
        "os",
        "a nested one",
        "eval",
        "getattr",
        "torch",
        "protocol 0",
        "by instance",
        "a dotted name",
    ],
)
def test_a_hostile_metadata_runs_nothing(folder: Path, tmp_path: Path, kind: str) -> None:
    exploded = tmp_path / "exploded"
    payload = hostile(exploded)[kind]
    (folder / ".metadata").write_bytes(payload)
    refused(folder, "differs in size or SHA-256")
    vouch(folder)
    refused(folder, r"\.metadata is refused: it names \S+, which no checkpoint of tensors needs")
    assert not exploded.exists()
    if kind in ("os", "a nested one", "eval", "getattr", "protocol 0", "by instance"):
        pickle.loads(payload)  # noqa: S301 - the bomb was live
        assert exploded.exists()


@pytest.mark.parametrize("cut", [0, 1, 50, -1])
def test_a_cut_metadata_is_refused(folder: Path, cut: int) -> None:
    (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:cut])
    refused(folder, "differs in size or SHA-256")
    vouch(folder)
    refused(folder, r"\.metadata is refused")


def changed(**fields: Any) -> Callable[[Metadata], Metadata]:
    return lambda metadata: dataclasses.replace(metadata, **fields)


def with_entry(name: str, entry: Any) -> Callable[[Metadata], Metadata]:
    return lambda m: dataclasses.replace(
        m, state_dict_metadata={**m.state_dict_metadata, name: entry}
    )


def with_place(**fields: Any) -> Callable[[Metadata], Metadata]:
    """Another place on the disk for the first piece."""

    def change(metadata: Metadata) -> Metadata:
        index, place = next(iter(metadata.storage_data.items()))
        return dataclasses.replace(
            metadata,
            storage_data={**metadata.storage_data, index: dataclasses.replace(place, **fields)},
        )

    return change


def with_chunk(offsets: list[int], sizes: list[int]) -> Callable[[Metadata], Metadata]:
    """Another chunk for the matrix of 40 x 50."""

    def change(metadata: Metadata) -> Metadata:
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        entry = dataclasses.replace(metadata.state_dict_metadata["float32"], chunks=[chunk])
        return dataclasses.replace(
            metadata, state_dict_metadata={**metadata.state_dict_metadata, "float32": entry}
        )

    return change


def huge(metadata: Metadata) -> Metadata:
    """A tensor of exabytes, in a file of a few kilobytes."""
    size = torch.Size([2**30, 2**30])
    chunk = ChunkStorageMetadata(torch.Size([0, 0]), size)
    entry = dataclasses.replace(metadata.state_dict_metadata["float32"], size=size, chunks=[chunk])
    return dataclasses.replace(
        metadata, state_dict_metadata={**metadata.state_dict_metadata, "float32": entry}
    )


def twice_the_same(metadata: Metadata) -> Metadata:
    """Two tensors with the same list of chunks."""
    entry = metadata.state_dict_metadata["float32"]
    return dataclasses.replace(
        metadata, state_dict_metadata={**metadata.state_dict_metadata, "other": entry}
    )


def overlapping(metadata: Metadata) -> Metadata:
    """Two chunks of together as many elements as the tensor, with ten rows in common."""
    size = torch.Size([20, 50])
    chunks = [ChunkStorageMetadata(torch.Size([row, 0]), size) for row in (0, 10)]
    entry = dataclasses.replace(metadata.state_dict_metadata["float32"], chunks=chunks)
    first = MetadataIndex("float32", torch.Size([0, 0]))
    place = metadata.storage_data[first]
    half = place.length // 2
    stored = {
        first: dataclasses.replace(place, length=half),
        MetadataIndex("float32", torch.Size([10, 0])): dataclasses.replace(
            place, offset=place.offset + half, length=half
        ),
    }
    return dataclasses.replace(
        metadata,
        state_dict_metadata={**metadata.state_dict_metadata, "float32": entry},
        storage_data={**metadata.storage_data, **stored},
    )


def with_dtype(dtype: torch.dtype) -> Callable[[Metadata], Metadata]:
    """Another dtype of the same size for the matrix."""

    def change(metadata: Metadata) -> Metadata:
        entry = metadata.state_dict_metadata["float32"]
        other = dataclasses.replace(
            entry, properties=dataclasses.replace(entry.properties, dtype=dtype)
        )
        return dataclasses.replace(
            metadata, state_dict_metadata={**metadata.state_dict_metadata, "float32": other}
        )

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (with_place(relative_path="../../etc/passwd"), "which is no file of this checkpoint"),
        (with_place(relative_path="/etc/passwd"), "which is no file of this checkpoint"),
        (with_place(relative_path="state.json"), "which is no file of this checkpoint"),
        (with_place(offset=10**9), "is outside"),
        (with_place(offset=-5), "is outside"),
        (with_place(length=3), "in fewer bytes than it has"),
        (with_place(transform_descriptors=["zstd"]), "asks for a transformation"),
        (with_chunk([0, 0], [40, 51]), "a chunk outside its shape"),
        (with_chunk([-1, 0], [40, 50]), "a chunk outside its shape"),
        (with_chunk([0, 0], [20, 50]), "chunks of 1000 elements for a shape of 2000"),
        (with_chunk([1, 0], [39, 50]), "is not stored"),
        (huge, "in fewer bytes than it has"),
        (with_place(offset=100, length=9577), "two pieces overlap at byte"),
        (with_place(relative_path="__0_0.distcp\0"), "which is no file of this checkpoint"),
        (with_place(offset=2**80), "a whole number of|is outside"),
        (with_place(offset=True), "a piece has no place"),
        (with_chunk([0], [40]), "no shape of its dimensions"),
        (with_chunk([0, 0], [2**61, 50]), "a chunk outside its shape"),
        (twice_the_same, "has chunks that are not stored: more than pieces"),
        (overlapping, "has chunks that overlap or leave a gap"),
        (changed(state_dict_metadata=[]), "it holds no table of tensors"),
        (changed(state_dict_metadata={5: None}), "a int is a NoneType, not a tensor"),
        (with_dtype(torch.int32), None),
        (changed(planner_data={"a": ("b",)}), "not written by fastmoco"),
        (changed(storage_data=None), "not written by fastmoco"),
        (changed(state_dict_metadata={}), "pieces that belong to no tensor"),
        (with_entry("w", 3), "'w' is a int, not a tensor"),
        (
            with_entry("w", BytesStorageMetadata()),
            "BytesStorageMetadata, which no checkpoint of tensors needs",
        ),
    ],
)
def test_metadata_that_says_something_else_than_tensors_is_refused(
    folder: Path, change: Callable[[Metadata], Metadata], match: str | None
) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())  # noqa: S301 - of its own run
    (folder / ".metadata").write_bytes(pickle.dumps(change(metadata)))
    vouch(folder)
    if match is not None:
        refused(folder, match)
        return
    # Only the bytes of the tensor, or the model, show that it is another one.
    loaded = load_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"bytes of float32 are no torch.int32 of \(40, 50\)"):
        _ = loaded.tensors
    with pytest.raises(CheckpointError, match=r"float32 is torch.int32 .* the model has torch.flo"):
        loaded.read_into({"float32": torch.zeros(40, 50)})


def test_a_metadata_that_asks_for_more_than_it_is_falls_back(folder: Path) -> None:
    for body, words in HOSTILE.values():
        (folder / ".metadata").write_bytes(b"\x80\x04" + body)
        vouch(folder)
        refused(folder, rf"\.metadata is refused: .*{re.escape(words)}")


def test_a_table_may_be_as_long_as_its_ranks_need(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hundreds of ranks write more than the usual limit; a forged table has no such parts."""
    files = json.loads((folder / "COMMITTED").read_text())["files"]
    size = files[".metadata"]["bytes"]
    assert size < dcp_metadata.most_bytes(files)
    for module in (dcp_metadata, pickle_machine):
        monkeypatch.setattr(module, "MOST_BYTES", size // 2)
    monkeypatch.setattr(pickle_machine, "MOST_OBJECTS", size // 16)
    assert_same(load_checkpoint(folder).tensors, content(2))
    few = {name: file | {"bytes": size} for name, file in files.items()}
    with pytest.raises(ValueError, match="a file of this kind at most"):
        read_metadata(folder / ".metadata", few)


def test_memory_that_runs_out_is_a_refusal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(dcp_metadata, "_metadata", fails)
    with pytest.raises(CheckpointError, match="metadata is refused: MemoryError"):
        load_checkpoint(folder)


def test_an_entry_that_is_no_tensor_is_never_unpickled(folder: Path, tmp_path: Path) -> None:
    """DCP writes such an entry itself, and its own loader runs it."""
    dcp_save(
        {"w": torch.ones(3), "extra": Calls(os.mkdir, str(tmp_path / "exploded"))},
        checkpoint_id=tmp_path / "dcp",
    )
    for name in (".metadata", "__0_0.distcp"):
        (folder / name).write_bytes((tmp_path / "dcp" / name).read_bytes())
    vouch(folder)
    refused(folder, r"\.metadata is refused")
    assert not (tmp_path / "exploded").exists()


def test_a_hostile_shard_runs_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes of a tensor replaced by a pickle of the same length: torch's own restricted reader
    refuses it."""
    shard = folder / "__0_0.distcp"
    buffer = io.BytesIO()
    torch.save(Calls(os.mkdir, str(tmp_path / "exploded")), buffer)
    data = shard.read_bytes()
    shard.write_bytes(buffer.getvalue() + data[len(buffer.getvalue()) :])
    vouch(folder)
    monkeypatch.setenv(
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1"
    )  # would open torch.load where nothing else is said
    loaded = load_checkpoint(folder)
    with pytest.raises(CheckpointError, match="cannot be read"):
        _ = loaded.tensors
    assert not (tmp_path / "exploded").exists()


def test_a_marker_that_names_files_elsewhere_is_refused(folder: Path) -> None:
    promised = json.loads((folder / "COMMITTED").read_text())
    files = promised["files"] | {"../../secret": {"bytes": 1, "sha256": "0"}}
    (folder / "COMMITTED").write_text(marker_text(2, files, world_size=1, saved_at=""))
    refused(folder, "marker is damaged")


def test_the_same_state_gives_the_same_bytes(
    folder: Path, tmp_path: Path, group: dist.ProcessGroup
) -> None:
    other = save(tmp_path / "other", 2, group=group)
    for name in (".metadata", "__0_0.distcp", "state.json"):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    assert str(tmp_path).encode() not in (folder / ".metadata").read_bytes()
    metadata = pickle.loads((folder / ".metadata").read_bytes())  # noqa: S301 - of its own run
    assert MetadataIndex("scalar", []) in metadata.storage_data
