"""Read the `.metadata` of torch.distributed.checkpoint, which is a pickle, as data.

`torch.distributed.checkpoint.FileSystemReader` uses the plain unpickler, which executes any code
that the file names, and loads entries that are not tensors in the same way. Here the pickle is read
by `pickle_machine`, which builds nothing. What it says is then checked entry by entry: tensors
only, whose parts cover each of them once, in files that the marker lists, and inside those files.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from fastmoco.checkpoint.pickle_machine import (
    MOST_BYTES,
    Calls,
    Name,
    Record,
    UnknownNameError,
    read_pickle,
)
from fastmoco.checkpoint.torch_file import DTYPES, MOST_DIMENSIONS
from fastmoco_pipelines.files.small import UnfitFileError, read_small

LARGEST = 512 << 20
"""Bytes of the largest table that is read: of a large model on some thousand ranks."""
_HERE = metadata.__name__
_PLACE = f"{filesystem.__name__}._StorageInfo"


def _shape(numbers: object = ()) -> torch.Size:
    """A `torch.Size` of whole numbers, which may be negative."""
    if not isinstance(numbers, tuple) or len(numbers) > MOST_DIMENSIONS:
        raise ValueError("a shape is no short tuple")
    if not all(type(number) is int and abs(number) < 2**62 for number in numbers):
        raise ValueError("a shape has other values than sizes")
    return torch.Size(numbers)


_CALLS: Calls = {
    "torch.Size": _shape,
    "torch.serialization._get_layout": None,
    _PLACE: None,
    **dict.fromkeys(DTYPES),
    **{
        f"{_HERE}.{name}": None
        for name in (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    },
}


def most_bytes(files: Mapping[str, Mapping[str, Any]]) -> int:
    """The longest table of a checkpoint with these files.

    It has about 200 bytes for each part of a tensor, and each tensor has as many parts as ranks. A
    part takes more than a kilobyte of its own file, so that a forged table cannot be longer than its
    checkpoint is large.
    """
    parts: int = sum(file["bytes"] for name, file in files.items() if name.endswith(".distcp"))
    return max(MOST_BYTES, min(parts // 4, LARGEST))


def read_metadata(path: Path, files: Mapping[str, Mapping[str, Any]]) -> Metadata:
    """Read and check the metadata of a folder whose files have all been verified.

    Args:
        path: the file `.metadata`.
        files: the marker's entry for each file that may be read, by name.

    Raises:
        ValueError: naming the content that a checkpoint of tensors does not have.
        OSError: if the file cannot be read.
    """
    try:
        most = most_bytes(files)
        found, _ = read_pickle(read_small(path, most, follow=False), _CALLS, most=most)
        return _metadata(found, files)
    except UnfitFileError:
        raise
    except UnknownNameError as error:
        raise ValueError(
            f"{path.name} is refused: {error}, which no checkpoint of tensors needs"
        ) from None
    except (ValueError, TypeError, MemoryError, RecursionError, OverflowError) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path.name} is refused: {reason}") from error


def _metadata(found: object, files: Mapping[str, Mapping[str, Any]]) -> Metadata:
    """The metadata that a pickle describes, if it is of tensors alone."""
    if not isinstance(found, Record) or found.name != f"{_HERE}.Metadata":
        raise ValueError(f"it holds a {_kind(found)} instead of DCP's metadata")
    state = found.state if isinstance(found.state, dict) else {}
    entries, stored = state.get("state_dict_metadata"), state.get("storage_data")
    if not isinstance(entries, dict):
        raise ValueError("it holds no table of tensors")
    if state.get("planner_data") is not None or not isinstance(stored, dict):
        raise ValueError("it was not written by fastmoco")
    for name, entry in entries.items():
        if type(name) is not str or not _is(entry, "TensorStorageMetadata"):
            raise ValueError(f"entry {_quoted(name)} is a {_kind(entry)}, not a tensor")

    # The pieces on the disk, by texts: equal hashes of numbers are easily made.
    pieces: dict[str, tuple[MetadataIndex, filesystem._StorageInfo]] = {}
    for key, value in stored.items():
        index, place = _index(key), _place(value)
        _require_inside(index, place, files)
        pieces[_piece_name(index.fqn, index.offset)] = index, place
    if len(pieces) != len(stored):
        raise ValueError("it stores a piece twice")
    _require_apart([place for _, place in pieces.values()])

    # Every chunk is found among the pieces, so equal counts mean that every piece belongs to a
    # tensor. They are compared first: many entries may share one list of chunks.
    chunks = [_fields(entry, "size", "chunks", "properties")[1] for entry in entries.values()]
    if not all(isinstance(of_one, list) for of_one in chunks):
        raise ValueError("the chunks of a tensor are no list")
    if sum(map(len, chunks)) > len(pieces):
        raise ValueError("it has chunks that are not stored: more than pieces")
    tensors = {name: _tensor(name, entry, pieces) for name, entry in entries.items()}
    if sum(map(len, chunks)) < len(pieces):
        raise ValueError("it stores pieces that belong to no tensor")
    return Metadata(
        state_dict_metadata=dict(tensors),
        storage_data=dict(pieces.values()),
    )


def _tensor(
    name: str,
    entry: Record,
    pieces: Mapping[str, tuple[MetadataIndex, filesystem._StorageInfo]],
) -> TensorStorageMetadata:
    """A tensor whose chunks are inside it, cover it once, and are all stored."""
    size, chunks, properties = _fields(entry, "size", "chunks", "properties")
    dtype = _dtype(name, properties)
    _require_shape(name, size)
    if min(size, default=0) < 0:
        raise ValueError(f"entry {_quoted(name)} has a negative size")
    count, built = 0, []
    for chunk in chunks:
        if not _is(chunk, "ChunkStorageMetadata"):
            raise ValueError(f"entry {_quoted(name)} has a {_kind(chunk)} for a chunk")
        offsets, sizes = _fields(chunk, "offsets", "sizes")
        _require_shape(name, offsets, len(size))
        _require_shape(name, sizes, len(size))
        ranges = zip(offsets, sizes, size, strict=True)
        if not all(min(offset, of) >= 0 and offset + of <= whole for offset, of, whole in ranges):
            raise ValueError(f"entry {_quoted(name)} has a chunk outside its shape")
        _, place = pieces.get(_piece_name(name, offsets), (None, None))
        if place is None or place.length < math.prod(sizes) * dtype.itemsize:
            raise ValueError(
                f"entry {_quoted(name)} has a chunk that is not stored, or in fewer bytes than it "
                "has"
            )
        count += math.prod(sizes)
        built.append(ChunkStorageMetadata(offsets, sizes))
    if count != math.prod(size):
        raise ValueError(
            f"entry {_quoted(name)} has chunks of {count} elements for a shape of {math.prod(size)}"
        )
    _require_grid(name, size, built)
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, built)


def _require_grid(name: str, size: torch.Size, chunks: Sequence[ChunkStorageMetadata]) -> None:
    """Require that chunks are the cells of a grid, each once, as parts of a sharded tensor are."""
    cells = 1
    for dimension, whole in enumerate(size):
        cuts = sorted({(c.offsets[dimension], c.sizes[dimension]) for c in chunks})
        ends = [0, *(offset + of for offset, of in cuts)]
        if ends[:-1] != [offset for offset, _ in cuts] or ends[-1] != whole:
            raise ValueError(f"entry {_quoted(name)} has chunks that overlap or leave a gap")
        cells *= len(cuts)
    if not chunks or cells != len(chunks) or len({str(c.offsets) for c in chunks}) != len(chunks):
        raise ValueError(f"entry {_quoted(name)} has chunks that overlap or leave a gap")


def _require_inside(
    index: MetadataIndex, place: filesystem._StorageInfo, files: Mapping[str, Mapping[str, Any]]
) -> None:
    """Require that a piece is inside a file that the marker lists."""
    name, path = _quoted(index.fqn), place.relative_path
    if path not in files or not path.endswith(".distcp"):
        raise ValueError(
            f"entry {name} is stored in {_quoted(path)}, which is no file of this checkpoint"
        )
    if not 0 <= place.offset <= place.offset + place.length <= files[path]["bytes"]:
        raise ValueError(f"entry {name} is outside {path}")


def _require_apart(places: Sequence[filesystem._StorageInfo]) -> None:
    """Require that no two pieces have a byte in common."""
    ordered = sorted((p.relative_path, p.offset, p.offset + p.length) for p in places)
    for (path, _, end), (following, begin, _) in itertools.pairwise(ordered):
        if path == following and begin < end:
            raise ValueError(f"two pieces overlap at byte {begin} of {path}")


def _index(key: object) -> MetadataIndex:
    if not _is(key, "MetadataIndex"):
        raise ValueError("it stores something unknown")
    fqn, offset, hint = _fields(key, "fqn", "offset", "index")
    if type(fqn) is not str or not (offset is None or isinstance(offset, torch.Size)):
        raise ValueError("it stores a piece without a name")
    return MetadataIndex(fqn, offset, hint if type(hint) is int else None)


def _place(value: object) -> filesystem._StorageInfo:
    if not isinstance(value, Record) or value.name != _PLACE:
        raise ValueError("it stores something unknown")
    path, offset, length, changes = _fields(
        value, "relative_path", "offset", "length", "transform_descriptors"
    )
    if changes:
        raise ValueError("a piece asks for a transformation")
    if type(path) is not str or type(offset) is not int or type(length) is not int:
        raise ValueError("a piece has no place")
    return filesystem._StorageInfo(path, offset, length)


def _dtype(name: str, properties: object) -> torch.dtype:
    if _is(properties, "TensorProperties") and isinstance(properties, Record):
        state = properties.state
        found = state[0] if isinstance(state, tuple) and state else None
        layout = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if isinstance(layout, Record) and layout.arguments != ("torch.strided",):
            raise ValueError(f"entry {_quoted(name)} is not dense")
        if isinstance(found, Name) and found.full in DTYPES:
            return DTYPES[found.full]
    raise ValueError(f"entry {_quoted(name)} has no dtype")


def _require_shape(name: str, shape: object, dimensions: int | None = None) -> None:
    if not isinstance(shape, torch.Size) or dimensions not in (None, len(shape)):
        raise ValueError(f"entry {_quoted(name)} has no shape of its dimensions")


def _fields(record: object, *names: str) -> list[Any]:
    """Fields of a record; None for those that it lacks."""
    state = record.state if isinstance(record, Record) else None
    return [state.get(name) if isinstance(state, dict) else None for name in names]


def _is(found: object, name: str) -> bool:
    return isinstance(found, Record) and found.name == f"{_HERE}.{name}"


def _kind(found: object) -> str:
    return found.name if isinstance(found, Record) else type(found).__name__


def _quoted(text: object) -> str:
    """A text for a message, not longer than a name."""
    return repr(text[:200]) if isinstance(text, str) else f"of a {_kind(text)}"


def _piece_name(fqn: str, offset: Sequence[int] | None) -> str:
    return f"{','.join(map(str, offset or ()))} {fqn}"
