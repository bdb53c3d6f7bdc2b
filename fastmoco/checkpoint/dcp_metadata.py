"""The `.metadata` of torch.distributed.checkpoint is a pickle: read here by an unpickler that can build nothing else.

`torch.distributed.checkpoint.FileSystemReader` calls the plain unpickler, which runs whatever the file says, and loads
entries that are not tensors likewise. Here a pickle may name the classes below and no others, and what it builds is then
checked entry by entry: tensors only, in files that the marker vouches for, inside those files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from pickle import Unpickler, UnpicklingError
from typing import Any

import torch
import torch.serialization
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

SIZE_LIMIT = 2**30
"""Bytes: far beyond any state that fits a cluster."""

_CLASSES: dict[tuple[str, str], Any] = {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
} | {
    (metadata.__name__, name): getattr(metadata, name)
    for name in (
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )
}


class _RestrictedUnpickler(Unpickler):
    """Knows the classes of DCP's metadata and torch's dtypes; any other name is refused before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = _CLASSES.get((module, name))
        if allowed is None and module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            allowed = getattr(torch, name)
        if allowed is None:
            raise UnpicklingError(f"it names {module}.{name}, which no checkpoint of tensors needs")
        return allowed


def read_metadata(path: Path, files: Mapping[str, Mapping[str, Any]]) -> Metadata:
    """Read and check the metadata of a folder whose every file has been verified.

    Args:
        path: the file `.metadata`.
        files: size by name, of all files that may be read, as the marker has them.

    Raises:
        ValueError: saying what it holds that a checkpoint of tensors does not.
    """
    if path.stat().st_size > SIZE_LIMIT:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, more than any checkpoint's")
    try:
        with path.open("rb") as file:
            held = _RestrictedUnpickler(file).load()
        _require_tensors_alone(held, files)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a hostile or cut pickle may raise anything: it is refused whatever it raises
        raise ValueError(f"{path.name} is refused: {error}") from error
    assert isinstance(held, Metadata)
    return held


def _require_tensors_alone(held: object, files: Mapping[str, Mapping[str, Any]]) -> None:
    if type(held) is not Metadata or not isinstance(held.state_dict_metadata, dict):
        raise ValueError(f"it holds a {type(held).__name__} where DCP's metadata is due")
    if held.planner_data is not None or not isinstance(held.storage_data, dict):
        raise ValueError("it was not written by fastmoco")
    chunks = 0
    for name, entry in held.state_dict_metadata.items():
        if type(name) is not str or not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"entry {name!r} is a {type(entry).__name__}, not a tensor")
        if not isinstance(entry.properties.dtype, torch.dtype):
            raise ValueError(f"entry {name!r} has no dtype")
        _require_covered(name, entry, held.storage_data)
        chunks += len(entry.chunks)
    # As many chunks as stored pieces, each found above: so every piece belongs to a tensor.
    if len(held.storage_data) != chunks:
        raise ValueError("it stores pieces that belong to no tensor")
    for index, place in held.storage_data.items():
        _require_inside(index, place, files)


def _require_covered(name: str, entry: TensorStorageMetadata, stored: Mapping[MetadataIndex, object]) -> None:
    """The chunks lie inside the tensor, hold as many numbers as it has, and each is stored somewhere."""
    count = 0
    for chunk in entry.chunks:
        ranges = zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
        if not all(min(offset, size) >= 0 and offset + size <= whole for offset, size, whole in ranges):
            raise ValueError(f"entry {name!r} has a chunk outside its shape")
        piece = stored.get(MetadataIndex(name, chunk.offsets))
        if getattr(piece, "length", -1) < math.prod(chunk.sizes) * entry.properties.dtype.itemsize:
            raise ValueError(f"entry {name!r} has a chunk that is not stored, or in fewer bytes than it has")
        count += math.prod(chunk.sizes)
    if count != math.prod(entry.size):
        raise ValueError(f"entry {name!r} has chunks of {count} numbers for a shape of {math.prod(entry.size)}")


def _require_inside(index: MetadataIndex, place: Any, files: Mapping[str, Mapping[str, Any]]) -> None:
    """A piece lies inside a file that the marker vouches for, and nothing but a tensor is made of it."""
    if type(index) is not MetadataIndex or type(place) is not filesystem._StorageInfo:
        raise ValueError("it stores something unknown")
    if place.relative_path not in files or not place.relative_path.endswith(".distcp"):
        raise ValueError(f"entry {index.fqn!r} lies in {place.relative_path!r}, which is no file of this checkpoint")
    if not 0 <= place.offset <= place.offset + place.length <= files[place.relative_path]["bytes"]:
        raise ValueError(f"entry {index.fqn!r} lies outside {place.relative_path}")
    if getattr(place, "transform_descriptors", None):
        raise ValueError(f"entry {index.fqn!r} asks for a transformation")
