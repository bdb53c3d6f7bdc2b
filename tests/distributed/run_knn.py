"""Run by test_knn_ranks.py on several ranks: kNN over parts of a bank, and the monitor; results go
to OUT/rank<r>.pt."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from fastmoco.config import Config
from fastmoco.distributed import World
from fastmoco.evaluation import monitor as knn_monitor
from fastmoco.evaluation.accuracy import AccuracyMonitor
from fastmoco.evaluation.embed import LabelledRows
from fastmoco.evaluation.knn import shared_knn_accuracy, shared_knn_sweep, shared_neighbours
from fastmoco.evaluation.monitor import KnnMonitor
from fastmoco.evaluation.rows import FileRows, MemoryRows, Rows
from fastmoco.objectives.build import build_objective
from fastmoco.recipes import quickstart_digits
from fastmoco.recipes.supervised import SupervisedConfig
from tests.distributed.cases import run_cases


@dataclass(frozen=True)
class Sets:
    """A bank and queries, how they are searched, and how they are shared out."""

    bank: Tensor
    bank_labels: Tensor
    queries: Tensor
    query_labels: Tensor
    k: int = 20
    center: bool = False
    limit_bytes: int = 2**28
    in_file: bool = False
    first_is_empty: bool = False
    """Whether rank 0 of several has no part of the bank."""


def signs(rows: int, seed: int, width: int = 16) -> Tensor:
    """Rows of plus and minus one: their similarities are exact in every dtype, and most tie."""
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (rows, width), generator=draws) * 2.0 - 1.0


def blobs(rows: int, seed: int, classes: int = 5) -> tuple[Tensor, Tensor]:
    """Noisy rows around a centre for each class, in float64: no similarities tie."""
    centres = torch.randn(classes, 16, generator=torch.Generator().manual_seed(99)).double() + 0.7
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (rows,), generator=draws)
    return centres[labels] + 2.5 * torch.randn(rows, 16, generator=draws).double(), labels


def labels_of(rows: int, classes: int = 7) -> Tensor:
    return torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(rows))


def ragged(queries: int = 97, **options: object) -> Sets:
    return replace(Sets(*blobs(211, 0), *blobs(queries, 1)), **options)  # type: ignore[arg-type]


def tied(rows: int, queries: int, **options: object) -> Sets:
    sets = Sets(signs(rows, 2), labels_of(rows), signs(queries, 3), labels_of(queries))
    return replace(sets, **options)  # type: ignore[arg-type]


def repeated() -> Sets:
    """The same 40 rows six times, which parts and blocks cut through."""
    bank = signs(40, 4).repeat(6, 1)
    return Sets(bank, labels_of(240), signs(31, 5), labels_of(31), k=13, limit_bytes=30_000)


SETS = {
    "ragged": ragged(),
    "centred": ragged(center=True),
    "small blocks and several rounds": ragged(49, limit_bytes=6_000),
    "in a file": ragged(49, in_file=True, limit_bytes=9_000),
    "in a file, centred": ragged(in_file=True, center=True),
    "an empty part": ragged(first_is_empty=True),
    "ties": tied(300, 50, k=25),
    "ties in small blocks": tied(300, 50, k=25, limit_bytes=10_000),
    "ties in half precision": replace(tied(300, 50), bank=signs(300, 2).bfloat16()),
    "rows repeated on all ranks": repeated(),
    "k above a part": tied(23, 9, k=15),
    "k above the bank": tied(23, 9, k=50),
    "more ranks than rows": tied(2, 1, k=5),
}


ALONE = (0, 3, 7)
"""Pairs of k and temperature of a sweep that are also searched alone, by their place in it."""


def my_part(sets: Sets, world: World) -> tuple[LabelledRows, LabelledRows]:
    """This rank's rows of both sets; without rows it does not know their width."""
    parts = []
    for rows, labels in ((sets.bank, sets.bank_labels), (sets.queries, sets.query_labels)):
        ranks, rank = world.world_size, world.rank
        if sets.first_is_empty and rows is sets.bank and ranks > 1:
            ranks, rank = ranks - 1, rank - 1
        part = slice(max(rank, 0) * len(rows) // ranks, (rank + 1) * len(rows) // ranks)
        mine, width = rows[part], rows.shape[1]
        stored: Rows = MemoryRows(mine if len(mine) else torch.empty(0, 0))
        if sets.in_file and len(mine):
            stored = FileRows(width, torch.float64, None)
            for some in mine.split(7):
                stored.append(some)
        parts.append(LabelledRows(stored, labels[part]))
    return parts[0], parts[1]


def run_search(world: World, name: str) -> dict[str, object]:
    sets = SETS[name]
    parts = my_part(sets, world)
    options = {
        "k": sets.k,
        "center": sets.center,
        "device": world.device,
        "limit_bytes": sets.limit_bytes,
    }
    similar, index = shared_neighbours(*parts, **options)  # type: ignore[arg-type]
    accuracy = shared_knn_accuracy(*parts, temperature=0.07, **options)  # type: ignore[arg-type]

    # A sweep in one search, and some pairs of it alone.
    del options["k"]
    ks, temperatures = [1, sets.k, 7, 500], [0.07, 1.0]
    swept = shared_knn_sweep(*parts, ks=ks, temperatures=temperatures, **options)  # type: ignore[arg-type]
    pairs = [(k, temperature) for k in ks for temperature in temperatures]
    alone = [
        shared_knn_accuracy(*parts, k=k, temperature=temperature, **options)  # type: ignore[arg-type]
        for k, temperature in (pairs[pair] for pair in ALONE)
    ]
    return {
        "similar": similar,
        "index": index,
        "accuracy": accuracy,
        "swept": [count.accuracy for count in swept],
        "alone": alone,
    }


def run_refused(world: World) -> dict[str, str]:
    """Faults of one rank alone; what every rank says of them."""
    last = world.rank == world.world_size - 1
    bank, queries = my_part(ragged(), world)
    words = {}

    def refuse(name: str, bank: LabelledRows, queries: LabelledRows) -> None:
        try:
            shared_knn_accuracy(bank, queries, device=world.device)
        except ValueError as error:
            words[name] = str(error)

    def changed(part: LabelledRows, value: float) -> LabelledRows:
        table = part.rows.block(0, len(part.rows)).clone()
        if last:
            table[3, 2] = value
        return LabelledRows(MemoryRows(table), part.labels)

    refuse("bank not finite", changed(bank, torch.nan), queries)
    refuse("queries not finite", bank, changed(queries, torch.inf))
    unlabelled = bank.labels.clone()
    if last:
        unlabelled[:4] = -1
    refuse("no label", LabelledRows(bank.rows, unlabelled), queries)
    cut = LabelledRows(bank.rows, bank.labels[:-1]) if last else bank
    refuse("labels cut off", cut, queries)
    narrow = LabelledRows(MemoryRows(torch.ones(5, 3)), torch.zeros(5, dtype=torch.int64))
    refuse("widths", narrow if last else bank, queries)
    nothing = LabelledRows(MemoryRows(torch.empty(0, 0)), torch.empty(0, dtype=torch.int64))
    refuse("no bank", nothing, queries)
    refuse("no queries", bank, nothing)
    return words


def digits_config(out: Path) -> Config:
    """A run on the digits that the test has packed into the folder of results."""
    config = quickstart_digits()
    return replace(
        config,
        precision="fp64",
        data=replace(config.data, shards=str(out / "train-*.tar")),
        knn=replace(config.knn, every_epochs=1, test_shards=str(out / "test-*.tar"), k=7),
    )


def run_monitor(world: World) -> dict[str, object]:
    """Two measurements of one monitor, with everything in memory, then in files; and the set is
    opened once."""
    config = digits_config(Path(sys.argv[1]))
    encoder = build_objective(config, world.device).encoder.double()
    opened: list[str] = []
    original = knn_monitor.ShardSet.open

    def counted(pattern: str, **options: object) -> object:
        opened.append(pattern)
        return original(pattern, **options)  # type: ignore[arg-type]

    limits: Iterator[int | None] = iter([None, None, 0, 0])
    with mock.patch.object(knn_monitor.ShardSet, "open", counted):
        monitor = KnnMonitor(
            config,
            world,
            threads=1,
            device="cpu",
            precision="fp64",
            memory_bytes=lambda: next(limits),
        )
        figures = [monitor.evaluate(encoder)["knn"] for _ in range(2)]
    monitor.close()
    return {"figures": figures, "opened": len(opened)}


def run_accuracy(world: World) -> dict[str, float]:
    """Both accuracies of a classifier with random weights."""
    base = digits_config(Path(sys.argv[1]))
    config = replace(
        base,
        objective=SupervisedConfig(classes=10),
        data=replace(base.data, view2=replace(base.data.view2, copies=0)),
    )
    objective = build_objective(config, world.device).double()
    monitor = AccuracyMonitor(config, world, threads=1, device="cpu", precision="fp64")
    figures = dict(monitor.evaluate(monitor.subject(objective)))
    monitor.close()
    return {**figures, "classified": monitor.classified}


CASES = {
    **{name: functools.partial(run_search, name=name) for name in SETS},
    "refused": run_refused,
    "monitor": run_monitor,
    "accuracy": run_accuracy,
}

if __name__ == "__main__":
    run_cases(CASES)
