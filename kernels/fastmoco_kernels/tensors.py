"""One kernel launch over many tensors: a table of their addresses that stays on the device.

An op over P tensors of a model would be P launches, or a few dozen with the addresses as kernel arguments. Here the
addresses lie in device memory once, and a launch of `chunks` programs finds its piece of work by its number::

    table = pointer_table("lars_step_", [params, grads, momentum_buffers])        # built once, then found again
    kernel[(table.chunks,)](table.pointers, table.sizes, table.chunk_rows, table.chunk_starts, table.rows,
                            CHUNK=table.chunk)

    row = tl.load(chunk_rows_ptr + tl.program_id(0))          # which tensor: int32
    start = tl.load(chunk_starts_ptr + tl.program_id(0))      # its first element here: int64, a multiple of CHUNK
    size = tl.load(sizes_ptr + row)                           # elements of that tensor: int64
    grad_ptr = tl.load(pointers_ptr + 1 * rows + row).to(tl.pointer_type(tl.float32))     # column 1; 0 for None

Words: a *column* is one list of tensors (all parameters), a *row* is one index (a parameter, its gradient, ...). The
tensors of one row have equal sizes; column 0 has no None. Rows without elements have no chunk, and `chunks` may be 0:
launch nothing then. `first_chunks` [rows + 1] says which chunks are a row's, for sums per tensor in a fixed order.
Tensors are addressed as flat memory: pass only those that `same_layout` accepts, and DTensors as `local(tensors)`.
A pointer may lie anywhere; a kernel that wants 128-bit loads looks at the addresses and takes a plain path for the rest.
"""

from __future__ import annotations

import itertools
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

CHUNK = 2048
"""Elements a program handles unless told otherwise; a power of two."""
_CACHED_TABLES = 64

Column = Sequence[Tensor | None]


class PointerTable:
    """Addresses, sizes and the chunk map of a set of tensors, on their device.

    Args:
        columns: lists of equal length; the tensors of one row have equal sizes and one device; None is address 0,
            and stands in any column but the first.
        per_row: further columns, appended after `columns`, whose sizes are free (step counters, for example).
        chunk: elements a program.

    Raises:
        ValueError: for no rows, columns of unequal length, tensors of unequal size or device in a row.

    Attributes:
        rows: number of rows.
        chunks: number of programs to launch; 0 if every tensor is empty.
        chunk: elements a program.
        device: of every tensor.
        pointers: [columns + per_row, rows] int64, contiguous.
        sizes: [rows] int64, elements.
        chunk_rows: [chunks] int32.
        chunk_starts: [chunks] int64, elements.
        first_chunks: [rows + 1] int32: chunks first_chunks[r] to first_chunks[r + 1] belong to row r, in order.
    """

    def __init__(
        self, columns: Sequence[Column], per_row: Sequence[Column] = (), *, chunk: int = CHUNK
    ) -> None:
        first = _checked(columns, per_row)
        self.rows, self.chunk, self.device = len(first), chunk, first[0].device
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
        self._host = [_addresses(column) for column in (*columns, *per_row)]
        host = _as_tensor(self._host)
        self.pointers = host.to(self.device)
        self._kept: list[Tensor] = []
        self._by_replay = False  # a copy that was captured has not run: until a replay its block holds no addresses
        self._spare = host.pin_memory() if self.device.type == "cuda" else None
        self._stream = (
            torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        )

    def refresh(self, columns: Sequence[Column], per_row: Sequence[Column] = ()) -> None:
        """Make the table right for tensors of the same sizes that may lie elsewhere now.

        Gradients move in every step after `zero_grad(set_to_none=True)`. Addresses are compared on the host; the columns
        that moved are copied from pinned memory without waiting. In a CUDA graph capture the addresses of the capture
        become part of the graph and are kept for its replays, whatever later calls outside of it do.

        Raises:
            ValueError: for columns of another length.
            RuntimeError: if tensors moved in a second capture without a call outside of a capture in between.
        """
        capturing = self._stream is not None and torch.cuda.is_current_stream_capturing()
        if self._stream is not None and not capturing:
            self._follow_stream(self._stream)
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
            self._host, self._by_replay = addresses, capturing
        if capturing:
            self._kept.append(self.pointers)
            _captured_tables.add(self)

    def _upload(self, addresses: list[list[int]], first: int, end: int, capturing: bool) -> None:
        """Copy columns `first` to `end` to the device. A block that a graph reads is never written to again."""
        if self._stream is None:
            self.pointers[first:end].copy_(_as_tensor(addresses[first:end]))
            return
        if capturing and self._spare is None:
            raise RuntimeError(
                "pointer table: tensors moved in a second CUDA graph capture; call the op once outside of a capture"
            )
        if capturing or any(kept is self.pointers for kept in self._kept):
            self.pointers = torch.empty_like(self.pointers)
            first, end = 0, len(addresses)
        host = _as_tensor(addresses[first:end])
        if not capturing:
            # The pinned memory goes back to torch's host allocator, which waits for the copy before it hands it on.
            self.pointers[first:end].copy_(host.pin_memory(), non_blocking=True)
            if self._spare is None:
                self._spare = torch.empty(self.pointers.shape, dtype=torch.int64, pin_memory=True)
        elif self._spare is not None:
            # Replays read this host memory again: it stays ours. It was pinned before, as a capture must not allocate.
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
"""Graphs hold addresses of tables, and nothing says when a graph dies: these are never freed."""


def pointer_table(
    owner: str, columns: Sequence[Column], per_row: Sequence[Column] = (), *, chunk: int = CHUNK
) -> PointerTable:
    """The table of these tensors: built on the first call, refreshed and handed out again on later ones.

    Args:
        owner: name of the op; tables of different ops are never shared.
        columns: see `PointerTable`. Sizes of column 0 and its first address decide which table it is.
        per_row: see `PointerTable`.
        chunk: elements a program.

    Raises:
        ValueError: see `PointerTable`; checked when a table is built.
        RuntimeError: if a CUDA graph capture meets tensors that no call outside of a capture has seen.

    Cost: a few dozen nanoseconds a tensor on the host; a copy of 8 bytes a tensor where one moved. The tables of the
    64 tensor sets used last are kept, and those that a CUDA graph reads.
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


def traced() -> bool:
    """Whether something watches torch calls (torch.compile, fake tensors, a counting mode): then ops go through the
    dispatcher as registered; otherwise they run at once, as dispatching lists of hundreds of tensors costs more than the
    launch."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def all_plain(tensors: Iterable[Tensor]) -> bool:
    """Whether there are only tensors and parameters, and no DTensor or other subclass."""
    return _PLAIN.issuperset(map(type, tensors))


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, with every DTensor replaced by this rank's shard: the same memory, no communication."""
    if all_plain(tensors):
        return list(tensors)
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]


def sums_over_shards(sums: Sequence[Tensor], owners: Sequence[Tensor]) -> list[Tensor]:
    """Sums over whole tensors from sums over this rank's shards: all tensors of one sharding in one collective.

    Args:
        sums: vectors on any devices, together one number for each owner, in their order; not changed where there are shards.
        owners: plain tensors, whose numbers stay, or DTensors; dimensions that are replicated (HSDP) take no part.

    Returns:
        As `sums`, the same on all ranks that share a tensor. All ranks must call it with the same owners.

    Raises:
        ValueError: for an owner that is a partial sum itself.
    """
    shardings: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
    for row, owner in enumerate(owners):
        placements = getattr(owner, "placements", ())
        if any(placement.is_partial() for placement in placements):
            raise ValueError(
                f"a tensor lies as {placements}: a partial sum cannot be told from its shards"
            )
        dims = tuple(
            dim for dim, placement in enumerate(placements) if not placement.is_replicate()
        )
        if dims:
            shardings.setdefault((getattr(owner, "device_mesh"), dims), []).append(row)  # noqa: B009
    if not shardings:
        return list(sums)
    whole = torch.cat([rows.to(sums[0].device) for rows in sums])
    for (mesh, dims), chosen in shardings.items():
        part = whole if len(chosen) == len(whole) else whole[chosen]
        for dim in dims:
            torch.distributed.all_reduce(part, group=mesh.get_group(dim))
        if part is not whole:
            whole[chosen] = part
    pieces: tuple[Tensor, ...] = torch.split(whole, [len(rows) for rows in sums])
    return [piece.to(rows.device) for piece, rows in zip(pieces, sums, strict=True)]


def same_layout(*tensors: Tensor | None) -> bool:
    """Whether flat memory order pairs up the elements: equal strides and no gaps or overlaps (None is passed over).

    Contiguous tensors do, and so do dense ones whose dimensions are permuted alike (channels_last).
    """
    present = [tensor for tensor in tensors if tensor is not None]
    if all(tensor.is_contiguous() for tensor in present):
        return True
    first = present[0]
    expected = 1
    for stride, size in sorted(
        (st, n) for st, n in zip(first.stride(), first.shape, strict=True) if n != 1
    ):
        if stride != expected:
            return False
        expected *= size
    return all(tensor.stride() == first.stride() for tensor in present)


def check_lists(
    op: str, name: str, leaders: Sequence[Tensor], others: Mapping[str, Column]
) -> None:
    """Refuse lists of tensors that do not pair up.

    Args:
        op: name of the op, for the error text.
        name: name of the first list.
        leaders: the first list; all on one device.
        others: further lists by name, of its length; each tensor of its leader's shape and device, or None.

    Raises:
        ValueError: naming both lists, the index and both values.
    """
    for other, column in others.items():
        if len(column) != len(leaders):
            raise ValueError(f"{op}: {len(leaders)} {name} but {len(column)} {other}")

    for i, leader in enumerate(leaders):
        if leader.device != leaders[0].device:
            raise ValueError(
                f"{op}: {name}[{i}] is on {leader.device} but {name}[0] is on {leaders[0].device}"
            )
        for other, column in others.items():
            tensor = column[i]
            if tensor is None:
                continue
            if tensor.shape != leader.shape:
                raise ValueError(
                    f"{op}: {other}[{i}] is {tuple(tensor.shape)} but {name}[{i}] is {tuple(leader.shape)}"
                )
            if tensor.device != leader.device:
                raise ValueError(
                    f"{op}: {other}[{i}] is on {tensor.device} but {name}[{i}] is on {leader.device}"
                )


def _addresses(column: Column) -> list[int]:
    try:
        return list(map(Tensor.data_ptr, column))  # type: ignore[arg-type]  # half the time of the line below
    except TypeError:
        return [0 if tensor is None else tensor.data_ptr() for tensor in column]


def _as_tensor(addresses: Sequence[Sequence[int]]) -> Tensor:
    """[columns, rows] on the host; by way of an array, because `torch.tensor` takes ten times as long for lists."""
    flat = array("q", itertools.chain.from_iterable(addresses))
    return torch.frombuffer(flat, dtype=torch.int64).view(len(addresses), -1)


def _checked(columns: Sequence[Column], per_row: Sequence[Column]) -> list[Tensor]:
    """Column 0, after every way to build a table wrongly."""
    first = [tensor for tensor in columns[0] if tensor is not None] if columns else []
    if not first or len(first) != len(columns[0]):
        raise ValueError(
            f"pointer table: column 0 has {len(first)} tensors in {len(columns and columns[0])} rows"
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
                    f"pointer table: row {r} has {tensor.numel()} elements in column {c} but {leader.numel()} in column 0"
                )
            if tensor.device != first[0].device:
                raise ValueError(
                    f"pointer table: row {r} of column {c} is on {tensor.device}, not {first[0].device}"
                )
    return first
