"""Stacked linear classifiers: each equals the one that torch trains alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastmoco.evaluation.linear import (
    LinearSettings,
    LinearState,
    Pair,
    Scores,
    best_pair,
    held_out,
    initial_state,
    score_linear,
    train_linear,
)
from fastmoco.evaluation.reference import plain_linear

CLASSES, WIDTH = 7, 16
CPU = torch.device("cpu")
SETTINGS = LinearSettings(epochs=4, batch_size=64, seed=3)
PAIRS = [Pair(0.03, 0.0), Pair(1.0, 0.0), Pair(1.0, 0.1), Pair(3.0, 1e-3)]


class Drawn:
    """Noisy labelled features; an odd epoch shows them shifted."""

    def __init__(self, rows: int, seed: int = 0) -> None:
        draws = torch.Generator().manual_seed(seed)
        truth = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(99))
        self.features = torch.randn(rows, WIDTH, generator=draws)
        noise = 2 * torch.randn(rows, CLASSES, generator=draws)
        self.labels = (self.features @ truth.T + noise).argmax(dim=1)

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, index: Tensor, epoch: int | None = None) -> Tensor:
        return self.features[index]


def trained(table: Drawn, pairs: list[Pair], settings: LinearSettings = SETTINGS) -> LinearState:
    start = initial_state(len(pairs), CLASSES, WIDTH, settings, CPU)
    return train_linear(table, pairs, settings, start)


# 250 images: the last batch of an epoch is smaller, and counts with its own mean.
def test_each_classifier_of_a_stack_is_the_one_that_torch_trains_alone() -> None:
    table = Drawn(250)
    state = trained(table, PAIRS)
    for number, pair in enumerate(PAIRS):
        plain = plain_linear(table.features, table.labels, CLASSES, pair, SETTINGS)
        torch.testing.assert_close(state.weight[number].double(), plain.weight, atol=2e-6, rtol=0)
        torch.testing.assert_close(state.bias[number].double(), plain.bias, atol=2e-6, rtol=0)

        alone = trained(table, [pair])
        torch.testing.assert_close(state.weight[number], alone.weight[0], atol=2e-6, rtol=0)

    # What this can tell apart: a pair, a decay, an epoch, the order, the scale by the batch.
    assert (state.weight[1] - state.weight[2]).abs().max() > 1e-3
    for other in (
        replace(SETTINGS, epochs=5),
        replace(SETTINGS, seed=4),
        replace(SETTINGS, batch_size=63),
    ):
        assert (trained(table, PAIRS, other).weight - state.weight).abs().max() > 1e-3


def test_the_rate_is_scaled_by_the_batch_and_falls_by_epochs() -> None:
    official = LinearSettings(epochs=90, batch_size=1024)
    assert official.rate(3.0, 0) == 12.0
    assert official.rate(0.1, 45) == pytest.approx(0.2)
    assert official.rate(3.0, 89) == pytest.approx(6 * (1 + math.cos(math.pi * 89 / 90)))


def test_training_continues_from_any_epoch_bit_for_bit() -> None:
    table = Drawn(250)
    kept: list[dict[str, Tensor]] = []

    def keep(state: LinearState) -> None:
        names = ("weight", "bias", "weight_buffer", "bias_buffer")
        kept.append({name: getattr(state, name).clone() for name in names})

    start = initial_state(len(PAIRS), CLASSES, WIDTH, SETTINGS, CPU)
    whole = train_linear(table, PAIRS, SETTINGS, start, after_epoch=keep)
    again = train_linear(table, PAIRS, SETTINGS, LinearState(**kept[1], epoch=2))
    assert torch.equal(again.weight, whole.weight)
    assert torch.equal(again.bias, whole.bias)


def test_images_are_counted_by_the_place_of_their_class(monkeypatch: pytest.MonkeyPatch) -> None:
    test, state = Drawn(333, seed=1), trained(Drawn(250), PAIRS)
    found = score_linear(test, state)
    logits = torch.einsum("ne,pce->npc", test.features.double(), state.weight.double())
    order = (logits + state.bias.double()).topk(5, dim=2).indices == test.labels[:, None, None]
    assert found.top1.tolist() == order[:, :, 0].sum(dim=0).tolist()
    assert found.top5.tolist() == order.any(dim=2).sum(dim=0).tolist()
    assert 150 < found.top1.min() < found.top1.max() < found.top5.min() < 333

    # In blocks of few images.
    monkeypatch.setattr("fastmoco.evaluation.linear.BLOCK_ELEMENTS", 10 * len(PAIRS) * CLASSES)
    assert [part.tolist() for part in score_linear(test, state)[:2]] == [
        part.tolist() for part in found[:2]
    ]


def test_a_classifier_that_diverges_or_answers_all_classes_alike_is_never_right() -> None:
    table = Drawn(100)
    state = trained(table, [Pair(1.0, 0.0), Pair(1.0, 1e30), Pair(0.0, 0.0)])
    state.weight[2] = 0.0
    found = score_linear(table, state)
    assert found.top1.tolist()[1:] == [0, 0]
    assert found.top5.tolist()[1:] == [0, 0]
    assert found.loss.isfinite().tolist() == [True, False, True]
    assert best_pair(found) == 0
    with pytest.raises(ValueError, match="diverged; give lower ones with --lr"):
        best_pair(Scores(*(part[1:2] for part in found)))


def test_the_best_pair_has_the_most_images_and_then_the_lowest_loss() -> None:
    top1 = torch.tensor([3, 5, 5, 5])
    loss = torch.tensor([0.1, 0.7, 0.4, math.inf], dtype=torch.float64)
    assert best_pair(Scores(top1, top1, loss)) == 2


def test_held_out_images_are_spread_over_the_classes() -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)[torch.randperm(100)]
    chosen = held_out(labels, 0.1, seed=0)
    assert labels[chosen].bincount().tolist() == [6, 3, 1]
    assert not torch.equal(chosen, held_out(labels, 0.1, seed=1))
    assert torch.equal(chosen, held_out(labels, 0.1, seed=0))
    for few, share in ((labels, 1.0), (labels[:3], 0.1), (labels[:3], 0.9)):
        with pytest.raises(ValueError, match="on both sides"):
            held_out(few, share, seed=0)
