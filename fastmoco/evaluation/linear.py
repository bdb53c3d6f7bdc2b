"""Linear classifiers on fixed features: one for each pair of a learning rate and a weight decay,
all trained at once.

The classifiers are one stacked layer [P, C, E]. They see the same batches, so a step is one product
of the batch with all weights and one for all gradients: P pairs take little longer than one while
the features take longer to read than to multiply. SGD with momentum 0.9, a cosine per epoch without
warm-up, rates scaled by batch / 256, weights N(0, 0.01) and biases 0: the official protocol of
MoCo v3, whose accuracy this is to predict. L-BFGS finds the minimum of the regularised loss, which
for separable features is far from what 90 epochs of SGD without decay reach.

`reference.plain_linear` is the same training of one pair in plain torch.

Letters: B images of a batch, n of a set, E width, C classes, P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

SGD_MOMENTUM = 0.9
INITIAL_STD = 0.01
TOP = 5
"""The second accuracy counts an image as right if its class is among so many."""
BLOCK_ELEMENTS = 64 * 1024 * 1024
"""Logits that are computed at once when classifiers are scored."""


class Pair(NamedTuple):
    """Settings of one classifier."""

    lr: float
    """Learning rate for a batch of 256 images."""
    weight_decay: float


class Table(Protocol):
    """Labelled features that are too many to be on the device."""

    labels: Tensor
    """[n] int64 on the CPU."""

    def __len__(self) -> int: ...

    def rows(self, index: Tensor, epoch: int | None = None) -> Tensor:
        """Features [B, E] float32 of images [B], as an epoch shows them; None: without
        augmentation."""
        ...


@dataclass(frozen=True, kw_only=True)
class LinearSettings:
    """How long and in which order classifiers are trained.

    Attributes:
        epochs: passes over the features.
        batch_size: images of a step; the last one of an epoch may have fewer.
        seed: of the initial weights and of the order.
    """

    epochs: int = 90
    batch_size: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")

    def rate(self, lr: float, epoch: int) -> float:
        """The learning rate of a step in an epoch, from 0."""
        return lr * self.batch_size / 256 * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))

    def order(self, images: int, epoch: int) -> Tensor:
        """The images [n] of an epoch in their order."""
        generator = torch.Generator().manual_seed((self.seed << 20) + 1 + epoch)
        return torch.randperm(images, generator=generator)

    def initial_weight(self, classes: int, width: int) -> Tensor:
        """[C, E] float32 on the CPU."""
        generator = torch.Generator().manual_seed(self.seed << 20)
        return torch.randn(classes, width, generator=generator) * INITIAL_STD


@dataclass(frozen=True, kw_only=True)
class LinearState:
    """Classifiers after some epochs.

    Attributes:
        weight: [P, C, E] float32.
        bias: [P, C] float32.
        weight_buffer: SGD's, of the shape of `weight`.
        bias_buffer: SGD's, of the shape of `bias`.
        epoch: epochs done.
    """

    weight: Tensor
    bias: Tensor
    weight_buffer: Tensor
    bias_buffer: Tensor
    epoch: int = 0


def initial_state(
    pairs: int, classes: int, width: int, settings: LinearSettings, device: torch.device
) -> LinearState:
    """The same random classifier for every pair."""
    weight = settings.initial_weight(classes, width).to(device).repeat(pairs, 1, 1)
    bias = torch.zeros(pairs, classes, device=device)
    return LinearState(
        weight=weight,
        bias=bias,
        weight_buffer=torch.zeros_like(weight),
        bias_buffer=torch.zeros_like(bias),
    )


def train_linear(
    table: Table,
    pairs: Sequence[Pair],
    settings: LinearSettings,
    state: LinearState,
    *,
    after_epoch: Callable[[LinearState], None] = lambda state: None,
) -> LinearState:
    """Train one classifier for each pair, from a state on, which is changed in place.

    `g = X^T (softmax(X W^T + b) - onehot) / B + wd W`; `buffer = 0.9 buffer + g`;
    `W -= rate buffer`, as torch's SGD does it. The decay holds for the biases too.

    Args:
        table: the training features.
        pairs: P of them.
        settings: of all.
        state: of the pairs; its device is that of the computation.
        after_epoch: called with the state after each epoch.

    Returns:
        The state after the last epoch.

    Numerics: float32. The result of a pair depends on the others by rounding only, because the size
    of a product may change the order of its sums. A pair that diverges has weights that are not
    finite, which `score_linear` counts as wrong.
    Memory and cost: 3 tensors [P, C, E] and 2 [B, P, C]; 4 B P C E FLOPs a step.
    Distributed: none.
    """
    device = state.weight.device
    pair_count, classes, width = state.weight.shape
    # Decays and the views of all classifiers as one layer of P * C outputs.
    decay_P = torch.tensor([pair.weight_decay for pair in pairs], device=device)
    weight_NE = state.weight.view(-1, width)
    bias_N = state.bias.view(-1)
    rates = torch.tensor([pair.lr for pair in pairs], dtype=torch.float64)

    for epoch in range(state.epoch, settings.epochs):
        rate_P = (rates * settings.rate(1.0, epoch)).to(device, torch.float32)
        for index in torch.split(settings.order(len(table), epoch), settings.batch_size):
            x_BE = table.rows(index, epoch).to(device, non_blocking=True)
            labels_B = table.labels[index].to(device, non_blocking=True)

            # Gradient of the mean cross-entropy, in the memory of the logits.
            logits = torch.addmm(bias_N, x_BE, weight_NE.T).view(-1, pair_count, classes)
            error = logits.softmax(dim=2)
            error[torch.arange(len(index), device=device), :, labels_B] -= 1
            error_BN = error.div_(len(index)).view(len(index), -1)
            gradient = (error_BN.T @ x_BE).view_as(state.weight)
            bias_gradient = error_BN.sum(dim=0).view_as(state.bias)

            # SGD with momentum.
            gradient.addcmul_(state.weight, decay_P[:, None, None])
            bias_gradient.addcmul_(state.bias, decay_P[:, None])
            state.weight_buffer.mul_(SGD_MOMENTUM).add_(gradient)
            state.bias_buffer.mul_(SGD_MOMENTUM).add_(bias_gradient)
            state.weight.addcmul_(state.weight_buffer, rate_P[:, None, None], value=-1)
            state.bias.addcmul_(state.bias_buffer, rate_P[:, None], value=-1)
        state = LinearState(
            weight=state.weight,
            bias=state.bias,
            weight_buffer=state.weight_buffer,
            bias_buffer=state.bias_buffer,
            epoch=epoch + 1,
        )
        after_epoch(state)
    return state


class Scores(NamedTuple):
    """Results of P classifiers on a set."""

    top1: Tensor
    """[P] int64: images whose class has the highest logit."""
    top5: Tensor
    """[P] int64: images whose class is among the five highest."""
    loss: Tensor
    """[P] float64: mean cross-entropy; infinite where it is not finite."""


def score_linear(table: Table, state: LinearState) -> Scores:
    """Count the images of a set that each classifier gets right; both counts are on the CPU.

    An image is right in the top k if fewer than k other classes have a logit that is at least as
    large as its own. A logit that is not a number is never right.
    """
    device = state.weight.device
    pair_count, classes, width = state.weight.shape
    top1 = torch.zeros(pair_count, dtype=torch.int64, device=device)
    top5 = torch.zeros_like(top1)
    loss = torch.zeros(pair_count, dtype=torch.float64, device=device)
    block = max(1, BLOCK_ELEMENTS // (pair_count * classes))
    for index in torch.split(torch.arange(len(table)), min(block, 4096)):
        x_BE = table.rows(index).to(device)
        labels = table.labels[index].to(device)[:, None, None].expand(-1, pair_count, 1)
        logits = torch.addmm(state.bias.view(-1), x_BE, state.weight.view(-1, width).T)
        logits = logits.view(-1, pair_count, classes)
        own = logits.gather(2, labels)
        others = (~(logits < own)).sum(dim=2) - 1
        top1 += (others < 1).sum(dim=0)
        top5 += (others < TOP).sum(dim=0)
        loss += (logits.logsumexp(dim=2) - own[:, :, 0]).sum(dim=0, dtype=torch.float64)
    loss = (loss / len(table)).nan_to_num(math.inf, math.inf, math.inf)
    # With few classes every image would be in the top 5 of a classifier that has diverged.
    lost = ~loss.isfinite()
    top1[lost], top5[lost] = 0, 0
    return Scores(top1.cpu(), top5.cpu(), loss.cpu())


def best_pair(scores: Scores) -> int:
    """The pair with the highest top-1; among equals the one with the lowest loss.

    Raises:
        ValueError: if all pairs have diverged.
    """
    if not bool(scores.loss.isfinite().any()):
        raise ValueError("the classifiers of all rates have diverged; give lower ones with --lr")
    ranking = zip(scores.top1.tolist(), (-scores.loss).tolist(), strict=True)
    return max(enumerate(ranking), key=lambda item: item[1])[0]


def held_out(labels: Tensor, share: float, seed: int) -> Tensor:
    """Choose a share of the images [n], as evenly over the classes as possible; bool [n].

    Raises:
        ValueError: if the share is not in (0, 1), or leaves no image on one of both sides.
    """
    count = round(len(labels) * share)
    if not 0 < share < 1 or not 0 < count < len(labels):
        raise ValueError(
            f"holdout={share:g}: of {len(labels)} training images this holds out {count}; needs at "
            "least one image on both sides"
        )
    # Class by class in a random order, and of this every (1 / share)-th image.
    generator = torch.Generator().manual_seed((seed << 20) + 2**19)
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels[order].sort(stable=True).indices]
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[order[(2 * torch.arange(count) + 1) * len(labels) // (2 * count)]] = True
    return chosen
