"""Weighted k-nearest-neighbour accuracy: scores frozen features without training.

Several ranks share the search by the bank. Each keeps its own part of the bank and finds the k
nearest rows of it for the queries of all ranks; a rank then merges what all ranks have found for
its own queries and counts their votes. To share the queries instead would take the same time, but
the whole bank on every rank. Shapes: n bank rows, m queries, D features, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from fastmoco.distributed import agree
from fastmoco.distributed.gather import exchange_rows, fill_parts_, gather_numbers
from fastmoco.distributed.mesh import group_rank, group_size
from fastmoco.evaluation.embed import LabelledRows
from fastmoco.evaluation.interface import Unmeasurable
from fastmoco.evaluation.nearest import LIMIT_BYTES, Nearest
from fastmoco.evaluation.rows import MemoryRows, Rows

Progress = Callable[[int, int], None]
"""Called with (done, total), in any unit."""

_SURVEY_BYTES = 4 * 2**20
"""Rows that are checked at a time."""


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    center: bool = False,
    limit_bytes: int = LIMIT_BYTES,
) -> float:
    """Share of queries that their k most similar bank rows classify correctly.

    A neighbour with cosine similarity s votes with weight exp(s / temperature). The class with the
    largest sum wins; on a tie, the smaller label. Among equally similar rows, those of the smallest
    index are neighbours. Source: Wu et al. 2018 (instance discrimination), section 3.4, as DINO
    uses it.

    Args:
        bank: [n, D] features of labelled images, any floating dtype, any device.
        bank_labels: [n] int64, >= 0.
        queries: [m, D] features to classify, m >= 1.
        query_labels: [m] int64.
        k: neighbours that vote; all n if the bank is smaller.
        temperature: > 0; small values give the nearest neighbours most of the weight.
        center: subtract the bank's mean from both sets first. Helps features with a large common
            part, such as those of an untrained network or raw pixels. Report with which setting a
            figure was measured.
        limit_bytes: largest temporary tensor.

    Returns:
        Accuracy in [0, 1].

    Raises:
        ValueError: if shapes do not fit, labels are missing, or a number is out of range.

    Numerics: float32 throughout (float64 stays float64; the mean is summed in float64); exact
        search. The last bit of a similarity may depend on the shapes of the products, and so the
        order of neighbours that differ by no more.
    Memory and cost: the queries in this dtype or `limit_bytes`, whichever is less, and temporary
        tensors of at most `limit_bytes`; the bank is not copied. 2 * m * n * D FLOPs.
    Distributed: none; `shared_knn_accuracy` shares the work among ranks.
    """
    _require_tables(bank, bank_labels, queries, query_labels)
    sets = (
        LabelledRows(MemoryRows(bank.detach()), bank_labels),
        LabelledRows(MemoryRows(queries.detach()), query_labels),
    )
    search = _Search(*sets, k=k, center=center, device=bank.device, limit_bytes=limit_bytes)
    return search.accuracy(temperature)


def shared_knn_accuracy(
    bank: LabelledRows,
    queries: LabelledRows,
    *,
    device: torch.device,
    k: int = 20,
    temperature: float = 0.07,
    center: bool = False,
    limit_bytes: int = LIMIT_BYTES,
) -> float:
    """`knn_accuracy` of sets whose parts are on the ranks of the process group.

    Args:
        bank: this rank's part of the bank; may be empty. Parts are in rank order.
        queries: this rank's part of the queries; may be empty.
        device: of this rank, on which it computes and the process group communicates. The rows may
            be elsewhere: blocks of them are moved.
        k: as for `knn_accuracy`; and so are the others.

    Returns:
        The accuracy over all queries, the same on all ranks.

    Raises:
        ValueError: the same on all ranks, as of `knn_accuracy`.

    Numerics: as of `knn_accuracy`; the number of ranks changes shapes of products.
    Memory and cost: the queries of all ranks or `limit_bytes`, whichever is less, and temporary
        tensors of at most `limit_bytes`; 2 * m * n * D / R FLOPs.
    Distributed: collective. One all_gather of a few numbers; for each part of the queries that fits
        into `limit_bytes`, broadcasts of m * D values and all_to_all of m * k neighbours; one
        all_reduce of counts.
    """
    search = _Search(
        bank, queries, k=k, center=center, device=device, limit_bytes=limit_bytes, shared=True
    )
    return search.accuracy(temperature)


@dataclass(frozen=True, slots=True, kw_only=True)
class KnnCount:
    """The outcome for one number of neighbours and one temperature.

    Attributes:
        k: neighbours that vote.
        temperature: of their votes.
        right: queries that are classified correctly.
        queries: their number.
    """

    k: int
    temperature: float
    right: int
    queries: int

    @property
    def accuracy(self) -> float:
        """In [0, 1]."""
        return self.right / self.queries


def shared_knn_sweep(
    bank: LabelledRows,
    queries: LabelledRows,
    *,
    device: torch.device,
    ks: Sequence[int],
    temperatures: Sequence[float],
    center: bool = False,
    limit_bytes: int = LIMIT_BYTES,
    progress: Progress | None = None,
) -> list[KnnCount]:
    """`shared_knn_accuracy` of every pair of `ks` and `temperatures`, with one search.

    The neighbours are found for the largest k. Those of a smaller k are the first of them, with the
    same ties.

    Args:
        bank: as for `shared_knn_accuracy`; and so are the others.
        ks: numbers of neighbours, at least one.
        temperatures: at least one.
        progress: of the search, on this rank.

    Returns:
        For each k, in the order given, each temperature; the same on all ranks.

    Numerics: as of `knn_accuracy`; the largest k changes shapes of products.
    """
    require_votes(ks, temperatures)
    search = _Search(
        bank,
        queries,
        k=max(ks),
        center=center,
        device=device,
        limit_bytes=limit_bytes,
        shared=True,
        progress=progress,
    )
    return search.counts([(k, temperature) for k in ks for temperature in temperatures])


def shared_neighbours(
    bank: LabelledRows,
    queries: LabelledRows,
    *,
    device: torch.device,
    k: int,
    center: bool = False,
    limit_bytes: int = LIMIT_BYTES,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """The neighbours of this rank's queries among the bank rows of all ranks.

    Args:
        bank: as for `shared_knn_accuracy`; and so are the others.
        progress: of the search, on this rank.

    Returns:
        Cosine similarities [m, k], falling, and indices [m, k] int64 into the bank of all ranks;
        with min(k, n) columns.
    """
    search = _Search(
        bank,
        queries,
        k=k,
        center=center,
        device=device,
        limit_bytes=limit_bytes,
        shared=True,
        progress=progress,
    )
    found = [(similar.cpu(), index.cpu()) for _, similar, index, _ in search]
    similar, index = zip(*found, strict=True)
    return torch.cat(similar), torch.cat(index)


@dataclass(frozen=True, slots=True)
class _Facts:
    """What is known of a set before the search; the same on all ranks."""

    name: str
    counts: list[int]
    labels: list[int]
    widths: list[int]
    missing: int
    infinite: int
    doubles: bool

    @property
    def rows(self) -> int:
        return sum(self.counts)

    def check(self) -> None:
        """Refuse a set that cannot vote or be classified."""
        if not self.rows:
            raise Unmeasurable(f"{self.name}: has no rows")
        for rows, labels in zip(self.counts, self.labels, strict=True):
            if rows != labels:
                raise ValueError(f"{self.name}: {rows} rows with labels of shape ({labels},)")
        if self.missing:
            raise ValueError(
                f"{self.name}: {self.missing} of {self.rows} rows have no label; "
                f"kNN needs a labelled set"
            )
        if self.infinite:
            raise Unmeasurable(f"{self.name}: features are not finite; the encoder has diverged")


class _Search:
    """The neighbours of this rank's queries, in rounds whose queries fit into memory.

    Iterating gives (rows, similar [q, k], index [q, k], label [q, k]) of each round, for a slice of
    this rank's queries; every rank has the same number of rounds.
    """

    def __init__(
        self,
        bank: LabelledRows,
        queries: LabelledRows,
        *,
        k: int,
        center: bool,
        device: torch.device,
        limit_bytes: int,
        shared: bool = False,
        progress: Progress | None = None,
    ) -> None:
        if k < 1:
            raise ValueError(f"k={k}: must be at least 1")
        self._progress = progress
        self._ranks = group_size() if shared else 1
        self._rank = group_rank() if shared else 0
        self._bank = bank
        self._queries = queries
        self._device = device
        self._limit_bytes = limit_bytes

        # All ranks learn the facts of all parts first, so that all refuse or none does.
        self._facts = self._survey("bank", bank), self._survey("queries", queries)
        widths = {width for facts in self._facts for width in facts.widths if width}
        if len(widths) > 1:
            shapes = [(facts.rows, max(facts.widths)) for facts in self._facts]
            raise ValueError(f"bank {shapes[0]}, queries {shapes[1]}: needs [n, D] and [m, D]")
        for facts in self._facts:
            facts.check()
        self._width = max(widths, default=0)
        self._k = min(k, self._facts[0].rows)
        self._dtype = torch.float64 if self._facts[0].doubles else torch.float32
        self._mean = self._bank_mean() if center else None

    def accuracy(self, temperature: float) -> float:
        """Share of the queries that the votes of their neighbours classify correctly."""
        return self.counts([(self._k, temperature)])[0].accuracy

    def counts(self, pairs: Sequence[tuple[int, float]]) -> list[KnnCount]:
        """Queries that are classified correctly, for each pair of k, at most that of the search,
        and temperature."""
        require_votes(*zip(*pairs, strict=True))
        right = torch.zeros(len(pairs), dtype=torch.int64, device=self._device)
        for rows, similar, _, label in self:
            wanted = self._queries.labels[rows].to(self._device)
            for number, (k, temperature) in enumerate(pairs):
                first = similar[:, :k], label[:, :k]
                right[number] += (_winners(*first, temperature, self._limit_bytes) == wanted).sum()
        if self._ranks > 1:
            agree.total(right)
        return [
            KnnCount(k=k, temperature=temperature, right=count, queries=self._facts[1].rows)
            for (k, temperature), count in zip(pairs, right.tolist(), strict=True)
        ]

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        counts = self._facts[1].counts
        size = self._dtype.itemsize
        # The table of queries, and that of their neighbours before and after the exchange.
        row_bytes = max(size * self._width, 2 * self._k * (size + 16), 1)
        rounds = -(-sum(counts) // max(1, self._limit_bytes // row_bytes))
        for number in range(rounds):
            ends = [(count * number // rounds, count * (number + 1) // rounds) for count in counts]
            rows = slice(*ends[self._rank])
            sizes = [stop - start for start, stop in ends]
            # The queries are released before the neighbours are exchanged.
            similar, index = self._search_part(self._gather_queries(rows, sizes), number, rounds)
            yield rows, *self._merge(similar, index, sizes)

    def _survey(self, name: str, part: LabelledRows) -> _Facts:
        """Look at every row and label of this rank, and exchange what was found."""
        rows, labels = part.rows, part.labels
        finite = all(bool(block.isfinite().all()) for block in self._blocks(rows))
        mine = [
            len(rows),
            len(labels) if labels.ndim == 1 else -1,
            rows.width if len(rows) else 0,
            int((labels < 0).sum()),
            int(not finite),
            int(rows.dtype == torch.float64 and len(rows) > 0),
        ]
        numbers = torch.tensor(mine, dtype=torch.int64, device=self._device)
        table = gather_numbers(numbers) if self._ranks > 1 else numbers[None]
        counts, labelled, widths, missing, infinite, doubles = table.T.tolist()
        return _Facts(
            name, counts, labelled, widths, sum(missing), sum(infinite), bool(sum(doubles))
        )

    def _blocks(self, rows: Rows) -> Iterator[Tensor]:
        """All rows, some megabytes at a time."""
        row_bytes = 8 * max(1, rows.width)  # as float64
        step = max(1, min(self._limit_bytes, _SURVEY_BYTES) // row_bytes)
        for start in range(0, len(rows), step):
            yield rows.block(start, min(start + step, len(rows)))

    def _bank_mean(self) -> Tensor:
        """The mean [D] of the bank of all ranks, summed in float64."""
        total = torch.zeros(self._width, dtype=torch.float64)
        for block in self._blocks(self._bank.rows):
            total += block.sum(0, dtype=torch.float64).cpu()
        total = total.to(self._device)
        if self._ranks > 1:
            agree.total(total)
        return (total / self._facts[0].rows).to(self._dtype)

    def _prepare_(self, table: Tensor, rows: Tensor) -> Tensor:
        """Write rows into a table of this dtype and device, centred and of unit length."""
        table.copy_(rows)
        if self._mean is not None:
            table -= self._mean
        # As torch.nn.functional.normalize, in place.
        table /= torch.linalg.vector_norm(table, dim=1, keepdim=True).clamp_min(1e-12)
        return table

    def _gather_queries(self, rows: slice, counts: Sequence[int]) -> Tensor:
        """Unit queries of one round, of all ranks, in rank order."""
        table = torch.empty(sum(counts), self._width, dtype=self._dtype, device=self._device)
        if counts[self._rank]:
            mine = torch.split(table, list(counts))[self._rank]
            self._prepare_(mine, self._queries.rows.block(rows.start, rows.stop))
        if self._ranks > 1:
            fill_parts_(table, counts)
        return table

    def _search_part(self, queries: Tensor, number: int, rounds: int) -> tuple[Tensor, Tensor]:
        """Similarities and indices of the neighbours of the queries of a round in this rank's part
        of the bank."""
        nearest = Nearest(queries, self._k, limit_bytes=self._limit_bytes)
        rows = self._bank.rows
        table = queries.new_empty(min(nearest.block_rows, len(rows)), self._width)
        for start in range(0, len(rows), nearest.block_rows):
            stop = min(start + nearest.block_rows, len(rows))
            block = self._prepare_(table[: stop - start], rows.block(start, stop))
            nearest.offer(block, start)
            if self._progress is not None:
                self._progress(number * len(rows) + stop, rounds * len(rows))
        return nearest.similar, nearest.index

    def _merge(
        self, similar: Tensor, index: Tensor, counts: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """For this rank's queries: similarities, indices and labels of the neighbours among the
        bank rows of all ranks."""
        if len(self._bank.labels):
            labels = self._bank.labels.to(self._device)
            label = labels[index.clamp(max=len(labels) - 1)]
        else:
            label = torch.zeros_like(index)
        if self._ranks == 1:
            return similar, index, label
        first = list(accumulate(self._facts[0].counts, initial=0))[self._rank]
        index[index != Nearest.MISSING] += first

        # In rank order, so that a stable sort puts the smaller index first among equals.
        similar, index, label = (
            exchange_rows(found, counts).transpose(0, 1).flatten(1)
            for found in (similar, index, label)
        )
        order = similar.sort(dim=1, descending=True, stable=True).indices[:, : self._k]
        return similar.gather(1, order), index.gather(1, order), label.gather(1, order)


def require_votes(ks: Sequence[int], temperatures: Sequence[float]) -> None:
    """Refuse no numbers, and numbers out of range.

    Raises:
        ValueError: naming the number and the rule.
    """
    for name, given in (("k", ks), ("temperature", temperatures)):
        if not given:
            raise ValueError(f"{name}={tuple(given)}: needs at least one number")
    for k in ks:
        if k < 1:
            raise ValueError(f"k={k}: must be at least 1")
    for temperature in temperatures:
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}: must be positive")


def _winners(similar: Tensor, label: Tensor, temperature: float, limit_bytes: int) -> Tensor:
    """[m] labels with the largest sum of weights among the neighbours [m, k] of each query."""
    # Relative to the nearest neighbour, so that exp never overflows; the common factor changes no
    # winner.
    winners = torch.empty(len(label), dtype=torch.int64, device=label.device)
    step = max(1, limit_bytes // (64 * label.shape[1]))
    for start in range(0, len(label), step):
        part = slice(start, start + step)
        weights = ((similar[part] - similar[part, :1]) / temperature).exp()

        # The classes of each query's neighbours, numbered by rising label: at most k of them.
        ordered, order = label[part].sort(dim=1, stable=True)
        number = torch.zeros_like(ordered)
        number[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(1)
        slot = torch.empty_like(number).scatter_(1, order, number)

        # Weights are added in the order of the neighbours.
        votes = torch.zeros_like(weights).scatter_add_(1, slot, weights)
        classes = torch.zeros_like(ordered).scatter_(1, number, ordered)
        winners[part] = classes.gather(1, votes.argmax(1, keepdim=True))[:, 0]
    return winners


def _require_tables(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor
) -> None:
    """Refuse tensors of other shapes than [n, D], [n], [m, D] and [m]."""
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1]:
        raise ValueError(
            f"bank {tuple(bank.shape)}, queries {tuple(queries.shape)}: needs [n, D] and [m, D]"
        )
    for name, rows, labels in (("bank", bank, bank_labels), ("queries", queries, query_labels)):
        if len(rows) and labels.shape != rows.shape[:1]:
            raise ValueError(f"{name}: {len(rows)} rows with labels of shape {tuple(labels.shape)}")
