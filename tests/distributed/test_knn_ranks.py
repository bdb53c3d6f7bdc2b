"""kNN over parts of a bank on one to four real processes: the neighbours and the accuracy of the
plain formula."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from fastmoco.evaluation.reference import plain_knn_accuracy, plain_neighbours
from tests.distributed.launching import launch
from tests.distributed.run_knn import ALONE, SETS

MONITORED = (1, 3)
"""Numbers of ranks of the monitors."""
EXACT = [name for name, sets in SETS.items() if sets.bank.dtype != torch.float64]


@pytest.fixture(scope="module")
def of_size(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, Any]]]:
    """Starts so many ranks once: all searches, and on one and three ranks the monitors too."""

    @functools.cache
    def started(size: int) -> list[dict[str, Any]]:
        out = tmp_path_factory.mktemp("knn")
        cases = [*SETS, "refused"]
        if size in MONITORED and find_spec("webdataset"):
            from fastmoco_pipelines import pack_digits

            pack_digits(out, seed=0)
            cases += ["monitor", "accuracy"]
        return launch(size, out, *cases, module="tests.distributed.run_knn")

    return started


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(1, id="1 rank"),
        pytest.param(2, id="2 ranks"),
        pytest.param(3, id="3 ranks", marks=pytest.mark.slow),
        pytest.param(4, id="4 ranks", marks=pytest.mark.slow),
    ],
)
def ranks(
    request: pytest.FixtureRequest, of_size: Callable[[int], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Results of all searches, once a world size."""
    return of_size(request.param)


@pytest.mark.slow
def test_all_ranks_call_the_same_collectives(tmp_path: Path) -> None:
    """torch compares every collective over the ranks, which takes many times the search."""
    names = ("an empty part", "small blocks and several rounds", "refused")
    launch(2, tmp_path, *names, module="tests.distributed.run_knn", debug="DETAIL")


@pytest.mark.parametrize("name", SETS)
def test_neighbours_and_accuracy_are_those_of_the_plain_formula(
    ranks: list[dict[str, Any]], name: str
) -> None:
    sets = SETS[name]
    similar, index = plain_neighbours(sets.bank, sets.queries, k=sets.k, center=sets.center)
    found = {key: torch.cat([rank[name][key] for rank in ranks]) for key in ("similar", "index")}
    assert torch.equal(found["index"], index)
    tolerance = 0.0 if name in EXACT else 1e-14
    assert (found["similar"] - similar).abs().max() <= tolerance

    tables = sets.bank, sets.bank_labels, sets.queries, sets.query_labels
    accuracy = plain_knn_accuracy(*tables, k=sets.k, center=sets.center)
    assert [rank[name]["accuracy"] for rank in ranks] == [accuracy] * len(ranks)
    for rank in ranks:
        assert rank[name]["swept"] == ranks[0][name]["swept"]
        assert [rank[name]["swept"][pair] for pair in ALONE] == rank[name]["alone"]


def test_these_sets_can_tell_mistakes_apart() -> None:
    """The tied sets have ties at the border of the k nearest; centring, k and the temperature change
    an answer."""
    for name in ("ties", "rows repeated on all ranks"):
        sets = SETS[name]
        similar, _ = plain_neighbours(sets.bank, sets.queries, k=sets.k + 1)
        assert (similar[:, -1] == similar[:, -2]).any()
    plain, centred = SETS["ragged"], SETS["centred"]
    found = [
        plain_neighbours(sets.bank, sets.queries, k=20, center=sets.center)[1]
        for sets in (plain, centred)
    ]
    assert not torch.equal(*found)
    tables = plain.bank, plain.bank_labels, plain.queries, plain.query_labels
    pairs = {(1, 0.07), (7, 0.07), (20, 0.07), (20, 1.0)}
    assert len({plain_knn_accuracy(*tables, k=k, temperature=t) for k, t in pairs}) == len(pairs)


def test_all_ranks_refuse_in_the_same_words(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["refused"] == ranks[0]["refused"]
    words = cast("dict[str, str]", ranks[0]["refused"])
    assert words["bank not finite"] == ("bank: features are not finite; the encoder has diverged")
    assert words["queries not finite"].startswith("queries: features are not finite")
    assert words["no label"] == "bank: 4 of 211 rows have no label; kNN needs a labelled set"
    assert " rows with labels of shape (" in words["labels cut off"]
    assert "needs [n, D] and [m, D]" in words["widths"]
    assert words["no bank"] == "bank: has no rows"
    assert words["no queries"] == "queries: has no rows"


@pytest.mark.slow
def test_the_monitor_gives_one_figure_on_any_number_of_ranks(
    of_size: Callable[[int], list[dict[str, Any]]],
) -> None:
    """In memory and in files, with each set opened once."""
    pytest.importorskip("webdataset", reason="webdataset is not installed")
    figures = set()
    accuracies: list[dict[str, float]] = []
    for count in MONITORED:
        for results in of_size(count):
            monitor = cast("dict[str, Any]", results["monitor"])
            figures |= set(monitor["figures"])
            assert monitor["opened"] == 2
            accuracies.append(cast("dict[str, float]", results["accuracy"]))
    assert len(figures) == 1
    assert 0.2 < figures.pop() < 1.0

    # Whole numbers are added, so the accuracy of a classifier is exactly the same.
    assert accuracies == accuracies[:1] * 4
    assert accuracies[0]["classified"] == 360
    assert 0.0 < accuracies[0]["top1"] < accuracies[0]["top5"] < 1.0
