"""One kernel launch over many tensors: a table of their addresses that stays on the device.

An op over P tensors of a model would take P launches, or a few dozen with the addresses as kernel
arguments. Here the addresses are in device memory once, and each of `chunks` programs finds its
piece of work by its number::

    # Built by the first call, found again by later ones.
    table = pointer_table("lars_step_", [params, grads, momentum_buffers])
    kernel[(table.chunks,)](
        table.pointers, table.sizes, table.chunk_rows, table.chunk_starts, table.rows,
        CHUNK=table.chunk,
    )

    row = tl.load(chunk_rows_ptr + tl.program_id(0))  # which tensor: int32
    start = tl.load(chunk_starts_ptr + tl.program_id(0))  # its first element here: int64
    size = tl.load(sizes_ptr + row)  # elements of that tensor: int64
    # Column 1; 0 for None.
    grad_ptr = tl.load(pointers_ptr + 1 * rows + row).to(tl.pointer_type(tl.float32))

Words: a *column* is one list of tensors (all parameters), a *row* is one index (a parameter, its
gradient, ...). The tensors of one row have equal sizes; column 0 has no None. Rows without elements
have no chunk, and `chunks` may be 0: launch nothing then. `first_chunks` [rows + 1] contains the
first chunk of each row, for sums per tensor in a fixed order. Tensors are addressed as flat memory:
pass only those that `same_layout` accepts, and DTensors as `local(tensors)`. Pointers need no
alignment; a kernel that uses 128-bit loads checks the addresses and takes a plain path for the
others.
"""

from __future__ import annotations

import itertools
from array import array
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from fastmoco_kernels.tensors import Column

CHUNK = 2048
"""Elements a program, by default; a power of two."""
_CACHED_TABLES = 64


class PointerTable:
    """Addresses, sizes and the chunk map of a set of tensors, on their device.

    Args:
        columns: lists of equal length; the tensors of one row have equal sizes and one device;
            None, in any column but the first, is address 0.
        per_row: further columns, appended after `columns`, whose sizes are free (step counters, for
            example).
        chunk: elements a program.

    Raises:
        ValueError: for no rows, columns of unequal length, tensors of unequal size or device in a
            row.

    Attributes:
        rows: number of rows.
        chunks: number of programs to launch; 0 if every tensor is empty.
        chunk: elements a program.
        device: of every tensor.
        pointers: [columns + per_row, rows] int64, contiguous.
        sizes: [rows] int64, elements.
        chunk_rows: [chunks] int32.
        chunk_starts: [chunks] int64, elements.
        first_chunks: [rows + 1] int32: chunks first_chunks[r] to first_chunks[r + 1] belong to row
            r, in order.
    """

    def __init__(
        self, columns: Sequence[Column], per_row: Sequence[Column] = (), *, chunk: int = CHUNK
    ) -> None:
        first = _checked(columns, per_row)
        self.rows = len(first)
        self.chunk = chunk
        self.device = first[0].device

        # Which piece of which tensor each program takes.
        sizes = torch.tensor([tensor.numel() for tensor in first], dtype=torch.int64)
        counts = (sizes + chunk - 1) // chunk
        ends = counts.cumsum(0)
        self.chunks = int(ends[-1])
        rows = torch.arange(self.rows).repeat_interleave(counts)
        starts = (torch.arange(self.chunks) - (ends - counts)[rows]) * chunk
        self.sizes = sizes.to(self.device)
        self.chunk_rows = rows.to(torch.int32).to(self.device)
        self.chunk_starts = starts.to(self.device)
        self.first_chunks = (
            torch.cat([torch.zeros(1, dtype=torch.int64), ends]).to(torch.int32).to(self.device)
        )

        # The addresses, and a pinned copy for a first capture.
        self._host = [_addresses(column) for column in (*columns, *per_row)]
        host = _as_tensor(self._host)
        self.pointers = host.to(self.device)
        self._kept: list[Tensor] = []
        # Whether the last copy was captured: it has not run, and until a replay its block is empty.
        self._by_replay = False
        self._spare = host.pin_memory() if self.device.type == "cuda" else None
        self._stream = (
            torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        )

    def refresh(self, columns: Sequence[Column], per_row: Sequence[Column] = ()) -> None:
        """Update the table for tensors of the same sizes whose addresses may have changed.

        Gradients move in every step after `zero_grad(set_to_none=True)`. Addresses are compared on
        the host; the columns that moved are copied from pinned memory without waiting. In a CUDA
        graph capture the addresses of the capture become part of the graph and are kept for its
        replays, whatever later calls outside of it do.

        Raises:
            ValueError: for columns of another length.
            RuntimeError: if tensors moved in a second capture without a call outside of a capture
                in between.
        """
        capturing = self._stream is not None and torch.cuda.is_current_stream_capturing()
        if self._stream is not None and not capturing:
            self._follow_stream(self._stream)

        # Columns with another address than last time; after a captured copy all of them.
        addresses = [_addresses(column) for column in (*columns, *per_row)]
        moved = [
            place
            for place, (now, then) in enumerate(zip(addresses, self._host, strict=True))
            if now != then
        ]
        if self._by_replay and not capturing:
            moved = list(range(len(addresses)))

        if moved:
            lengths = [len(column) for column in addresses]
            if set(lengths) != {self.rows}:
                raise ValueError(
                    f"pointer table: columns of {lengths} rows; the table has {self.rows}"
                )
            self._upload(addresses, moved[0], moved[-1] + 1, capturing)
            self._host = addresses
            self._by_replay = capturing
        if capturing:
            self._kept.append(self.pointers)
            _captured_tables.add(self)

    def _upload(self, addresses: list[list[int]], first: int, end: int, capturing: bool) -> None:
        """Copy columns `first` to `end` to the device; never into a block that a graph reads."""
        if self._stream is None:
            self.pointers[first:end].copy_(_as_tensor(addresses[first:end]))
            return
        if capturing and self._spare is None:
            raise RuntimeError(
                "pointer table: tensors moved in a second CUDA graph capture; "
                "call the op once outside of a capture"
            )
        if capturing or any(kept is self.pointers for kept in self._kept):
            self.pointers = torch.empty_like(self.pointers)
            first, end = 0, len(addresses)
        host = _as_tensor(addresses[first:end])
        if not capturing:
            # The pinned memory goes back to torch's host allocator, which waits for the copy before
            # it reuses it.
            self.pointers[first:end].copy_(host.pin_memory(), non_blocking=True)
            if self._spare is None:
                self._spare = torch.empty(self.pointers.shape, dtype=torch.int64, pin_memory=True)
        elif self._spare is not None:
            # Replays read this host memory again: it stays ours. It was pinned before, as a capture
            # must not allocate.
            self._kept.append(self._spare.copy_(host))
            self.pointers.copy_(self._spare, non_blocking=True)
            self._spare = None

    def _follow_stream(self, last: torch.cuda.Stream) -> None:
        """Order this use after the last one, if that was on another stream."""
        current = torch.cuda.current_stream(self.device)
        if current != last:
            current.wait_stream(last)
            for tensor in (
                self.pointers,
                self.sizes,
                self.chunk_rows,
                self.chunk_starts,
                self.first_chunks,
            ):
                tensor.record_stream(current)
            self._stream = current


_tables: OrderedDict[tuple[object, ...], PointerTable] = OrderedDict()
_captured_tables: set[PointerTable] = set()
"""Graphs hold addresses of tables, and nothing reports the end of a graph: these are never freed.
"""


def pointer_table(
    owner: str, columns: Sequence[Column], per_row: Sequence[Column] = (), *, chunk: int = CHUNK
) -> PointerTable:
    """The table of these tensors: built by the first call, refreshed and returned by later ones.

    Args:
        owner: name of the op; tables of different ops are never shared.
        columns: see `PointerTable`. Sizes of column 0 and its first address decide which table it
            is.
        per_row: see `PointerTable`.
        chunk: elements a program.

    Raises:
        ValueError: see `PointerTable`; checked when a table is built.
        RuntimeError: if a CUDA graph capture uses tensors that no call outside of a capture has
            used.

    Cost: a few dozen nanoseconds a tensor on the host; a copy of 8 bytes a tensor where one moved.
    The tables of the 64 tensor sets used last are kept, and those that a CUDA graph reads.
    """
    first = [tensor for tensor in columns[0] if tensor is not None] if columns else []
    sizes = tuple(tensor.numel() for tensor in first)
    address = first[0].data_ptr() if first else 0
    key = (
        owner,
        chunk,
        len(columns),
        len(per_row),
        first[0].device if first else None,
        address,
        sizes,
    )
    table = _tables.get(key)
    if table is None:
        if first and first[0].is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{owner}: call it once with these tensors before a CUDA graph capture"
            )
        table = _tables[key] = PointerTable(columns, per_row, chunk=chunk)
        if len(_tables) > _CACHED_TABLES:
            _tables.popitem(last=False)
        return table
    _tables.move_to_end(key)
    table.refresh(columns, per_row)
    return table


def _addresses(column: Column) -> list[int]:
    try:
        # Half the time of the comprehension below.
        return list(map(Tensor.data_ptr, column))  # type: ignore[arg-type]
    except TypeError:
        return [0 if tensor is None else tensor.data_ptr() for tensor in column]


def _as_tensor(addresses: Sequence[Sequence[int]]) -> Tensor:
    """[columns, rows] on the host, by an array: `torch.tensor` is ten times slower on lists."""
    flat = array("q", itertools.chain.from_iterable(addresses))
    return torch.frombuffer(flat, dtype=torch.int64).view(len(addresses), -1)


def _checked(columns: Sequence[Column], per_row: Sequence[Column]) -> list[Tensor]:
    """Column 0, once all columns have been checked."""
    first = [tensor for tensor in columns[0] if tensor is not None] if columns else []
    if not first or len(first) != len(columns[0]):
        raise ValueError(
            f"pointer table: column 0 has {len(first)} tensors in {len(columns and columns[0])} "
            "rows"
        )
    for c, column in enumerate((*columns, *per_row)):
        if len(column) != len(first):
            raise ValueError(
                f"pointer table: column {c} has {len(column)} rows but column 0 has {len(first)}"
            )
        for r, (tensor, leader) in enumerate(zip(column, first, strict=True)):
            if tensor is None:
                continue
            if c < len(columns) and tensor.numel() != leader.numel():
                raise ValueError(
                    f"pointer table: row {r} has {tensor.numel()} elements in column {c} but "
                    f"{leader.numel()} in column 0"
                )
            if tensor.device != first[0].device:
                raise ValueError(
                    f"pointer table: row {r} of column {c} is on {tensor.device}, "
                    f"not {first[0].device}"
                )
    return first
