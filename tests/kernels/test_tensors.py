"""The table of addresses: what it holds, when it is built again, and which tensors may enter it."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastmoco_kernels import tables
from fastmoco_kernels.tables import PointerTable, pointer_table
from fastmoco_kernels.tensors import local, same_layout, traced

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _columns(*sizes: int) -> list[list[torch.Tensor]]:
    return [[torch.zeros(size, device=DEVICE) for size in sizes] for _ in range(2)]


# a tensor of no elements, of one, just below, at and just above a chunk, and of several chunks
@pytest.mark.parametrize("sizes", [(1,), (0, 3), (7, 8, 9, 0, 33), (16, 0)])
def test_every_element_is_in_exactly_one_chunk(sizes):
    columns = _columns(*sizes)
    table = PointerTable(columns, chunk=8)
    seen = [torch.zeros(size, dtype=torch.int64) for size in sizes]
    for row, start in zip(table.chunk_rows.tolist(), table.chunk_starts.tolist(), strict=True):
        assert start % 8 == 0
        assert start < sizes[row]
        seen[row][start : start + 8] += 1
    assert all(bool((count == 1).all()) for count in seen)
    assert table.chunks == sum((size + 7) // 8 for size in sizes)
    for row, (low, high) in enumerate(
        zip(table.first_chunks[:-1], table.first_chunks[1:], strict=True)
    ):
        assert table.chunk_rows[low:high].tolist() == [row] * int(high - low)
    assert table.sizes.tolist() == list(sizes)
    assert table.pointers.tolist() == [[t.data_ptr() for t in column] for column in columns]


def test_refresh_follows_moved_tensors_and_keeps_the_map():
    params, grads = _columns(5, 20)
    table = pointer_table("test", [params, grads], chunk=8)
    rows = table.chunk_rows
    moved = [grad.clone() for grad in grads]
    again = pointer_table("test", [params, moved], chunk=8)
    assert again is table
    assert again.chunk_rows is rows
    assert again.pointers.tolist()[1] == [grad.data_ptr() for grad in moved]


def test_no_copy_where_nothing_moved(monkeypatch):
    columns = _columns(5, 20)
    pointer_table("test", columns)
    monkeypatch.setattr(PointerTable, "_upload", lambda *_: pytest.fail("uploaded"))
    pointer_table("test", columns)


def test_tables_are_not_shared_between_ops_sizes_or_chunks():
    columns = _columns(6)
    first = pointer_table("test", columns)
    assert pointer_table("other", columns) is not first
    assert pointer_table("test", columns, chunk=64) is not first
    assert pointer_table("test", [[column[0][:3]] for column in columns]) is not first


def test_old_tables_are_dropped():
    alive = [_columns(3) for _ in range(70)]
    for columns in alive:
        pointer_table("test", columns)
    assert len(tables._tables) == 64


def test_none_is_address_zero_and_per_row_columns_have_their_own_sizes():
    params, _ = _columns(4, 5)
    steps = [torch.zeros((), device=DEVICE) for _ in params]
    table = PointerTable([params, [None, params[1]]], [steps])
    assert table.pointers[1].tolist() == [0, params[1].data_ptr()]
    assert table.pointers[2].tolist() == [step.data_ptr() for step in steps]


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ([], "column 0 has 0 tensors in 0 rows"),
        ([[]], "column 0 has 0 tensors in 0 rows"),
        ([[None, torch.zeros(1)]], "column 0 has 1 tensors in 2 rows"),
        ([[torch.zeros(1)], []], "column 1 has 0 rows but column 0 has 1"),
        (
            [[torch.zeros(2)], [torch.zeros(3)]],
            "row 0 has 3 elements in column 1 but 2 in column 0",
        ),
        (
            [[torch.zeros(2)], [torch.zeros(2, device="meta")]],
            "row 0 of column 1 is on meta, not cpu",
        ),
    ],
)
def test_errors_name_both_numbers(columns, text):
    with pytest.raises(ValueError, match=text):
        PointerTable(columns)


def test_same_layout_takes_dense_tensors_that_pair_up_and_no_others():
    image = torch.zeros(2, 3, 4, 5)
    last = image.to(memory_format=torch.channels_last)
    assert same_layout(image, image.clone(), None)
    assert same_layout(last, last.clone())
    assert not same_layout(image, last)
    assert not same_layout(last, image)
    assert same_layout(torch.zeros(3, 4).t(), torch.zeros(3, 4).t())
    assert not same_layout(torch.zeros(3, 8)[:, :4], torch.zeros(3, 8)[:, :4])  # gaps
    assert not same_layout(
        torch.zeros(1, 4).expand(3, 4), torch.zeros(1, 4).expand(3, 4)
    )  # overlaps
    assert same_layout(torch.zeros(()), torch.zeros(()))
    assert same_layout(torch.zeros(9)[1:5], torch.zeros(4))


def test_local_leaves_plain_tensors_alone_and_nothing_is_traced_here():
    tensor = torch.zeros(2)
    assert local([tensor])[0] is tensor
    assert not traced()
    with FlopCounterMode(display=False):
        assert traced()


@pytest.mark.gpu
def test_a_captured_graph_keeps_its_addresses_when_tensors_move_later():
    from fastmoco_kernels import ema_update_

    averages, sources = _columns(5000, 3)
    ema_update_(averages, sources, 0.5)
    inside = [torch.ones_like(s) for s in sources]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema_update_(averages, inside, 0.5)
    ema_update_(
        averages, [torch.full_like(s, 9.0) for s in sources], 1.0
    )  # elsewhere, and changes nothing
    graph.replay()
    assert all(torch.equal(a, torch.full_like(a, 0.5)) for a in averages)


@pytest.mark.gpu
def test_a_call_behind_a_capture_does_not_rely_on_a_copy_that_has_not_run():
    from fastmoco_kernels import ema_update_

    averages, sources = _columns(5000, 3)
    ema_update_(averages, sources, 0.5)
    inside = [torch.ones_like(s) for s in sources]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema_update_(averages, inside, 0.5)
    ema_update_(averages, inside, 0.5)  # the same tensors, before any replay
    assert all(torch.equal(a, torch.full_like(a, 0.5)) for a in averages)
    graph.replay()
    assert all(torch.equal(a, torch.full_like(a, 0.75)) for a in averages)
