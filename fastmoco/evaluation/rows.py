"""Feature rows of one process, in memory or in a temporary file, read block by block.

A file is read and written, not mapped: a full disk is then an error and not a signal that ends the
process, and its pages do not count as memory of the process.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor

from fastmoco.errors import RunError


class Rows(ABC):
    """Rows [n, D] of features.

    Attributes:
        width: D.
        dtype: of the rows.
    """

    width: int
    dtype: torch.dtype

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def block(self, start: int, stop: int) -> Tensor:
        """Rows [stop - start, D] from `start` on; not to be written, valid until the next call."""

    @abstractmethod
    def append(self, rows: Tensor) -> None:
        """Add rows [B, D] of any floating dtype on any device.

        Raises:
            RunError: if the disk has no room for them.
        """

    @abstractmethod
    def close(self) -> None:
        """Release the memory or the file."""


class MemoryRows(Rows):
    """Rows in one tensor.

    Args:
        table: [capacity, D]; more rows than that move the table to one of twice the size.
        count: rows of it that are filled; None: all.
    """

    def __init__(self, table: Tensor, count: int | None = None) -> None:
        self.width = table.shape[1]
        self.dtype = table.dtype
        self._table = table
        self._count = len(table) if count is None else count

    def __len__(self) -> int:
        return self._count

    @property
    def tensor(self) -> Tensor:
        """All rows, [n, D]."""
        return self._table[: self._count]

    def block(self, start: int, stop: int) -> Tensor:
        """A view of the table."""
        return self._table[start:stop]

    def append(self, rows: Tensor) -> None:
        """Copy rows into the table."""
        count = self._count + len(rows)
        if count > len(self._table):
            larger = self._table.new_empty(max(count, 2 * len(self._table)), self.width)
            larger[: self._count] = self.tensor
            self._table = larger
        self._table[self._count : count] = rows
        self._count = count

    def close(self) -> None:
        """Release the table."""
        self._table = self._table[:0]
        self._count = 0


class FileRows(Rows):
    """Rows in a temporary file without a name, which the system deletes however the process ends.

    Args:
        width: D.
        dtype: float32 or float64.
        folder: of the file; None: that of `TMPDIR`.

    Raises:
        RunError: if the folder takes no file.
    """

    def __init__(self, width: int, dtype: torch.dtype, folder: Path | None) -> None:
        self.width = width
        self.dtype = dtype
        self._folder = folder if folder is not None else Path(tempfile.gettempdir())
        try:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - `close` closes it
        except OSError as error:
            raise RunError(
                f"{self._folder}: no temporary file for the features of kNN ({error.strerror}); "
                f"create it, or set TMPDIR to a folder that can be written"
            ) from error
        self._count = 0
        self._read = torch.empty(0, width, dtype=dtype)

    def __len__(self) -> int:
        return self._count

    def block(self, start: int, stop: int) -> Tensor:
        """Read rows into memory that the next call overwrites.

        Raises:
            RunError: if the disk does not give them.
        """
        if len(self._read) < stop - start:
            self._read = self._read.new_empty(stop - start, self.width)
        rows = self._read[: stop - start]
        self._file.seek(start * self.width * self.dtype.itemsize)
        got = self._file.readinto(rows.numpy().data.cast("B"))
        if got != rows.nbytes:
            raise RunError(
                f"{self._folder}: a temporary file of features ends after {got} of {rows.nbytes} "
                f"bytes; set TMPDIR to another disk"
            )
        return rows

    def append(self, rows: Tensor) -> None:
        """Write rows at the end of the file."""
        rows = rows.detach().to("cpu", self.dtype).contiguous()
        try:
            self._file.seek(self._count * self.width * self.dtype.itemsize)
            self._file.write(rows.numpy().data.cast("B"))
            self._file.flush()
        except OSError as error:
            raise RunError(
                f"{self._folder}: no room for the features of kNN ({error.strerror}); "
                f"free some, or set TMPDIR to a larger disk"
            ) from error
        self._count += len(rows)

    def close(self) -> None:
        """Close the file, which deletes it."""
        self._file.close()
        self._count = 0


def new_rows(
    width: int,
    dtype: torch.dtype,
    *,
    capacity: int,
    memory_bytes: int | None = None,
    folder: Path | None = None,
) -> Rows:
    """Empty rows, in memory if `capacity` of them take at most `memory_bytes`, otherwise in a file.

    Args:
        width: D.
        dtype: float32 or float64.
        capacity: number of rows that is expected, not a limit.
        memory_bytes: largest size in memory; None: any.
        folder: of the file; None: that of `TMPDIR`.
    """
    if memory_bytes is not None and capacity * width * dtype.itemsize > memory_bytes:
        return FileRows(width, dtype, folder)
    # Pages that are never written take no memory.
    return MemoryRows(torch.empty(capacity, width, dtype=dtype), 0)
