"""Cross-entropy of rows with targets of the same image, in weighted pairs:
`soft_cross_entropy_of_pairs`, of EsViT (Li et al. 2022), whose regions have targets by their match.

A cross-entropy is linear in its target. With `m_r` the weights of row r over all targets and
`y_s` the rows summed by their weights with target s, the loss of scores `x_r W^T` is

    sum_r m_r logsumexp_k(x_r W^T)  -  sum_s sum_k T_sk (y_s W^T)_k

So scores of rows and scores of targets never meet: each side passes once, a block of scores at a
time, and what goes from one to the other are rows of the width of the head. Of the size of all
scores nothing exists, neither of the rows nor of the targets.

Legend: B images, R rows and S targets of an image, K outputs, D and E width of rows and targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastmoco_kernels.backends import accumulation_dtype, choose_backend
from fastmoco_kernels.soft_cross_entropy.blocks import images_of_block
from fastmoco_kernels.soft_cross_entropy.operator import keep_gradients, kept_gradients, watched
from fastmoco_kernels.soft_cross_entropy.reference import soft_cross_entropy_pairs_reference

NAME = "soft_cross_entropy_of_pairs"
BACKENDS = ("blocks", "reference")


def soft_cross_entropy_of_pairs(
    rows: Tensor,
    weight: Tensor,
    target_rows: Tensor,
    target_weight: Tensor,
    pairs: Tensor,
    *,
    temperature: float,
    target_temperature: float,
    centre: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The sum over images and pairs of a row r and a target s of
    `pairs_rs sum_k -T_sk log softmax(rows_r weight^T / temperature)_k` with
    `T_s = softmax((target_rows_s target_weight^T - centre) / target_temperature)`.

    Args:
        rows: [B, R, D] floating point: the rows in front of the last layer of the head.
        weight: [K, D] floating point: that layer, without bias.
        target_rows: [B, S, E] floating point: those of the head of the targets; constants.
        target_weight: [K, E] floating point: its last layer; a constant.
        pairs: [B, R, S] floating point: the weight of each pair, 0 for one that is none; constants.
        temperature: > 0, divides the scores of the rows.
        target_temperature: > 0, divides those of the targets.
        centre: [K] or [1, K], subtracted from the scores of the targets.
        backend: "auto" and "blocks" (torch, any device), or "reference".

    Returns:
        A scalar, float32 (float64 for float64 rows), differentiable once in `rows` and `weight`;
        only the reference can be differentiated twice.

    Raises:
        ValueError: for shapes that do not fit, mixed devices, or temperatures <= 0.

    Numerics: products and sums in float32 or wider, whatever the dtypes and autocast.
    Memory and cost: `6 B (R + S) K D` FLOPs with both gradients. Memory beyond inputs and gradients:
        a block of scores, 64 MiB on the CPU and 256 MiB elsewhere, or those of one row.
    Distributed: none.

    Example:
        >>> import torch
        >>> from fastmoco_kernels import soft_cross_entropy_of_pairs
        >>> rows, weight, pairs = torch.zeros(2, 4, 3), torch.ones(8, 3), torch.full((2, 4, 5), 1 / 40)
        >>> loss = soft_cross_entropy_of_pairs(
        ...     rows, weight, torch.randn(2, 5, 3), weight, pairs, temperature=0.1,
        ...     target_temperature=0.04,
        ... )
        >>> round(loss.item(), 4)
        2.0794
    """
    centre = None if centre is None else centre.detach().reshape(-1)
    constants = (target_rows.detach(), target_weight.detach(), pairs.detach())
    _check(rows, weight, *constants, centre, temperature, target_temperature)
    if choose_backend(NAME, backend, "blocks", BACKENDS) == "reference":
        return soft_cross_entropy_pairs_reference(
            rows,
            weight,
            *constants,
            temperature=temperature,
            centre=centre,
            target_temperature=target_temperature,
        )
    graded = torch.is_grad_enabled()
    arguments = (
        rows,
        weight,
        *constants,
        centre,
        float(temperature),
        float(target_temperature),
        graded and rows.requires_grad,
        graded and weight.requires_grad,
    )
    run: Callable[..., tuple[Tensor, Tensor, Tensor]] = (
        _pairs_op if watched(arguments) else _EagerPairs.apply
    )
    return run(*arguments)[0]


def of_pairs(
    rows: Tensor,
    weight: Tensor,
    target_rows: Tensor,
    target_weight: Tensor,
    pairs: Tensor,
    centre: Tensor | None,
    temperature: float,
    target_temperature: float,
    row_gradient: bool,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients [B, R, D] and [K, D] in float32 or wider; what is not wanted is
    empty."""
    dtype, device = accumulation_dtype(rows), rows.device
    K, D = weight.shape
    x, wide, shares = rows.to(dtype) / temperature, weight.to(dtype), pairs.to(dtype)
    dweight = wide.new_zeros(wide.shape if weight_gradient else (0,))
    total = torch.zeros((), dtype=torch.float64 if device.type == "cpu" else dtype, device=device)
    size = images_of_block(device, K * dtype.itemsize, multiplied=True)
    block = wide.new_empty(min(size, max(rows.shape[:2].numel(), pairs.shape[::2].numel())), K)

    # Of each target: the rows that it belongs to, and the mean of the last layer under it.
    summed = (shares.mT @ x).flatten(0, 1)
    expected = torch.empty_like(summed)
    given, layer = target_rows.flatten(0, 1).to(dtype), target_weight.to(dtype)
    for first in range(0, len(given), size):
        some = slice(first, first + size)
        scores = torch.mm(given[some], layer.T, out=block[: len(given[some])])
        if centre is not None:
            scores -= centre.to(dtype)
        exponentials, sums, _ = _exponentials_(scores.div_(target_temperature))
        probabilities = exponentials.div_(sums)
        torch.mm(probabilities, wide, out=expected[some])
        if weight_gradient:
            dweight.addmm_(probabilities.T, summed[some], alpha=-1)
    total -= (expected * summed).sum()

    # Of each row: the logarithm of its sum, whose gradient is the softmax.
    flat, masses = x.flatten(0, 1), shares.sum(-1).flatten()[:, None]
    drows = flat.new_empty(flat.shape if row_gradient else (0,))
    for first in range(0, len(flat), size):
        some = slice(first, first + size)
        scores = torch.mm(flat[some], wide.T, out=block[: len(flat[some])])
        exponentials, sums, largest = _exponentials_(scores)
        total += ((sums.log() + largest) * masses[some]).sum()
        gradient = exponentials.mul_(masses[some] / sums)
        if row_gradient:
            torch.mm(gradient, wide, out=drows[some])
        if weight_gradient:
            dweight.addmm_(gradient.T, flat[some])
    if row_gradient:
        drows = drows.view(rows.shape) - shares @ expected.view(*target_rows.shape[:2], D)
        drows.div_(temperature)
    return total.to(dtype), drows, dweight


def _exponentials_(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`exp(scores - largest)` in place, with sum and largest score of each row, [n, 1]. A sum in
    pairs, where torch's softmax on a CPU adds one after the other: over 65536 outputs it is off by
    1e-5."""
    largest = scores.amax(-1, keepdim=True)
    scores.sub_(largest).exp_()
    return scores, scores.sum(-1, keepdim=True), largest


def _check(
    rows: Tensor,
    weight: Tensor,
    target_rows: Tensor,
    target_weight: Tensor,
    pairs: Tensor,
    centre: Tensor | None,
    temperature: float,
    target_temperature: float,
) -> None:
    """Refuse wrong arguments; every message contains the values."""
    shapes = [tuple(t.shape) for t in (rows, weight, target_rows, target_weight, pairs)]
    if [len(shape) for shape in shapes] != [3, 2, 3, 2, 3]:
        fits = False
    else:
        (B, R, D), (K, _), (_, S, E) = shapes[:3]
        wanted = [(B, R, D), (K, D), (B, S, E), (K, E), (B, R, S)]
        fits = shapes == wanted and min(B, R, S, K) >= 1
    if not fits:
        raise ValueError(
            f"{NAME}: rows, weight, target_rows, target_weight and pairs have shapes {shapes}; must "
            "be [B, R, D], [K, D], [B, S, E], [K, E] and [B, R, S], none empty"
        )
    if centre is not None and centre.numel() != len(weight):
        raise ValueError(f"{NAME}: centre has {centre.numel()} numbers for K={len(weight)}")
    for tensor in (rows, weight, target_rows, target_weight, pairs, centre):
        if tensor is not None and not (tensor.is_floating_point() and tensor.device == rows.device):
            raise ValueError(
                f"{NAME}: {tensor.dtype} on {tensor.device}; all must be floating point on "
                f"{rows.device}"
            )
    for what, value in (("temperature", temperature), ("target_temperature", target_temperature)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{NAME}: {what}={value} must be positive and finite")


def _pairs_forward(
    rows: Tensor,
    weight: Tensor,
    target_rows: Tensor,
    target_weight: Tensor,
    pairs: Tensor,
    centre: Tensor | None,
    temperature: float,
    target_temperature: float,
    row_gradient: bool,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(rows.device.type, enabled=False):
        return of_pairs(
            rows,
            weight,
            target_rows,
            target_weight,
            pairs,
            centre,
            temperature,
            target_temperature,
            row_gradient,
            weight_gradient,
        )


_pairs_op = torch.library.custom_op(
    "fastmoco::soft_cross_entropy_pairs", _pairs_forward, mutates_args=()
)


@_pairs_op.register_fake
def _(
    rows: Tensor,
    weight: Tensor,
    target_rows: Tensor,
    target_weight: Tensor,
    pairs: Tensor,
    centre: Tensor | None,
    temperature: float,
    target_temperature: float,
    row_gradient: bool,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(rows)
    return (
        rows.new_empty((), dtype=dtype),
        rows.new_empty(rows.shape if row_gradient else (0,), dtype=dtype),
        weight.new_empty(weight.shape if weight_gradient else (0,), dtype=dtype),
    )


_pairs_op.register_autograd(kept_gradients, setup_context=keep_gradients)


class _EagerPairs(torch.autograd.Function):
    """The operator without torch.library's dispatch."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = _pairs_forward(*inputs)
        keep_gradients(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *incoming: Any) -> Any:
        return kept_gradients(ctx, *incoming)
