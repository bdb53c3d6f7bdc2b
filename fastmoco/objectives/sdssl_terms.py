"""The terms of SDSSL's loss: of the last block, of the others, and of projections without gradient.

`sdssl` weights them. Here V views, B images, n blocks, width D; block n - 1 is the last one.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, normalize

from fastmoco.distributed.gather import gather_keys
from fastmoco.distributed.mesh import group_rank, group_size
from fastmoco.objectives.byol import regression_loss
from fastmoco.objectives.simclr import FLOOR, TILE, TILE_CPU, nt_xent_loss, nt_xent_reference
from fastmoco_kernels.info_nce.op import symmetric_info_nce_loss


class Terms(NamedTuple):
    """The three terms of a loss, before they are weighted; and how positives rank, where that was
    asked for."""

    output: Tensor
    """Of the last block."""
    intermediate: Tensor
    """The mean over all others."""
    detached: Tensor | None = None
    """The mean over all, from projections without gradient."""
    hits: Tensor | None = None
    """[2]: shares of rows of the last block whose positive ranks first, and among the first
    five."""

    def loss(self, ratio: float, blocks: int, *, all_at_zero: bool = False) -> Tensor:
        """`output + ratio * intermediate + blocks * detached`.

        Args:
            ratio: weight of the intermediate blocks.
            blocks: their number with the last one; 12 in the official code, whose encoders have 12.
            all_at_zero: whether a ratio of 0 means one mean over all blocks in place of the first
                two terms, as in the official code on BYOL.
        """
        if all_at_zero and ratio == 0:
            loss = (self.output + (blocks - 1) * self.intermediate) / blocks
        else:
            loss = self.output + ratio * self.intermediate
        return loss if self.detached is None else loss + blocks * self.detached

    def watch(self) -> dict[str, Tensor]:
        """What telemetry sees of them."""
        figures = {
            "loss_output": self.output,
            "loss_intermediate": self.intermediate,
            "loss_detached": self.detached,
            "accuracy": self.hits,
        }
        return {name: value.detach() for name, value in figures.items() if value is not None}


def info_nce_terms(
    predictions: Tensor,
    detached: Tensor,
    keys: Tensor,
    *,
    temperature: float,
    accuracy: bool = False,
) -> Terms:
    """The terms on MoCo v3: the InfoNCE of all blocks' rows of a view against the same keys.

    Each is `2 * temperature * CE` against all keys, a mean over rows, summed over views. The rows
    of one image share a positive, so a block is one call of the one-pass op for both views.

    Args:
        predictions: [2, n, B, D] of both views and all blocks, raw.
        detached: [2, n, B, D], from projections without gradient.
        keys: [2, N, D] of all ranks, raw: those that the rows of each view are compared with.
        temperature: > 0.
        accuracy: whether to count how the positives of the last block rank.
    """
    offset = group_rank() * predictions.shape[2]
    k1, k2 = keys.unbind()

    def of(rows: Tensor, *, accuracy: bool = False) -> tuple[list[Tensor], Tensor | None]:
        hits, losses = None, []
        for block, (q1, q2) in enumerate(rows.unbind(1)):
            found = symmetric_info_nce_loss(
                q1,
                k1,
                q2,
                k2,
                temperature=temperature,
                positive_offset=offset,
                accuracy=accuracy and block == rows.shape[1] - 1,
            )
            losses.append(found.loss)
            if (shares := found.shares) is not None:
                hits = shares
        return losses, hits

    losses, hits = of(predictions, accuracy=accuracy)
    of_detached, _ = of(detached)
    return Terms(losses[-1], torch.stack(losses[:-1]).mean(), torch.stack(of_detached).mean(), hits)


def info_nce_terms_reference(
    predictions: Tensor,
    detached: Tensor,
    keys: Tensor,
    *,
    temperature: float,
    accuracy: bool = False,
) -> Terms:
    """`info_nce_terms` from the definition: rows of all blocks, block by block, in one matrix."""
    B = predictions.shape[2]
    positives = group_rank() * B + torch.arange(B, device=keys.device)

    def logits(rows: Tensor, direction: int) -> Tensor:
        wide = torch.promote_types(rows.dtype, torch.float32)
        unit = normalize(rows.flatten(0, -2).to(wide), dim=1)
        return unit @ normalize(keys[direction].to(wide), dim=1).T / temperature

    def loss(rows: Tensor) -> Tensor:
        """Of rows [2, blocks, B, D]."""
        expected = positives.repeat(rows.shape[1])
        both = [cross_entropy(logits(rows[i], i), expected) for i in range(2)]
        return 2 * temperature * torch.stack(both).sum()

    hits = None
    if accuracy:
        last = torch.stack([logits(predictions[i, -1], i) for i in range(2)])
        found = last.topk(min(5, last.shape[2]), dim=2).indices == positives[:, None]
        hits = torch.stack([found[..., :1].any(2), found.any(2)]).to(last.dtype).mean((1, 2))
    return Terms(loss(predictions[:, -1:]), loss(predictions[:, :-1]), loss(detached), hits)


def regression_terms(predictions: Tensor, detached: Tensor, targets: Tensor) -> Terms:
    """The terms on BYOL: means of `2 - 2 cos`, summed over views.

    Args:
        predictions: [2, n, B, D] of both views and all blocks.
        detached: [2, n, B, D], from projections without gradient.
        targets: [2, B, D], those of the rows of each view.
    """
    blocks, expected = predictions.shape[1], targets[:, None]
    return Terms(
        regression_loss(predictions[:, -1], targets),
        regression_loss(predictions[:, :-1], expected) / (blocks - 1),
        regression_loss(detached, expected) / blocks,
    )


def nt_xent_terms(
    projections: Tensor, *, temperature: float, local_gradient: bool = False, accuracy: bool = False
) -> Terms:
    """The terms on SimCLR; there is no detached one.

    Output: NT-Xent of the last block's rows of all ranks. Intermediate: each row of the other
    blocks against the last block's rows of all ranks, which are constants, without that of its own
    image and view; the positive is that of the other view.

    Args:
        projections: [n, 2, B, D] of all blocks and both views, raw.
        temperature: > 0.
        local_gradient: as for `SDSimCLR`.
        accuracy: whether to count how the positives of the last block rank.

    Returns:
        The terms. Their gradient is that of the sum of all ranks' losses in this rank's
        projections, as that of `nt_xent_loss`; with `local_gradient` that of this rank's own loss.
    """
    if local_gradient and group_size() > 1:
        output, hits = _local_nt_xent(projections[-1], temperature)
    else:
        output, found = nt_xent_loss(projections[-1], temperature=temperature, accuracy=accuracy)
        hits = output.new_zeros(2) if found is None else found
    keys = gather_keys(projections[-1].flatten(0, 1))
    intermediate = _WithoutOwn.apply(projections[:-1], keys, temperature)  # type: ignore[no-untyped-call]
    return Terms(output, intermediate, hits=hits if accuracy else None)


def nt_xent_terms_reference(
    projections: Tensor, *, temperature: float, local_gradient: bool = False, accuracy: bool = False
) -> Terms:
    """`nt_xent_terms` from the definition, by autograd."""
    n, _, B, D = projections.shape
    if local_gradient and group_size() > 1:
        output, hits = _local_nt_xent(projections[-1], temperature)
    else:
        output, hits = nt_xent_reference(projections[-1], temperature=temperature)
    wide = torch.promote_types(projections.dtype, torch.float32)
    keys = normalize(gather_keys(projections[-1].flatten(0, 1)).to(wide), dim=1)
    rows = normalize(projections[:-1].reshape(-1, D).to(wide), dim=1)
    own, positive = (index.repeat(n - 1) for index in _places(B, keys.device))
    logits = (rows @ keys.T / temperature).scatter(1, own[:, None], -math.inf)
    return Terms(output, cross_entropy(logits, positive), hits=hits if accuracy else None)


def _places(images: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """[2 B] each: where the rows of this rank's two views are among those of all ranks, and where
    those of the other view are."""
    own = torch.arange(2 * images, device=device)
    first = group_rank() * 2 * images
    return first + own, first + own.roll(images)


def _local_nt_xent(projections: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """NT-Xent of this rank's rows, by autograd, with a gather whose backward keeps this rank's part
    of this rank's gradient alone; and [2] shares of positives that rank first, or in the first
    five."""
    rows = projections.flatten(0, 1).to(torch.promote_types(projections.dtype, torch.float32))
    own, positive = _places(projections.shape[1], rows.device)
    unit = normalize(rows, dim=1, eps=FLOOR)
    others = gather_keys(unit)
    every = torch.cat([others[: own[0]], unit, others[own[-1] + 1 :]])
    logits = (unit @ every.T / temperature).scatter(1, own[:, None], -math.inf)
    order = (logits > logits.gather(1, positive[:, None])).sum(1)
    hits = torch.stack([(order < first).to(logits.dtype).mean() for first in (1, 5)])
    return cross_entropy(logits, positive), hits


class _WithoutOwn(torch.autograd.Function):
    """The mean over rows of `CE(u(row) u(keys)^T / temperature, other view)`, each row without the
    key of its own image and view. Keys are constants.

    A tile of logits at a time; all in the forward, which keeps the gradient of the rows.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, keys: Tensor, temperature: float) -> Tensor:
        """Rows [blocks, 2, B, D] and keys [N, D] -> scalar."""
        blocks, views, B, D = rows.shape
        wide = torch.promote_types(rows.dtype, torch.float32)
        count = blocks * views * B
        with torch.autocast(rows.device.type, enabled=False):
            key_unit = normalize(keys.to(wide), dim=1, eps=FLOOR)
            own, positive = (index.repeat(blocks) for index in _places(B, rows.device))
            flat = rows.reshape(count, D).to(wide)
            norm = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
            unit = flat / norm.clamp_min(FLOOR)
            size = max(1, (TILE_CPU if rows.is_cpu else TILE) // len(keys))
            total, gradients = flat.new_zeros(()), []
            for start in range(0, count, size):
                inside = slice(start, start + size)
                target = key_unit[positive[inside]]

                # The positive stays out of the sums, so that a small loss keeps its digits.
                at_positive = (unit[inside] * target).sum(1) / temperature
                logits = (unit[inside] / temperature) @ key_unit.T
                for index in (own, positive):
                    logits.scatter_(1, index[inside, None], -math.inf)
                loss = torch.logaddexp(
                    logits.logsumexp(1) - at_positive, torch.zeros_like(at_positive)
                )
                total += loss.sum()
                if ctx.needs_input_grad[0]:
                    weights = logits.sub_((at_positive + loss)[:, None]).exp_()
                    found = weights @ key_unit
                    gradients.append(found.addcmul_(torch.expm1(-loss)[:, None], target))
            if gradients:
                gradient = torch.cat(gradients).div_(count * temperature)
                along = (gradient * unit).sum(1, keepdim=True) * (norm >= FLOOR)
                gradient.addcmul_(along, unit, value=-1).div_(norm.clamp_min(FLOOR))
                ctx.save_for_backward(gradient.view(rows.shape).to(rows.dtype))
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * dloss, None, None
