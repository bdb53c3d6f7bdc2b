"""The loss in blocks that stay in the cache, in torch: any device.

A block is one view of a few images. Its log-softmax, the sum of the targets of the other views, the
value and the gradient are made one after the other in the same few buffers, so that of the size of
all logits nothing exists but the logits and their gradient. Where the logits are products of rows
and a weight, not even those: blocks of all views of some images are multiplied, replaced by their
gradient, and multiplied again.

Legend: V views, Q views with targets, B images, K outputs, D width of the rows; b images of a block.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastmoco_kernels.backends import accumulation_dtype
from fastmoco_kernels.soft_cross_entropy.reference import probabilities

CACHED_BYTES = {"cpu": 1 << 20}
"""One buffer of a block, by the type of the device; a few of them should fit in a core's cache."""
CACHED_BYTES_ELSEWHERE = 64 << 20
MULTIPLIED_BYTES = {"cpu": 64 << 20}
"""Logits of all views of a block of images, between two products. The gradient of the weight is
read and written once a block, so that many small blocks would cost more than the products."""
MULTIPLIED_BYTES_ELSEWHERE = 256 << 20


class Targets(NamedTuple):
    """What the views are compared with."""

    values: Tensor
    """[Q, B, K] probabilities; logits where there is a temperature."""
    centre: Tensor | None
    """[K], subtracted from the logits."""
    temperature: float | None
    """Divides the logits; None where the values are probabilities."""

    def of(self, images: slice) -> Targets:
        """Those of some images."""
        return self._replace(values=self.values[:, images])

    def probabilities(self, dtype: torch.dtype) -> Tensor:
        """[Q, B, K]."""
        return probabilities(self.values, self.centre, self.temperature, dtype)

    def others(self, view: int) -> int:
        """The number of targets that a view is compared with."""
        return len(self.values) - (view < len(self.values))


def images_of_block(device: torch.device, bytes_of_image: int, *, multiplied: bool) -> int:
    """Images of a block; a pure function of its arguments, because it decides an order of sums."""
    table = MULTIPLIED_BYTES if multiplied else CACHED_BYTES
    elsewhere = MULTIPLIED_BYTES_ELSEWHERE if multiplied else CACHED_BYTES_ELSEWHERE
    return max(1, table.get(device.type, elsewhere) // bytes_of_image)


def of_logits(
    logits: Tensor,
    targets: Targets,
    *,
    temperature: float,
    value: bool = True,
    gradient: Tensor | None = None,
    factor: float | Tensor = 1.0,
) -> Tensor:
    """The sum over images and pairs, and what its gradient is.

    Args:
        logits: [V, B, K] of any floating dtype.
        targets: those of the same images.
        temperature: divides the logits.
        value: whether the sum is wanted; else the result is 0.
        gradient: [V, B, K] filled with the gradient of the sum in the logits times `factor`; may be
            the logits themselves.
        factor: see `gradient`.

    Returns:
        Scalar, float64 on the CPU, else of the type of the arithmetic.
    """
    V, B, K = logits.shape
    dtype = accumulation_dtype(logits)
    device = logits.device
    size = min(B, images_of_block(device, K * dtype.itemsize, multiplied=False))
    scaled, log_shares, summed = (
        torch.empty((size, K), dtype=dtype, device=device) for _ in range(3)
    )
    total = torch.zeros((), dtype=torch.float64 if device.type == "cpu" else dtype, device=device)
    factor = factor / temperature

    for first in range(0, B, size):
        images = slice(first, first + size)
        shares = targets.of(images).probabilities(dtype)
        b = shares.shape[1]
        other: Tensor | None = None
        mass = shares
        for v in range(V):
            others = targets.others(v)
            if not others:
                if gradient is not None:
                    gradient[v, images] = 0
                continue
            # All views without targets of their own have the same.
            if other is None or v <= len(shares):
                other = _sum_of_others(shares, v, summed[:b])
                if gradient is not None and targets.temperature is None:
                    mass = other.sum(-1, keepdim=True)

            x = logits[v, images]
            if x.dtype != dtype:
                x = scaled[:b].copy_(x)
            if temperature != 1:
                x = torch.mul(x, 1 / temperature, out=scaled[:b])
            own = torch.log_softmax(x, -1, out=log_shares[:b])
            if value:
                total -= _inner_product(other, own, scaled[:b])
            if gradient is None:
                continue

            # Targets need not sum to 1: codes of SwAV may be 0 as a whole.
            own.exp_()
            if targets.temperature is None:
                own.mul_(mass).sub_(other)
                torch.mul(own, factor, out=gradient[v, images])
            else:
                own.sub_(other, alpha=1 / others)
                torch.mul(own, factor * others, out=gradient[v, images])
    return total


def of_rows(
    rows: Tensor,
    weight: Tensor,
    targets: Targets,
    *,
    temperature: float,
    row_gradient: bool,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean, and its gradients in float32 or wider, with `logits = rows weight^T`.

    Args:
        rows: [V, B, D].
        weight: [K, D].
        targets: see `Targets`.
        temperature: divides the logits.
        row_gradient: whether that of the rows is wanted.
        weight_gradient: whether that of the weight is wanted.

    Returns:
        Scalar, [V, B, D] and [K, D]; what is not wanted is empty.
    """
    V, B, D = rows.shape
    K = len(weight)
    dtype = accumulation_dtype(rows)
    wide = weight.to(dtype)
    scaled = rows.to(dtype) / temperature
    # Contiguous whatever the inputs: a compiler relies on the strides that the operator declares.
    drows = scaled.new_empty(rows.shape if row_gradient else 0)
    dweight = wide.new_empty(weight.shape if weight_gradient else 0)
    pairs = count_of_pairs(V, len(targets.values))

    size = min(B, images_of_block(rows.device, V * K * dtype.itemsize, multiplied=True))
    block = torch.empty((V * size, K), dtype=dtype, device=rows.device)
    total: Tensor | float = 0.0
    for first in range(0, B, size):
        images = slice(first, first + size)
        x = scaled[:, images].reshape(-1, D)
        logits = torch.mm(x, wide.T, out=block[: len(x)])
        total = total + of_logits(
            logits.view(V, -1, K),
            targets.of(images),
            temperature=1.0,
            gradient=logits.view(V, -1, K) if row_gradient or weight_gradient else None,
            factor=1 / (pairs * B),
        )
        # The block now holds the gradient of its logits.
        if row_gradient:
            drows[:, images] = (logits @ wide).view(V, -1, D).div_(temperature)
        if weight_gradient:
            if first == 0:
                torch.mm(logits.T, x, out=dweight)
            else:
                dweight.addmm_(logits.T, x)
    assert isinstance(total, Tensor)  # noqa: S101 - a type: a batch has a block at least
    return (total / (pairs * B)).to(dtype), drows, dweight


def count_of_pairs(V: int, Q: int) -> int:
    """Pairs of a target and a view that is another one."""
    return Q * (V - 1)


def _sum_of_others(shares: Tensor, view: int, out: Tensor) -> Tensor:
    """[b, K] the sum of the targets of all views but one; not a difference, which would round."""
    chosen: list[Tensor] = [share for q, share in enumerate(shares) if q != view]
    if len(chosen) == 1:
        return chosen[0]
    torch.add(chosen[0], chosen[1], out=out)
    for share in chosen[2:]:
        out += share
    return out


def _inner_product(shares: Tensor, log_shares: Tensor, products: Tensor) -> Tensor:
    """The sum of the products, where nothing times -inf is nothing; NaN stays.

    A dot product would be off by 2e-4 over 65536 equal terms: it adds one after the other in
    float32, where a sum adds in pairs.

    Args:
        shares: [b, K].
        log_shares: [b, K].
        products: [b, K], overwritten.
    """
    total = torch.mul(shares, log_shares, out=products).sum()
    if shares.device.type == "cpu" and total.isfinite():
        return total
    nothing = (shares == 0) & (log_shares == -math.inf)
    return products.masked_fill_(nothing, 0.0).sum()
