"""InfoNCE in one pass over the keys in plain torch, a tile of logits at a time.

The positive stays out of the sums, so that `loss = log1p(sum_negatives / e_positive)` keeps its
digits when the loss is small. Cosines are in [-1, 1]: at temperatures where `exp(1 / temperature)`
is far from float32's limits no maximum is subtracted; below, and where the temperature is a tensor,
a running one is.

Legend: B local queries, N keys, D projection dimension, R rows and C columns of one tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastmoco_kernels.backends import accumulation_dtype

EPS = 1e-12
SMALLEST_UNSHIFTED = 0.02
"""exp(1 / 0.02) = 5e21: its sum over 2^31 keys, and its inverse, are normal float32 numbers."""

TILE_CPU, TILE = (8192, 1024), (4096, 4096)
"""Rows and columns of a tile of logits, 32 and 64 MiB in float32. Tiles that fit a CPU's cache are
as fast on an idle machine and three times slower on a busy one, where threads wait for each other
at the end of each operation.
"""
ONES = 16
"""Columns after the keys, the first of them 1: one product gives the sums of keys and of weights.

One cache line.
"""


class OnePass(NamedTuple):
    """Results of one pass over S directions of B queries and N keys; empty if not requested."""

    loss: Tensor
    """Scalar: `scale * mean` summed over the directions."""
    dq: Tensor
    """[S, B, D] its gradient in the raw queries."""
    dkeys: Tensor
    """[N, D] its gradient in the raw keys (one direction only)."""
    dtemperature: Tensor
    """Scalar: its gradient in the temperature at constant scale."""
    hits: Tensor
    """[2] share of rows whose positive ranks first, and among the first five."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is computed, apart from the tensors.

    Attributes:
        temperature: > 0, or a 0-dim tensor.
        scale: factor of the mean.
        positive_offset: row of the keys that is the positive of query 0.
        gradient: whether `dq` and `dtemperature` are wanted.
        key_gradient: whether `dkeys` is wanted.
        accuracy: whether `hits` is wanted.
        precision: operands of the tensor cores; "fp32" elsewhere.
    """

    temperature: float | Tensor
    scale: float
    positive_offset: int
    gradient: bool
    key_gradient: bool = False
    accuracy: bool = False
    precision: str = "fp32"


class _Rows(NamedTuple):
    """Results of a block of rows."""

    loss: Tensor
    lse: Tensor
    share: Tensor
    dq: Tensor | None
    dtemperature: Tensor | None
    rank: Tensor | None


def info_nce_chunked(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    request: Request,
    *,
    queue: Tensor | None = None,
) -> OnePass:
    """Loss and gradients of S directions, `queries[s]` against `keys[s]`, in one pass of the keys.

    4 * B * N * D FLOPs a direction, as many again for `dkeys`. Memory beyond the results: the unit
    rows, and one tile.

    Args:
        queries: S of [B, D].
        keys: S of [N, D].
        request: what is wanted.
        queue: [K, D] of unit length, the negatives of every query. `keys` are then the positives
            alone: a query is compared with its own row, and with no other.
    """
    dtype, device = accumulation_dtype(queries[0]), queries[0].device
    B, D = queries[0].shape
    rows, columns = TILE_CPU if device.type == "cpu" else TILE
    negatives = keys[0].shape[0] if queue is None else queue.shape[0]
    tile = torch.empty(min(rows, B) * min(columns, negatives), dtype=dtype, device=device)
    factor = request.scale / (B * request.temperature)

    losses, dtemperatures, ranks = [], [], []
    dq_SBD = torch.empty(
        (len(queries), B, D) if request.gradient else (0,), dtype=dtype, device=device
    )
    dkeys = torch.empty(0, dtype=dtype, device=device)
    for s, (q, k) in enumerate(zip(queries, keys, strict=True)):
        # Unit rows; the keys followed by a column of ones.
        u_BD, q_norm = _unit_rows(q, dtype)
        wide, key_norm = _unit_rows(k, dtype, more=ONES)
        wide[:, D] = 1
        v_ND = wide[:, :D]

        # Blocks of queries against all keys.
        blocks = []
        for start in range(0, B, rows):
            inside, first = slice(start, start + rows), request.positive_offset + start
            u_RD = u_BD[inside]
            sums = _Sums(u_RD, v_ND[first : first + len(u_RD)], request)
            if queue is None:
                sums.add(wide, first, tile, columns)
            else:
                # In parts, so that no second queue is in memory; positives are beyond all of them.
                for part in queue.split(columns):  # type: ignore[no-untyped-call]
                    sums.add(_with_ones(part, dtype), len(part), tile, columns)
            block = sums.finish()
            blocks.append(block)
            if block.dq is not None:
                dq_SBD[s, inside] = _through_norm(block.dq.mul_(factor), u_RD, q_norm[inside])

        losses.append(torch.cat([block.loss for block in blocks]))
        dtemperatures += [block.dtemperature for block in blocks if block.dtemperature is not None]
        ranks += [block.rank for block in blocks if block.rank is not None]

        # A second pass, for which every row's sum must be final.
        if request.key_gradient:
            lse, share = (
                torch.cat([getattr(block, name) for block in blocks]) for name in ("lse", "share")
            )
            dv_ND = _key_pass(u_BD, v_ND, lse, share, request, tile, (rows, columns)).mul_(factor)
            dkeys = _through_norm(dv_ND, v_ND, key_norm)

    return _added(losses, dtemperatures, ranks, dq_SBD, dkeys, request.scale / B)


class ChunkedBlocks:
    """The same pass over keys that arrive in blocks, of which none is kept but the positives.

    Memory: `O(S (B + n) D)` for B queries and blocks of n keys, and one tile.

    Args:
        queries: S of [B, D].
        request: without a gradient of the keys; its `positive_offset` is not read.
    """

    def __init__(self, queries: Sequence[Tensor], request: Request) -> None:
        self._request = request
        self._dtype = accumulation_dtype(queries[0])
        self._queries = [_unit_rows(q, self._dtype) for q in queries]
        self._sums: list[list[_Sums]] = []
        on_cpu = queries[0].device.type == "cpu"
        self._rows, self._columns = TILE_CPU if on_cpu else TILE

    def add(self, keys: Sequence[Tensor], first: int) -> None:
        """Add a block; the first one must hold every positive.

        Args:
            keys: S of [n, D], not needed after the call.
            first: the positive of query i is row `first + i` of the block, if there is such a row.
        """
        B = self._queries[0][0].shape[0]
        size = min(self._rows, B) * min(self._columns, keys[0].shape[0])
        tile = torch.empty(size, dtype=self._dtype, device=keys[0].device)
        starts = range(0, B, self._rows)
        begin = not self._sums
        for s, ((u_BD, _), k) in enumerate(zip(self._queries, keys, strict=True)):
            wide, _ = _unit_rows(k, self._dtype, more=ONES)
            D = u_BD.shape[1]
            wide[:, D] = 1
            if begin:
                positive_BD = wide[first : first + B, :D].contiguous()
                self._sums.append(
                    [
                        _Sums(u_BD[inside], positive_BD[inside], self._request)
                        for inside in (slice(start, start + self._rows) for start in starts)
                    ]
                )
            for start, sums in zip(starts, self._sums[s], strict=True):
                sums.add(wide, first + start, tile, self._columns)

    def finish(self) -> OnePass:
        """Loss and gradients, after the last block."""
        request, unit = self._request, self._queries[0][0]
        B = unit.shape[0]
        factor = request.scale / (B * request.temperature)
        losses, dtemperatures, ranks, dq = [], [], [], []
        for (u_BD, q_norm), blocks in zip(self._queries, self._sums, strict=True):
            for start, sums in zip(range(0, B, self._rows), blocks, strict=True):
                found, inside = sums.finish(), slice(start, start + self._rows)
                losses.append(found.loss)
                if found.dtemperature is not None:
                    dtemperatures.append(found.dtemperature)
                if found.rank is not None:
                    ranks.append(found.rank)
                if found.dq is not None:
                    dq.append(_through_norm(found.dq.mul_(factor), u_BD[inside], q_norm[inside]))
        nothing = unit.new_empty(0)
        dq_SBD = torch.cat(dq).view(len(self._queries), *unit.shape) if dq else nothing
        return _added(losses, dtemperatures, ranks, dq_SBD, nothing.clone(), request.scale / B)


def _added(
    losses: list[Tensor],
    dtemperatures: list[Tensor],
    ranks: list[Tensor],
    dq: Tensor,
    dkeys: Tensor,
    factor: float,
) -> OnePass:
    """The results of all rows, from those of each block; `factor`: of every row."""
    nothing = dq.new_empty(0)
    return OnePass(
        loss=torch.cat(losses).sum() * factor,
        dq=dq,
        dkeys=dkeys,
        dtemperature=torch.cat(dtemperatures).sum() * factor if dtemperatures else nothing,
        hits=_hits(torch.cat(ranks), dq.dtype) if ranks else nothing.clone(),
    )


def _hits(ranks: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.stack([(ranks < first).to(dtype).mean() for first in (1, 5)])


def _unit_rows(raw: Tensor, dtype: torch.dtype, more: int = 0) -> tuple[Tensor, Tensor]:
    """Rows at unit length, padded with `more` zeros, and their lengths.

    In new memory, so that strides of the input change no bit.
    """
    raw = raw.detach().to(dtype).contiguous()
    norm = torch.linalg.vector_norm(raw, dim=1, keepdim=True)
    unit = raw.new_zeros(raw.shape[0], raw.shape[1] + more)
    torch.div(raw, norm.clamp_min(EPS), out=unit[:, : raw.shape[1]])
    return unit, norm


def _with_ones(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows as they are, followed by a column of ones and zeros."""
    wide = torch.zeros(rows.shape[0], rows.shape[1] + ONES, dtype=dtype, device=rows.device)
    wide[:, : rows.shape[1]] = rows
    wide[:, rows.shape[1]] = 1
    return wide


def _through_norm(gradient: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    """Gradient of the raw rows from that of the unit rows; rows below EPS were divided by EPS."""
    along = (gradient * unit).sum(1, keepdim=True) * (norm >= EPS)
    return gradient.addcmul_(along, unit, value=-1).div_(norm.clamp_min(EPS))


class _Sums:
    """Running sums of a block of queries over the keys, their positives left out.

    Keys are added in any parts and in any order: with the constant reference parts simply add; with
    a running maximum the sums so far are rescaled when it rises.

    Args:
        u_RD: the queries at unit length.
        positive_RD: the positive of each at unit length.
        request: what is wanted.
    """

    def __init__(self, u_RD: Tensor, positive_RD: Tensor, request: Request) -> None:
        (R, D), temperature = u_RD.shape, request.temperature
        self._u_RD, self._positive_RD, self._request = u_RD, positive_RD, request
        self._bounded = not isinstance(temperature, Tensor) and temperature >= SMALLEST_UNSHIFTED

        # The positive's own logit, and the bar that a negative must reach to rank before it.
        self._own_R = (u_RD * positive_RD).sum(1) / temperature
        # Ties within 64 units in the last place: equal rows must tie in any order of summation.
        eps = torch.finfo(self._own_R.dtype).eps
        self._bar_R = self._own_R - 64 * eps / temperature
        self._rank_R = None
        if request.accuracy:
            self._rank_R = torch.zeros(R, dtype=torch.int64, device=u_RD.device)

        # The positive's logit is the first maximum; every larger logit replaces it.
        own_R = self._own_R
        self._reference_R = torch.zeros_like(own_R) if self._bounded else own_R.clone()
        self._sums = u_RD.new_zeros(R, D + ONES if request.gradient else ONES)

    def add(self, wide: Tensor, first: int, tile: Tensor, columns: int) -> None:
        """Add a part of the keys.

        Args:
            wide: [n, D + ONES] the keys at unit length and the column of ones.
            first: the positive of query r is row `first + r`, if there is such a row.
            tile: memory of the logits.
            columns: of one tile.
        """
        D = self._u_RD.shape[1]
        v_ND, values = wide[:, :D], wide if self._request.gradient else wide[:, D:]
        scaled_RD = self._u_RD / self._request.temperature
        bar_R1 = self._bar_R[:, None]
        for start in range(0, v_ND.shape[0], columns):
            inside = slice(start, start + columns)
            s_RC = _logits(scaled_RD, v_ND[inside], tile)
            _diagonal(s_RC, first - start).fill_(-torch.inf)
            if self._rank_R is not None:
                self._rank_R += (~(s_RC < bar_R1)).sum(1)  # NaN ranks last; positives are -inf
            if not self._bounded:
                higher_R = torch.maximum(self._reference_R, s_RC.amax(1))
                self._sums *= (self._reference_R - higher_R).exp_()[:, None]
                s_RC -= higher_R[:, None]
                self._reference_R = higher_R
            self._sums.addmm_(s_RC.exp_(), values[inside])

    def finish(self) -> _Rows:
        """Bring in the positive: loss, share of the negatives, gradient of the unit queries.

        It overwrites the sums.
        """
        D, temperature = self._u_RD.shape[1], self._request.temperature
        own_R, negatives_R = self._own_R, self._sums[:, -ONES]
        # Log of all negatives over the positive.
        odds_R = negatives_R.log() + self._reference_R - own_R
        loss_R = torch.logaddexp(odds_R, torch.zeros_like(odds_R))
        share_R = odds_R.sigmoid()
        if not self._request.gradient:
            return _Rows(loss_R, own_R + loss_R, share_R, None, None, self._rank_R)

        # Without negatives (one key) the sums are zero, and so is the share.
        some_R = torch.where(negatives_R > 0, negatives_R, torch.ones_like(negatives_R))
        mean_RD = self._sums[:, :D].div_(some_R[:, None])
        dq_RD = mean_RD.sub_(self._positive_RD).mul_(share_R[:, None])
        dtemperature_R = (self._u_RD * dq_RD).sum(1) * (-1 / (temperature * temperature))
        return _Rows(loss_R, own_R + loss_R, share_R, dq_RD, dtemperature_R, self._rank_R)


def _logits(scaled_RD: Tensor, v_CD: Tensor, tile: Tensor) -> Tensor:
    """One tile of logits, in memory shared by all tiles."""
    R, C = scaled_RD.shape[0], v_CD.shape[0]
    return torch.mm(scaled_RD, v_CD.T, out=tile[: R * C].view(R, C))


def _diagonal(tile_RC: Tensor, offset: int) -> Tensor:
    """The elements (r, offset + r) of a tile, its positives; empty where there are none."""
    R, C = tile_RC.shape
    return tile_RC.diagonal(offset) if -R < offset < C else tile_RC.new_empty(0)


def _key_pass(
    u_BD: Tensor,
    v_ND: Tensor,
    lse_B: Tensor,
    share_B: Tensor,
    request: Request,
    tile: Tensor,
    sizes: tuple[int, int],
) -> Tensor:
    """[N, D] `sum_i (p_ij - [j is the positive of i]) u_i`, after the rows' sums are final."""
    (rows, columns), first = sizes, request.positive_offset
    dv_ND = torch.zeros_like(v_ND)
    for row in range(0, u_BD.shape[0], rows):
        u_RD, lse_R1 = u_BD[row : row + rows], lse_B[row : row + rows, None]
        scaled_RD = u_RD / request.temperature
        for column in range(0, v_ND.shape[0], columns):
            v_CD = v_ND[column : column + columns]
            p_RC = _logits(scaled_RD, v_CD, tile).sub_(lse_R1).exp_()
            _diagonal(p_RC, first + row - column).zero_()
            dv_ND[column : column + columns].addmm_(p_RC.T, u_RD)
    dv_ND[first : first + u_BD.shape[0]].addcmul_(share_B[:, None], u_BD, value=-1)
    return dv_ND
