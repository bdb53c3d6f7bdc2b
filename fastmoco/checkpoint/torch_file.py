"""Read what `torch.save` wrote, both the zip archive and the older form, without torch's unpickler.

torch's restricted reader executes nothing, and takes what a file asks for: it hashes tuples as keys,
inflates compressed members and believes the sizes in their headers. Here the archive must be one
that torch writes: members that are stored, not compressed, one behind the other, inside the file;
its pickle is read by `pickle_machine`; and a tensor must be inside its storage.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmoco.checkpoint.pickle_machine import (
    MOST_BYTES,
    Calls,
    Content,
    Name,
    PickleError,
    Record,
    read_pickle,
)
from fastmoco_pipelines.files.small import open_regular, require_solid

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
"""As a pickle, at the beginning of the older form."""
PROTOCOL = 1001
MOST_DIMENSIONS = 64
MOST_DIRECTORY_BYTES = 64 << 20
"""Longest list of the members of an archive; a tensor has about a hundred."""
REBUILT = "torch._utils._rebuild_"
"""What the names of tensors that are not plain begin with: sparse, quantised, without data."""

DTYPES = {
    f"torch.{name}": dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)
}
"""By their full names."""
_STORAGES: dict[str, torch.dtype] = {
    f"torch.{kind}Storage": dtype
    for kind, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "ComplexDouble": torch.complex128,
        "ComplexFloat": torch.complex64,
        "QInt8": torch.int8,
        "QInt32": torch.int32,
        "QUInt8": torch.uint8,
    }.items()
} | {"torch.storage.UntypedStorage": torch.uint8, "torch.UntypedStorage": torch.uint8}


@dataclass(slots=True, eq=False)
class Storage:
    """Bytes of a file, of one dtype; in the older form they are found after the tensors."""

    dtype: torch.dtype
    items: int
    data: Tensor | None = None
    views: list[tuple[Tensor, int, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    """Tensors that get the bytes once they are found."""

    def fill(self, data: Tensor) -> None:
        """Take the bytes, and give them to the tensors."""
        self.data = data
        for tensor, offset, size, stride in self.views:
            tensor.set_(data.untyped_storage(), offset, size, stride)


def read_torch(path: Path) -> Any:
    """What a file of `torch.save` contains. Tensors share the memory-mapped file.

    Args:
        path: a regular file.

    Returns:
        Containers, texts, numbers and tensors; a `Record` for an object that is none of them, as a
        sparse tensor (`REBUILT`).

    Raises:
        UnknownNameError: if it contains something else than data.
        ValueError: naming what is damaged or forged.
        OSError: if it cannot be read.
    """
    with open(open_regular(path), "rb") as file:
        require_solid(file.fileno(), path)
        return torch_content(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


def torch_content(content: Content) -> Any:
    """As `read_torch`, of bytes in memory that may be written."""
    archive = content[:4] == b"PK\3\4"
    return (_read_archive if archive else _read_old)(content)


def _read_archive(content: Content) -> Any:
    members = _members(content)
    tables = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(tables) != 1:
        raise ValueError("it is no archive of torch: it has no data.pkl")
    folder = tables[0].removesuffix("data.pkl")
    first, last = members.get(f"{folder}byteorder", (0, 0))
    if content[first:last] not in (b"", b"little"):
        raise ValueError("its numbers are not little-endian")
    storages: dict[str, Storage] = {}

    def persistent(identity: Any) -> Storage:
        dtype, key, items, _ = _storage_id(identity, 5)
        at, stop = members.get(f"{folder}data/{key}", (0, -1))
        if stop - at != items * dtype.itemsize:
            raise PickleError(f"storage {key[:40]!r} has not the bytes of its numbers")
        if key not in storages:
            storages[key] = Storage(dtype, items, _bytes(content, at, stop))
        if storages[key].dtype != dtype:
            raise PickleError(f"storage {key[:40]!r} has two dtypes")
        return storages[key]

    at, stop = members[tables[0]]
    if stop - at > MOST_BYTES:
        raise ValueError(f"its table of tensors has {stop - at} bytes")
    return read_pickle(content, _CALLS, at=at, end=stop, persistent=persistent)[0]


def _members(content: Content) -> dict[str, tuple[int, int]]:
    """Where the bytes of each member of an archive begin and end.

    Raises:
        ValueError: if they are compressed, overlap or are outside, or two have one name.
    """
    at, directory_end = _directory(content)
    first_free, directory = 0, at
    found: dict[str, tuple[int, int]] = {}
    listed = []
    while at < directory_end:
        entry = content[at : at + 46]
        if entry[:4] != b"PK\1\2" or len(entry) < 46:
            raise ValueError("the list of its members is damaged")
        flags, method = struct.unpack("<HH", entry[8:12])
        packed, size, name, extra, comment = struct.unpack("<IIHHH", entry[20:34])
        (start,) = struct.unpack("<I", entry[42:46])
        texts = content[at + 46 : at + 46 + name + extra]
        size, packed, start = _long_sizes(bytes(texts[name:]), size, packed, start)
        if flags & 1 or method or packed != size:
            raise ValueError("a member is compressed or encrypted, which torch does not do")
        listed.append((start, size, bytes(texts[:name]).decode("utf-8", "replace")))
        at += 46 + name + extra + comment
    for start, size, key in sorted(listed):
        header = content[start : start + 30] if first_free <= start <= directory - 30 else b""
        if header[:4] != b"PK\3\4":
            raise ValueError("its members overlap or are outside of it")
        name, extra = struct.unpack("<HH", header[26:30])
        first = start + 30 + name + extra
        first_free = first + size
        if first_free > directory or key in found:
            raise ValueError("its members overlap, are outside of it, or two have one name")
        found[key] = first, first_free
    return found


def _long_sizes(extra: bytes, *values: int) -> list[int]:
    """Size, packed size and place of a member; those beyond 4 GB are in a field of their own."""
    longer: list[int] = []
    while len(extra) >= 4:
        kind, size = struct.unpack("<HH", extra[:4])
        if kind == 1:
            longer = list(struct.unpack(f"<{size // 8}Q", extra[4 : 4 + size // 8 * 8]))
        extra = extra[4 + size :]
    return [longer.pop(0) if value == 0xFFFFFFFF and longer else value for value in values]


def _directory(content: Content) -> tuple[int, int]:
    """Where the list of members begins and ends; it ends with the file, as torch writes it."""
    end = len(content)
    last = content[max(0, end - 98) : end]
    tail = last[-22:]
    if tail[:4] != b"PK\5\6" or tail[20:] != b"\0\0":
        raise ValueError("it is cut off: it does not end with a list of its members")
    size, offset = struct.unpack("<II", tail[12:20])
    after = 22
    if last[-42:-38] == b"PK\6\7":
        if last[:4] != b"PK\6\6":
            raise ValueError("the end of its list of members is damaged")
        size, offset = struct.unpack("<QQ", last[40:56])
        after = 98
    directory = end - after - size
    if size > MOST_DIRECTORY_BYTES or directory != offset:
        raise ValueError("its list of members is not where it says")
    return directory, end - after


def _read_old(content: Content) -> Any:
    """The form before torch 1.6: pickles, and then the bytes of each storage."""
    at, end, head = 0, len(content), []
    for _ in range(3):  # magic number, protocol, sizes of numbers
        value, at = read_pickle(content, {}, at=at, end=end)
        head.append(value)
    little = isinstance(head[2], dict) and head[2].get("little_endian") is not False
    if head[:2] != [MAGIC_NUMBER, PROTOCOL] or not little:
        raise ValueError("it is no file of torch")
    storages: dict[str, Storage] = {}

    def persistent(identity: Any) -> Storage:
        dtype, key, items, view = _storage_id(identity, 6)
        if view is not None:
            raise PickleError("a storage is a view of another one: save it again by a newer torch")
        if items * dtype.itemsize > end:
            raise PickleError(f"storage {key[:40]!r} is longer than the file")
        found = storages.setdefault(key, Storage(dtype, items))
        if (found.dtype, found.items) != (dtype, items):
            raise PickleError(f"storage {key[:40]!r} has two sizes")
        return found

    result, at = read_pickle(content, _CALLS, at=at, end=end, persistent=persistent)
    keys, at = read_pickle(content, {}, at=at, end=end)
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
        raise ValueError("its storages are not those of its tensors")
    for key in keys:
        storage = storages[key]
        items = int.from_bytes(content[at : at + 8], "little")
        stop = at + 8 + storage.items * storage.dtype.itemsize
        if items != storage.items or stop > end:
            raise ValueError(f"storage {key[:40]!r} is cut off, or has another length")
        storage.fill(_bytes(content, at + 8, stop))
        at = stop
    return result


def _storage_id(identity: Any, length: int) -> tuple[torch.dtype, str, int, Any]:
    """Dtype, key, number of items, and view of a persistent id."""
    if not isinstance(identity, tuple) or len(identity) != length or identity[0] != "storage":
        raise PickleError("it refers to something that is no storage")
    kind, key, items = identity[1], identity[2], identity[4]
    dtype = _STORAGES.get(kind.full) if isinstance(kind, Name) else None
    if dtype is None or type(key) is not str or type(items) is not int or items < 0:
        raise PickleError("a storage has no dtype, name or size")
    return dtype, key, items, identity[5] if length > 5 else None


def _bytes(content: Content, at: int, stop: int) -> Tensor:
    """Bytes of a file as a tensor; a copy if they do not begin where numbers may."""
    if at == stop:
        return torch.empty(0, dtype=torch.uint8)
    found = torch.frombuffer(content, dtype=torch.uint8, count=stop - at, offset=at)
    return found if found.data_ptr() % 16 == 0 else found.clone()


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype | None = None
) -> Tensor:
    """A tensor inside its storage."""
    if not isinstance(storage, Storage):
        raise PickleError("a tensor has no storage")
    dtype = dtype or storage.dtype
    numbers = [offset, *_numbers(size), *_numbers(stride)]
    if len(size) != len(stride) or len(size) > MOST_DIMENSIONS:
        raise PickleError("a tensor has no shape")
    if not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
        raise PickleError("a tensor has no shape")
    items = storage.items * storage.dtype.itemsize // dtype.itemsize
    reach = sum((of - 1) * step for of, step in zip(size, stride, strict=True))
    if math.prod(size) and offset + reach >= items:
        raise PickleError("a tensor reaches beyond its storage")
    tensor = torch.empty(0, dtype=dtype)
    view = (tensor, offset if math.prod(size) else 0, tuple(size), tuple(stride))
    storage.views.append(view)
    if storage.data is not None:
        tensor.set_(storage.data.untyped_storage(), *view[1:])
    return tensor


def _numbers(shape: Any) -> Sequence[Any]:
    if not isinstance(shape, tuple | list):
        raise PickleError("a tensor has no shape")
    return shape


def _plain(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    return _tensor(storage, offset, size, stride)


def _of_dtype(
    storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> Tensor:
    """A tensor in bytes without a dtype of their own."""
    found = DTYPES.get(dtype.full) if isinstance(dtype, Name) else None
    if found is None:
        raise PickleError("a tensor has no dtype")
    return _tensor(storage, offset, size, stride, found)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _with_attributes(function: Any, _kind: Any, arguments: Any, _state: Any) -> Any:
    """A tensor with attributes, which are left out."""
    made = _CALLS.get(function.full) if isinstance(function, Name) else None
    if made in (None, _with_attributes) or not isinstance(arguments, tuple):
        raise PickleError("a tensor has attributes of an unknown kind")
    assert made is not None  # noqa: S101 - a type: refused above
    return made(*arguments)


def _dictionary(pairs: Any = ()) -> dict[Any, Any]:
    """An OrderedDict; Python 2 wrote its items as a list of pairs."""
    if isinstance(pairs, dict):
        return pairs
    items = [(pair[0], pair[1]) for pair in pairs if isinstance(pair, list | tuple)]
    if not all(isinstance(key, str) for key, _ in items):
        raise PickleError("a key is no text")
    return dict(items)


def _encoded(text: Any, *_: Any) -> bytes:
    """Bytes, as Python 3 writes them for Python 2."""
    return str.encode(text, "latin-1") if isinstance(text, str) else b""


_CALLS: Calls = {
    "torch._utils._rebuild_tensor": _plain,
    "torch._utils._rebuild_tensor_v2": _plain,
    "torch._utils._rebuild_tensor_v3": _of_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.nn.parameter.Parameter": _parameter,
    "torch._tensor._rebuild_from_type_v2": _with_attributes,
    "collections.OrderedDict": _dictionary,
    "collections.Counter": _dictionary,
    "yacs.config.CfgNode": _dictionary,  # options of a run of MoBY, beside its weights
    "_codecs.encode": _encoded,
    **dict.fromkeys(DTYPES),
    **dict.fromkeys(_STORAGES),
    # What has no use here stays a record.
    **dict.fromkeys(
        (
            f"{REBUILT}sparse_tensor",
            f"{REBUILT}qtensor",
            f"{REBUILT}meta_tensor_no_storage",
            f"{REBUILT}sparse_csr_tensor",
            f"{REBUILT}nested_tensor",
            "torch.serialization._get_layout",
            "torch.Size",
            "torch.Tensor",
            "torch.device",
            "torch.per_tensor_affine",
            "torch.per_tensor_symmetric",
            "torch.per_channel_affine",
            "torch.per_channel_symmetric",
            "builtins.set",
            "builtins.bytearray",
            "builtins.complex",
            "__builtin__.set",
            "argparse.Namespace",
        )
    ),
}


def is_tensor_of_another_kind(value: object) -> bool:
    """Whether a value of `read_torch` is a sparse or quantised tensor, or one without data."""
    return isinstance(value, Record) and value.name.startswith(REBUILT)


def distinct_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all storages of tensors, each counted once."""
    return sum(
        {
            storage.data_ptr(): storage.nbytes()
            for storage in (tensor.untyped_storage() for tensor in tensors.values())
        }.values()
    )
