"""Histograms of gradients: the counts are those of numpy, and what cannot be counted is left out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastmoco.telemetry.histograms import EDGES, MOST_VALUES, GradientHistograms


def found(gradients, places):
    histograms = GradientHistograms(every=1)
    histograms.take(gradients.items(), places)
    return histograms.fetched()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counts_are_those_of_numpy(device, dtype):
    torch.manual_seed(0)
    exponents = torch.randn(3, 700, device=device)
    first = (torch.randn(3, 700, device=device) * 10**exponents).to(dtype)
    second = torch.zeros(41, device=device, dtype=dtype)
    second[:2] = torch.tensor([1e3, -1e-12])  # beyond the outer edge, and below the inner one
    gradients = {"a": first, "b": second, "c": first}
    one = found(gradients, {"a": ("heads", "last_block"), "b": ("heads",)})
    assert set(one) == {"gradients/heads", "gradients/last_block"}
    for name, parts in (("heads", [first, second]), ("last_block", [first])):
        values = torch.cat([part.double().reshape(-1) for part in parts]).cpu().numpy()
        histogram = one[f"gradients/{name}"]
        counts, _ = np.histogram(values, histogram.edges)
        assert histogram.counts == counts.tolist()
        assert sum(histogram.counts) == values.size
        assert histogram.counts[0] > 0
        assert histogram.counts[-1] > 0
        assert histogram.total == pytest.approx(values.sum())
        assert histogram.squares == pytest.approx((values**2).sum())


def test_of_a_large_tensor_an_even_part_is_counted():
    values = torch.arange(3 * MOST_VALUES, dtype=torch.float32) + 1
    histogram = found({"a": values}, {"a": ("heads",)})["gradients/heads"]
    assert sum(histogram.counts) == MOST_VALUES
    assert histogram.edges[-1] == values[-3]
    assert histogram.total == pytest.approx(values[::3].double().sum().item())


def test_of_many_small_tensors_no_more_are_counted():
    names = [f"bias{number}" for number in range(70)]
    histograms = GradientHistograms(every=1)
    histograms.take(
        ((name, torch.full((1001,), 0.5)) for name in names), dict.fromkeys(names, ("heads",))
    )
    (found,) = histograms.fetched().values()
    assert sum(found.counts) == 70 * 1001 // 2 <= MOST_VALUES


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_a_place_with_a_value_that_is_not_finite_has_none(odd):
    one = found(
        {"a": torch.tensor([1.0, odd]), "b": torch.tensor([1.0])}, {"a": ("x",), "b": ("y",)}
    )
    assert set(one) == {"gradients/y"}


def test_without_gradients_there_is_none():
    assert found({}, {}) == {}
    assert found({"a": torch.zeros(0)}, {"a": ("x",)}) == {}


def test_zeros_are_between_the_innermost_edges():
    histogram = found({"a": torch.zeros(5)}, {"a": ("x",)})["gradients/x"]
    assert histogram.counts == [5.0]
    assert histogram.edges == [
        max(edge for edge in EDGES if edge < 0),
        min(e for e in EDGES if e > 0),
    ]


@pytest.mark.parametrize(("every", "steps"), [(0, []), (1, [0, 1, 2, 3, 4]), (3, [0, 3])])
def test_the_first_log_step_and_every_nth_has_one(every, steps):
    histograms = GradientHistograms(every=every)
    assert [step for step in range(5) if histograms.due()] == steps
