"""Read a safetensors file after its header has been checked: bounded, without duplicates, and with
tensors that lie one behind the other and fill the file.

safetensors itself takes the last of two entries of one name, and headers of 100 MB.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastmoco.checkpoint.torch_file import MOST_DIMENSIONS
from fastmoco_pipelines.files.small import (
    UnfitFileError,
    json_of,
    open_regular,
    reason_of,
    require_solid,
)
from fastmoco_pipelines.files.whole import read_at, utf8_name
from fastmoco_pipelines.text import escaped

MOST_HEADER_BYTES = 32 << 20
"""A tensor has about a hundred."""
MOST_TENSORS = 1 << 16
"""The state of a model of a thousand layers has a quarter of it."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By their names in the format."""


@dataclass(frozen=True, slots=True)
class Header:
    """What the header of a file says.

    Attributes:
        notes: its metadata.
        entries: shape and dtype of every tensor by name, as tensors on the meta device.
    """

    notes: dict[str, str]
    entries: dict[str, Tensor]


def read_header(path: Path | str, *, follow: bool = True) -> Header:
    """Read and check the header of a file.

    Args:
        path: its name.
        follow: whether the file may be a symbolic link.

    Raises:
        ValueError: naming what is damaged or forged.
        OSError: if the file cannot be read.
    """
    descriptor = open_regular(path, follow=follow)
    try:
        require_solid(descriptor, path)
        size = os.fstat(descriptor).st_size
        length = int.from_bytes(read_at(descriptor, 8, 0), "little")
        if size < 8 or length > min(size - 8, MOST_HEADER_BYTES):
            raise ValueError(
                f"it has {size} bytes and a header of {length}: it is cut off, or no safetensors "
                f"(a header has at most {MOST_HEADER_BYTES})"
            )
        text = read_at(descriptor, length, 8)
    finally:
        os.close(descriptor)
    try:
        content = json_of(text, "header", strict=True)
    except UnfitFileError as error:
        raise ValueError(f"its header: {reason_of(error, 'header')}") from error
    if not isinstance(content, dict) or not text.startswith(b"{"):
        raise ValueError("its header is no object of JSON")
    if len(content) > MOST_TENSORS:
        raise ValueError(f"it lists {len(content)} tensors, of which {MOST_TENSORS} are read")
    notes = content.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(text, str) for text in notes.values()):
        raise ValueError("the metadata in its header are not texts by name")
    for text_in in (*content, *notes, *notes.values()):
        if not _is_utf8(text_in):
            raise ValueError(f"{_short(text_in)} in its header is no text")

    # Each tensor begins where the one before it ends, and the last one ends the file.
    found = {name: _entry(name, entry) for name, entry in content.items()}
    end = 0
    for name, (begin, stop, _) in sorted(found.items(), key=lambda item: item[1][:2]):
        if begin != end:
            raise ValueError(f"{_short(name)} overlaps another tensor, or leaves a gap before it")
        end = stop
    if 8 + length + end != size:
        raise ValueError(f"its tensors end at byte {8 + length + end}, the file at {size}")
    return Header(notes, {name: entry for name, (_, _, entry) in found.items()})


def _entry(name: str, entry: Any) -> tuple[int, int, Tensor]:
    """Begin, end and form of a tensor."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{_short(name)} has not the entries dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    known = DTYPES.get(dtype) if isinstance(dtype, str) else None
    if known is None:
        raise ValueError(f"{_short(name)} has the dtype {_short(dtype)}, which is unknown here")
    if not _are_sizes(shape) or len(shape) > MOST_DIMENSIONS:
        raise ValueError(f"{_short(name)} has no shape")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{_short(name)} has no data_offsets")
    begin, end = offsets
    if end - begin != math.prod(shape) * known.itemsize:
        raise ValueError(
            f"{_short(name)} of shape {shape} and {dtype} has {end - begin} bytes in the file"
        )
    try:
        return begin, end, torch.empty(shape, dtype=known, device="meta")
    except (RuntimeError, OverflowError) as error:  # a side of 2^62 beside one of 0
        raise ValueError(f"{_short(name)} has no possible shape") from error


def _are_sizes(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(
        type(number) is int and 0 <= number < 2**62 for number in numbers
    )


def _is_utf8(text: str) -> bool:
    """Whether a text of JSON is one: `"\\ud800"` is half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(name: Any) -> str:
    return escaped(str(name)[:200]) if isinstance(name, str | int | float) else type(name).__name__


@contextmanager
def opened(path: Path | str) -> Iterator[Any]:
    """A file whose header was checked, as safetensors opens it.

    Raises:
        ValueError: if safetensors refuses it.
        OSError: if it cannot be read.
    """
    try:
        with utf8_name(Path(path)) as name, safe_open(name, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def read_safetensors(path: Path | str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and all tensors of a file.

    Raises:
        ValueError: naming what is damaged or forged.
        OSError: if it cannot be read.
    """
    header = read_header(path)
    with opened(path) as file:
        return header.notes, {name: file.get_tensor(name) for name in header.entries}
