"""The k most similar bank rows of each query, over a bank that comes block by block.

Most blocks of a large bank contain no neighbour of most queries. After each product of queries and
bank rows, only the largest similarity of each group of rows is compared with the query's k-th best
so far; the few groups that exceed it are looked at element by element.
"""

from __future__ import annotations

import torch
from torch import Tensor

LIMIT_BYTES = 256 * 2**20
"""Largest temporary tensor."""

_CACHED_BYTES = 16 * 2**20
"""Similarities at a time on a CPU: larger products leave its cache and are slower."""
_GROUP = 64
"""Bank rows that are compared with a threshold at once."""
_BANK_ROWS = 4096
_BYTES_OF_CANDIDATE = 64
"""While candidates are merged: positions, similarities, and two sorts."""


class Nearest:
    """The neighbours of some queries so far, best first; among equals, the smaller index first.

    Args:
        queries: [m, D] unit rows, float32 or float64.
        k: neighbours of each query.
        limit_bytes: largest temporary tensor. A product has at least one query and one bank row.

    Attributes:
        similar: [m, k] similarities, falling; -inf where fewer than k rows were offered.
        index: [m, k] int64; `MISSING` where fewer than k rows were offered.
        block_rows: bank rows that `offer` should get at a time.

    Numerics: exact search. Which rows are found depends on their similarities alone, not on blocks;
    the last bit of a similarity may depend on the shape of the product.
    """

    MISSING = 2**62
    """The index of no row."""

    def __init__(self, queries: Tensor, k: int, *, limit_bytes: int = LIMIT_BYTES) -> None:
        self.k = k
        self.similar = queries.new_full((len(queries), k), -torch.inf)
        self.index = torch.full(
            (len(queries), k), self.MISSING, dtype=torch.int64, device=queries.device
        )
        self._queries = queries

        # Shapes of a product: a block of the bank within the limit, in whole groups if possible.
        size = queries.dtype.itemsize
        cached = limit_bytes if queries.device.type == "cuda" else min(limit_bytes, _CACHED_BYTES)
        most = min(cached // size, limit_bytes // (size * max(queries.shape[1], 1)))
        most = max(1, min(most, _BANK_ROWS))
        self._group = _GROUP if most >= _GROUP else 1
        self.block_rows = most - most % self._group

        # As many queries as fit, also while k neighbours of each are merged with candidates.
        self._candidates = max(1, limit_bytes // _BYTES_OF_CANDIDATE)
        self._query_rows = max(
            1, min(cached // (size * self.block_rows), self._candidates // (4 * k), len(queries))
        )
        self._product = queries.new_empty(self._query_rows * self.block_rows)

    def offer(self, block: Tensor, first: int) -> None:
        """Take the rows of a block of the bank into account.

        Args:
            block: [b, D] unit rows with b <= `block_rows`.
            first: index of its first row, larger than that of every row offered before.
        """
        for start in range(0, len(self._queries), self._query_rows):
            stop = min(start + self._query_rows, len(self._queries))
            similar = self._similarities(self._queries[start:stop], block)
            self._take(similar, self.similar[start:stop], self.index[start:stop], first)

    def _similarities(self, queries: Tensor, block: Tensor) -> Tensor:
        """[q, g, group] similarities; the last group is filled up with -inf."""
        rows = -(-len(block) // self._group) * self._group
        product = self._product[: len(queries) * rows].view(len(queries), rows)
        torch.mm(queries, block.T, out=product[:, : len(block)])
        product[:, len(block) :] = -torch.inf
        return product.view(len(queries), -1, self._group)

    def _take(self, similar: Tensor, best: Tensor, index: Tensor, first: int) -> None:
        """Merge the similarities [q, g, group] of a block into the neighbours [q, k], in place."""
        largest = similar.amax(2)
        groups = largest.shape[1]
        narrow = min(self._candidates, max(16 * self.k, 4 * _GROUP) * len(best))
        pending = [(0, groups)]
        while pending:
            left, right = pending.pop()
            # A row that only equals the k-th best has the larger index and loses.
            floor = best[:, -1:]
            row, group = (largest[:, left:right] > floor).nonzero(as_tuple=True)

            # Many candidates, as in the first block: the k-th largest of all groups is a bound, too.
            if len(row) * self._group > narrow and right - left >= self.k:
                bound = largest[:, left:right].topk(self.k, dim=1).values[:, -1:]
                # Rows that equal the bound may be neighbours.
                below = torch.nextafter(bound, torch.full_like(bound, -torch.inf))
                floor = torch.maximum(floor, below)
                row, group = (largest[:, left:right] > floor).nonzero(as_tuple=True)

            # Still many: one half first, whose neighbours raise the threshold of the other.
            if len(row) * self._group > narrow and right - left > 1:
                middle = (left + right) // 2
                pending += [(middle, right), (left, middle)]
            elif len(row):
                self._merge(similar, best, index, floor, row, group + left, first)

    def _merge(
        self,
        similar: Tensor,
        best: Tensor,
        index: Tensor,
        floor: Tensor,
        row: Tensor,
        group: Tensor,
        first: int,
    ) -> None:
        """Merge what exceeds the floor [q, 1] in some groups of some queries into [q, k]."""
        # The candidates: query, similarity and index, by query and rising index.
        members = similar[row, group]
        hit, member = (members > floor[row]).nonzero(as_tuple=True)
        query = row[hit]
        offered = group[hit] * self._group + member + first
        changed = torch.unique_consecutive(query)

        # Those after the neighbours so far, whose indices are smaller; two stable sorts then order
        # by query, by similarity, and among equals by index.
        value = torch.cat([best[changed].flatten(), members[hit, member]])
        which = torch.cat([index[changed].flatten(), offered])
        owner = torch.cat([changed.repeat_interleave(self.k), query])
        order = value.sort(descending=True, stable=True).indices
        order = order[owner[order].sort(stable=True).indices]

        # The first k of each query.
        begin = torch.searchsorted(owner[order], changed)
        kept = order[(begin[:, None] + torch.arange(self.k, device=begin.device)).flatten()]
        best[changed] = value[kept].view(-1, self.k)
        index[changed] = which[kept].view(-1, self.k)
