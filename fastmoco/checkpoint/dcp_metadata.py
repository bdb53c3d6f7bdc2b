"""Read the `.metadata` of torch.distributed.checkpoint, which is a pickle, with
a restricted unpickler.

`torch.distributed.checkpoint.FileSystemReader` uses the plain unpickler, which executes any code
that the file names, and loads entries that are not tensors in the same way. Here a pickle may name
the classes below and no others. The result is then checked entry by entry: tensors only, in files
that the marker lists, and inside those files.
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
"""Bytes; the metadata of any real state is far smaller."""

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
    """Accepts the classes of DCP's metadata and torch's dtypes, and refuses any
    other name before it is imported.
    """

    def find_class(self, module: str, name: str) -> Any:
        allowed = _CLASSES.get((module, name))
        if (
            allowed is None
            and module == "torch"
            and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            allowed = getattr(torch, name)
        if allowed is None:
            raise UnpicklingError(f"it names {module}.{name}, which no checkpoint of tensors needs")
        return allowed


def read_metadata(path: Path, files: Mapping[str, Mapping[str, Any]]) -> Metadata:
    """Read and check the metadata of a folder whose files have all been verified.

    Args:
        path: the file `.metadata`.
        files: the marker's entry for each file that may be read, by name.

    Raises:
        ValueError: naming the content that a checkpoint of tensors does not have.
    """
    if path.stat().st_size > SIZE_LIMIT:
        raise ValueError(
            f"{path.name} has {path.stat().st_size} bytes, more than any checkpoint has"
        )
    try:
        with path.open("rb") as file:
            held = _RestrictedUnpickler(file).load()
        _require_tensors_alone(held, files)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a hostile or truncated pickle may raise anything
        raise ValueError(f"{path.name} is refused: {error}") from error
    assert isinstance(held, Metadata)
    return held


def _require_tensors_alone(held: object, files: Mapping[str, Mapping[str, Any]]) -> None:
    if type(held) is not Metadata or not isinstance(held.state_dict_metadata, dict):
        raise ValueError(f"it holds a {type(held).__name__} instead of DCP's metadata")
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
    # Every chunk was found among the pieces, so equal counts mean that every
    # piece belongs to a tensor.
    if len(held.storage_data) != chunks:
        raise ValueError("it stores pieces that belong to no tensor")
    for index, place in held.storage_data.items():
        _require_inside(index, place, files)


def _require_covered(
    name: str, entry: TensorStorageMetadata, stored: Mapping[MetadataIndex, object]
) -> None:
    """Require that the chunks are inside the tensor, have as many elements as
    it, and are all stored.
    """
    count = 0
    for chunk in entry.chunks:
        ranges = zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
        if not all(
            min(offset, size) >= 0 and offset + size <= whole for offset, size, whole in ranges
        ):
            raise ValueError(f"entry {name!r} has a chunk outside its shape")
        piece = stored.get(MetadataIndex(name, chunk.offsets))
        if getattr(piece, "length", -1) < math.prod(chunk.sizes) * entry.properties.dtype.itemsize:
            raise ValueError(
                f"entry {name!r} has a chunk that is not stored, or in fewer bytes than it has"
            )
        count += math.prod(chunk.sizes)
    if count != math.prod(entry.size):
        raise ValueError(
            f"entry {name!r} has chunks of {count} elements for a shape of {math.prod(entry.size)}"
        )


def _require_inside(
    index: MetadataIndex, place: Any, files: Mapping[str, Mapping[str, Any]]
) -> None:
    """Require that a piece is inside a file that the marker lists, and is
    read as a plain tensor.
    """
    if type(index) is not MetadataIndex or type(place) is not filesystem._StorageInfo:
        raise ValueError("it stores something unknown")
    if place.relative_path not in files or not place.relative_path.endswith(".distcp"):
        raise ValueError(
            f"entry {index.fqn!r} is stored in {place.relative_path!r}, which is no file of this checkpoint"
        )
    if not 0 <= place.offset <= place.offset + place.length <= files[place.relative_path]["bytes"]:
        raise ValueError(f"entry {index.fqn!r} is outside {place.relative_path}")
    if getattr(place, "transform_descriptors", None):
        raise ValueError(f"entry {index.fqn!r} asks for a transformation")
