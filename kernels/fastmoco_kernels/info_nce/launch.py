"""Launches: scratch tensors, grids, the choice of a tile.

Four launches whatever the number of directions: queries to unit length, keys to unit length, the
pass, the epilogue; and one sum. Ranks add a small launch, gradients of the keys a pass and its
epilogue. Of keys in blocks every block takes two launches, and after the first a third.

Legend: B queries, N keys, D dimension (padded in scratch), S directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmoco_kernels.backends import device_guard
from fastmoco_kernels.info_nce import epilogue_kernels, triton_kernels
from fastmoco_kernels.info_nce.chunked import EPS, OnePass, Request
from fastmoco_kernels.info_nce.cost import LOG2_E, exponent_ceiling, padded, padded_dim
from fastmoco_kernels.info_nce.tiles import Tile, candidates, family, key_splits
from fastmoco_kernels.tuning import tuned

SCRATCH = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
}
DOT = {"bf16": "tf32", "fp16": "tf32", "tf32": "tf32", "fp32": "ieee"}
"""`input_precision` of the products; without effect on two-byte operands."""


class _Units(NamedTuple):
    """Rows of S tensors of one shape, as they are and at unit length."""

    raw: tuple[Tensor, Tensor]
    unit: Tensor
    norm: Tensor


class _Pass(NamedTuple):
    """Results of the streaming kernel, by split, direction and row."""

    acc: Tensor
    total: Tensor
    ranks: Tensor
    splits: int


def info_nce_triton(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    request: Request,
    *,
    queue: Tensor | None = None,
    tile: Tile | None = None,
    splits: int | None = None,
) -> OnePass:
    """As `info_nce_chunked`, by the kernels.

    Args:
        queries: S of [B, D], D <= 512, not float64.
        keys: S of [N, D].
        request: with `precision` one of the four.
        queue: as for `info_nce_chunked`.
        tile: instead of the measured one.
        splits: parts of the keys, instead of the computed number.
    """
    with device_guard(queries[0]):
        q, k = _unit_rows(queries, request.precision), _unit_rows(keys, request.precision)
        N, B = keys[0].shape[0], queries[0].shape[0]
        first = request.positive_offset
        own = _own(q.unit, k.unit, N, first) if request.accuracy else None
        streamed, count, shift = k.unit, N, first
        if queue is not None:
            # The positive of every query is beyond the rows that stream past.
            streamed = _unit_rows((queue,), request.precision, normalise=False).unit
            count = shift = queue.shape[0]
        swept = _stream(q.unit, streamed, count, shift, request, own=own, tile=tile, splits=splits)
        rows, dq, bias, share = _finish(q, k, swept, request)
        dkeys = rows.new_empty(0)
        if request.key_gradient:
            back = _stream(k.unit, q.unit, B, -first, request, bias=bias, tile=tile, splits=splits)
            dkeys = _finish_keys(q, k, back, share, request)
    return _added(rows, dq, dkeys, request)


class TritonBlocks:
    """The same pass over keys that arrive in blocks, of which none is kept but the positives.

    Each block is one launch of the streaming kernel, whose sums stay in a workspace; those of the
    blocks before are added to it in the order of the calls, so the same calls give the same bits.

    Args:
        queries: S of [B, D], D <= 512, not float64.
        request: without a gradient of the keys; its `positive_offset` is not read.
        tile: instead of the measured one.
        splits: parts of every block, instead of the computed number.
    """

    def __init__(
        self,
        queries: Sequence[Tensor],
        request: Request,
        *,
        tile: Tile | None = None,
        splits: int | None = None,
    ) -> None:
        self._request, self._tile, self._splits = request, tile, splits
        with device_guard(queries[0]):
            self._q = _unit_rows(queries, request.precision)
        self._positives: _Units | None = None
        self._own: Tensor | None = None
        self._swept: _Pass | None = None

    def add(self, keys: Sequence[Tensor], first: int) -> None:
        """Add a block; the first one must hold every positive.

        Args:
            keys: S of [n, D], not needed after the call; those of the first call must stay.
            first: the positive of query i is row `first + i` of the block, if there is such a row.
        """
        n = keys[0].shape[0]
        with device_guard(keys[0]):
            k = _unit_rows(keys, self._request.precision)
            if self._positives is None:
                # Of the first block the raw rows and lengths stay, for the epilogue.
                self._positives, self._first = k._replace(unit=k.norm), first
                if self._request.accuracy:
                    self._own = _own(self._q.unit, k.unit, n, first)
            swept = _stream(
                self._q.unit,
                k.unit,
                n,
                first,
                self._request,
                own=self._own,
                tile=self._tile,
                splits=self._splits,
                before=self._swept,
            )
            self._swept = swept

    def finish(self) -> OnePass:
        """Loss and gradients, after the last block."""
        assert self._positives is not None  # noqa: S101 - a type: a batch has a block at least
        assert self._swept is not None  # noqa: S101 - a type: a batch has a block at least
        request = replace(self._request, positive_offset=self._first)
        with device_guard(self._q.raw[0]):
            rows, dq, _, _ = _finish(self._q, self._positives, self._swept, request)
        return _added(rows, dq, rows.new_empty(0), request)


def _added(rows: Tensor, dq: Tensor, dkeys: Tensor, request: Request) -> OnePass:
    """The results of all rows, from those of each row, [4, S, B]."""
    # Of all rows, also of those that nothing was written to: on CUDA the order of a sum depends on how
    # many there are, and the loss must not depend on what else was asked for.
    loss, *others = rows.sum((1, 2)).unbind()
    nothing = rows.new_empty(0)
    return OnePass(
        loss=loss.clone(),  # no view: a caller may add to it in place
        dq=dq,
        dkeys=dkeys,
        dtemperature=others[0] if request.gradient else nothing,
        hits=torch.stack(others[1:]) / rows[0].numel() if request.accuracy else nothing.clone(),
    )


def _unit_rows(raw: Sequence[Tensor], precision: str, *, normalise: bool = True) -> _Units:
    """Rows in the operands' type and padded, at unit length unless they are so already."""
    first, second = raw[0], raw[-1]
    if second.stride() != first.stride():
        first, second = first.contiguous(), second.contiguous()
    rows, dim = first.shape
    D = padded_dim(dim)
    block = _epilogue_rows(D)
    unit = torch.empty((len(raw), padded(rows), D), dtype=SCRATCH[precision], device=first.device)
    norm = torch.empty((len(raw), rows), dtype=torch.float32, device=first.device)
    triton_kernels.info_nce_unit_rows_kernel[(padded(rows) // block, len(raw))](
        first,
        second,
        unit,
        norm,
        rows,
        padded(rows),
        dim,
        *first.stride(),
        EPS=EPS,
        D=D,
        ROWS=block,
        TF32=precision == "tf32",
        NORMALISE=normalise,
        num_warps=4,
    )
    return _Units((first, second), unit, norm)


def _own(x: Tensor, y: Tensor, y_rows: int, positive_shift: int) -> Tensor:
    """[S, x_padded] the cosine of each x and its positive, for the ranks."""
    S, x_padded, D = x.shape
    own = torch.empty((S, x_padded), dtype=torch.float32, device=x.device)
    block = _epilogue_rows(D)
    triton_kernels.info_nce_own_kernel[(x_padded // block, S)](
        x, y, own, x_padded, y.shape[1], y_rows, positive_shift, D=D, ROWS=block, num_warps=4
    )
    return own


def _stream(
    x: Tensor,
    y: Tensor,
    y_rows: int,
    positive_shift: int,
    request: Request,
    *,
    bias: Tensor | None = None,
    own: Tensor | None = None,
    tile: Tile | None,
    splits: int | None,
    before: _Pass | None = None,
) -> _Pass:
    """Stream the rows of y past those of x, with the best tile; x replaces arguments not needed.

    Args:
        x: [S, x_padded, D] rows that stay.
        y: [S, y_padded, D] rows that stream past.
        y_rows: those that are not padding.
        positive_shift: the positive of x row i is y row `i + positive_shift`.
        request: what is wanted.
        bias: of the second pass.
        own: the positives' cosines, where ranks are counted.
        tile: instead of the measured one.
        splits: instead of the computed number.
        before: sums of other y, which become the first part of the result.
    """
    S, x_padded, D = x.shape
    kind, processors = _chip(x.device)
    gradient = request.gradient or bias is not None
    counting = own is not None
    lead = 0 if before is None else 1

    def run(tile: Tile) -> _Pass:
        tiles = _cdiv(y_rows, tile.block_y)
        wanted = (
            key_splits(x_padded, y_rows, S, tile, processors)
            if splits is None
            else min(splits, tiles)
        )
        per_split = _cdiv(tiles, wanted)
        parts = _cdiv(tiles, per_split)

        acc = total = count = x
        if gradient:
            acc = torch.empty((lead + parts, S, x_padded, D), dtype=torch.float32, device=x.device)
        if bias is None:
            total = torch.empty((lead + parts, S, x_padded), dtype=torch.float32, device=x.device)
        if counting:
            count = torch.empty((lead + parts, S, x_padded), dtype=torch.int32, device=x.device)
        new = (acc, total, count)
        if lead:
            new = (acc[lead:] if gradient else x, total[lead:], count[lead:] if counting else x)
        triton_kernels.info_nce_stream_kernel[(x_padded // tile.block_x, parts, S)](
            x,
            y,
            *new,
            x if own is None else own,
            x if bias is None else bias,
            *_temperature(request, x),
            x_padded,
            y_rows,
            y.shape[1],
            positive_shift,
            per_split,
            D=D,
            BLOCK_X=tile.block_x,
            BLOCK_Y=tile.block_y,
            GRADIENT=gradient,
            COUNT=counting,
            BIAS=bias is not None,
            **_constants(request),
            PRECISION=DOT[request.precision],
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        return _Pass(acc, total, count, lead + parts)

    if tile is None:
        choices = candidates(kind, D, request.precision)
        wants = ("gradient" if request.gradient else "loss") if bias is None else "keys"
        wants += "+ranks" if counting else ""
        key = (S, x_padded, y_rows, D, request.precision, wants)
        tile = tuned("info_nce", key, choices, choices[0], run, x.device)
    swept = run(tile)
    if before is not None:
        _fold(before, swept, gradient=gradient, counting=counting)
    return swept


def _fold(before: _Pass, after: _Pass, *, gradient: bool, counting: bool) -> None:
    """Add all parts of `before`, in order, into the first part of `after`."""
    _, S, x_padded = after.total.shape
    D = after.acc.shape[-1]
    block = _epilogue_rows(D) if gradient else 1024
    rows = S * x_padded
    epilogue_kernels.info_nce_fold_kernel[(_cdiv(rows, block),)](
        before.acc if gradient else before.total,
        before.total,
        before.ranks if counting else before.total,
        after.acc if gradient else after.total,
        after.total,
        after.ranks if counting else after.total,
        rows,
        before.splits,
        D=D if gradient else 1,
        ROWS=block,
        GRADIENT=gradient,
        COUNT=counting,
        num_warps=4,
    )


def _finish(
    q: _Units, k: _Units, swept: _Pass, request: Request
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Results [4, S, B], the gradient [S, B, D], and bias and share for the second pass."""
    S, B = q.norm.shape
    B_padded, N, dim = q.unit.shape[1], k.norm.shape[1], q.raw[0].shape[1]
    device, keys = q.norm.device, request.key_gradient
    rows = torch.empty((4, S, B), dtype=torch.float32, device=device)
    kept = torch.float32 if q.raw[0].dtype == torch.float16 else q.raw[0].dtype
    dq = torch.empty((S, B, dim) if request.gradient else (0,), dtype=kept, device=device)
    bias = share = rows
    if keys:
        bias, share = torch.empty((2, S, B_padded), dtype=torch.float32, device=device).unbind()

    block = _epilogue_rows(q.unit.shape[2])
    epilogue_kernels.info_nce_finish_kernel[(_cdiv(B_padded if keys else B, block), S)](
        *q.raw,
        *k.raw,
        q.norm,
        k.norm,
        swept.acc if request.gradient else swept.total,
        swept.total,
        swept.ranks if request.accuracy else swept.total,
        *_temperature(request, swept.total)[:1],
        rows,
        dq,
        bias,
        share,
        B,
        B_padded,
        N,
        dim,
        *q.raw[0].stride(),
        *k.raw[0].stride(),
        request.positive_offset,
        swept.splits,
        _temperature(request, swept.total)[1],
        request.scale / B,
        _key_shift(request),
        EPS=EPS,
        D=q.unit.shape[2],
        ROWS=block,
        GRADIENT=request.gradient,
        COUNT=request.accuracy,
        KEYS=keys,
        **_constants(request),
        num_warps=4,
    )
    return rows, dq, bias, share


def _finish_keys(q: _Units, k: _Units, back: _Pass, share: Tensor, request: Request) -> Tensor:
    """[N, D] the gradient of the raw keys."""
    B, (N, dim), D = q.norm.shape[1], k.raw[0].shape, q.unit.shape[2]
    kept = torch.float32 if k.raw[0].dtype == torch.float16 else k.raw[0].dtype
    dk = torch.empty((N, dim), dtype=kept, device=k.norm.device)

    block, (pointer, scale_log2) = _epilogue_rows(D), _temperature(request, share)
    epilogue_kernels.info_nce_finish_keys_kernel[(_cdiv(N, block),)](
        q.raw[0],
        k.raw[0],
        q.norm,
        k.norm,
        back.acc,
        share,
        pointer,
        dk,
        B,
        N,
        k.unit.shape[1],
        dim,
        *q.raw[0].stride(),
        *k.raw[0].stride(),
        request.positive_offset,
        back.splits,
        scale_log2,
        request.scale / B,
        2.0 ** -_key_shift(request),
        EPS=EPS,
        D=D,
        ROWS=block,
        ON_DEVICE=isinstance(request.temperature, Tensor),
        num_warps=4,
    )
    return dk


def _cdiv(a: int, b: int) -> int:
    """triton.cdiv takes the host some microseconds."""
    return -(-a // b)


def _epilogue_rows(D: int) -> int:
    return max(1, 1024 // D)


def _temperature(request: Request, unused: Tensor) -> tuple[Tensor, float]:
    """Pointer to the temperature, or `unused` for a number; and log2(e) over it, or 0."""
    if isinstance(request.temperature, Tensor):
        return request.temperature, 0.0
    return unused, LOG2_E / request.temperature


def _constants(request: Request) -> dict[str, Any]:
    return {
        "ON_DEVICE": isinstance(request.temperature, Tensor),
        "CEILING": exponent_ceiling(request.precision),
    }


def _key_shift(request: Request) -> float:
    """In the second pass terms are shares of 1; in fp16 small ones need a factor of 2^15."""
    return exponent_ceiling("fp16") if request.precision == "fp16" else 0.0


def _chip(device: torch.device) -> tuple[int, int]:
    """Row of the table of tiles, and number of processors.

    The interpreter is one small processor.
    """
    if device.type != "cuda":
        return 0, 1
    chip = torch.cuda.get_device_properties(device)
    return family((chip.major, chip.minor)), chip.multi_processor_count
