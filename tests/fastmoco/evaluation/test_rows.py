"""Feature rows in memory and in a file: the same blocks, and nothing is left on the disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastmoco.errors import RunError
from fastmoco.evaluation.rows import FileRows, MemoryRows, Rows, new_rows


def table(rows: int = 23) -> Tensor:
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(rows))


def filled(rows: Rows) -> Rows:
    for part in table().split(4):
        rows.append(part)
    return rows


@pytest.mark.parametrize("capacity", [23, 30, 1])  # as many, fewer because of bad images, unknown
@pytest.mark.parametrize("memory_bytes", [None, 0])
def test_blocks_are_the_rows_in_order(
    capacity: int, memory_bytes: int | None, tmp_path: Path
) -> None:
    rows = filled(
        new_rows(5, torch.float32, capacity=capacity, memory_bytes=memory_bytes, folder=tmp_path)
    )
    assert isinstance(rows, MemoryRows if memory_bytes is None else FileRows)
    assert (len(rows), rows.width, rows.dtype) == (23, 5, torch.float32)
    for start, stop in ((0, 23), (3, 4), (20, 23), (0, 1)):
        assert torch.equal(rows.block(start, stop), table()[start:stop])
    assert list(tmp_path.iterdir()) == []  # the file has no name
    rows.close()


def test_memory_is_used_up_to_the_limit_and_not_beyond() -> None:
    fits = {"capacity": 10, "memory_bytes": 10 * 5 * 8}
    assert isinstance(new_rows(5, torch.float64, **fits), MemoryRows)
    too_large = fits | {"capacity": 11}
    assert isinstance(new_rows(5, torch.float64, **too_large), FileRows)


@pytest.mark.parametrize("in_file", [False, True])
def test_rows_of_other_types_are_converted(in_file: bool, tmp_path: Path) -> None:
    rows: Rows = (
        FileRows(5, torch.float32, tmp_path) if in_file else MemoryRows(torch.empty(2, 5), 0)
    )
    rows.append(table().bfloat16()[:, :5])
    rows.append(table().double().T.contiguous().T)
    expected = torch.cat([table().bfloat16().float(), table()])
    assert torch.equal(rows.block(0, 46), expected)
    rows.close()


def test_a_full_disk_is_named_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = FileRows(5, torch.float32, tmp_path)

    class Full:
        def seek(self, position: int) -> None:
            pass

        def write(self, data: memoryview) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(rows, "_file", Full())
    with pytest.raises(RunError, match=r"No space left on device\); free some, or set TMPDIR") as e:
        rows.append(table())
    assert str(tmp_path) in str(e.value)


def test_a_file_that_ends_early_is_named(tmp_path: Path) -> None:
    rows = FileRows(5, torch.float32, tmp_path)
    rows.append(table())
    rows._file.truncate(100)
    with pytest.raises(RunError, match="ends after 100 of 460 bytes"):
        rows.block(0, 23)
    rows.close()


def test_an_absent_folder_is_named_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"absent: .*No such file.*or set TMPDIR"):
        FileRows(5, torch.float32, tmp_path / "absent")
