"""InfoNCE of MoCo v1 and v2: each query has a key of its own, and a queue of negatives that all
queries share: `queued_info_nce_loss`.

The positive comes in at the end of the pass, as everywhere in this folder, and the pass runs over
the queue alone. So the keys of other queries in the batch never count as negatives, and no logits
are stored.
"""

from __future__ import annotations

from torch import Tensor

from fastmoco_kernels.info_nce.chunked import Request
from fastmoco_kernels.info_nce.op import (
    InfoNCEResult,
    check_arguments,
    chosen_backend,
    chosen_precision,
    wants_gradient,
)
from fastmoco_kernels.info_nce.operator import one_pass
from fastmoco_kernels.info_nce.reference import queued_info_nce_reference

NAME = "queued_info_nce_loss"


def queued_info_nce_loss(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    *,
    temperature: float | Tensor,
    scale: float = 1.0,
    precision: str = "auto",
    backend: str = "auto",
    accuracy: bool = False,
) -> InfoNCEResult:
    """The InfoNCE loss of raw queries, each against its own key and a queue of negatives.

    `scale * mean_i(logsumexp([s_ii, t_i1 .. t_iK]) - s_ii)` with
    `s_ii = u(q_i) u(k_i) / temperature`, `t_ij = u(q_i) queue_j / temperature` and
    `u(v) = v / max(||v||_2, 1e-12)` (He, Fan, Wu, Xie, Girshick 2020, Eq. 1).

    Args:
        q: [B, D] floating point, any stride: queries, not normalised.
        k: [B, D] floating point, any stride: the positive of each query, not normalised; constants.
        queue: [K, D] floating point on the same device, any stride: rows of unit length, which are
            used as they are; constants.
        temperature: > 0; 0.07 in MoCo v1, 0.2 in v2. A 0-dim tensor may require a gradient.
        scale: factor of the mean.
        precision: as for `info_nce_loss`.
        backend: as for `info_nce_loss`; "reference" has [B, 1 + K] logits.
        accuracy: whether to count, in the same pass, how the positives rank. A negative as similar
            as the positive ranks first.

    Returns:
        The loss, differentiable once in `q` and in a temperature that is a tensor; top-1 and top-5
        shares, or None.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, and as `info_nce_loss`.

    Numerics: as `info_nce_loss`.
    Memory and cost: `4 B K D` FLOPs. Beyond the inputs `O(B D)` and one tile of logits; with the
        kernels a copy of the queue in the operands' dtype too.
    Distributed: none. The queue is equal on all ranks, and no key is gathered for the loss.

    Example:
        >>> import torch
        >>> from fastmoco_kernels import queued_info_nce_loss
        >>> q, queue = torch.eye(4, requires_grad=True), torch.eye(4)[:2]
        >>> round(queued_info_nce_loss(q[2:], q[2:], queue, temperature=0.2).loss.item(), 4)
        0.0134
    """
    check_arguments(q, k, temperature, 0, precision, NAME)
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"{NAME}: {q.shape[0]} queries but {k.shape[0]} keys; each has its own")
    if queue.dim() != 2 or queue.shape[1] != q.shape[1] or queue.shape[0] < 1:
        raise ValueError(f"{NAME}: queue {tuple(queue.shape)} must be [K, {q.shape[1]}], K >= 1")
    if not queue.is_floating_point() or queue.device != q.device:
        raise ValueError(
            f"{NAME}: queue is {queue.dtype} on {queue.device}; it must be floating point "
            f"on {q.device}"
        )
    chosen = chosen_backend(q, temperature, precision, backend, NAME)
    if chosen == "reference":
        loss, ranks = queued_info_nce_reference(q, k, queue, temperature=temperature, scale=scale)
        if not accuracy:
            return InfoNCEResult(loss, None, None)
        return InfoNCEResult(loss, *((ranks < top).to(loss.dtype).mean() for top in (1, 5)))
    request = Request(
        temperature=temperature,
        scale=float(scale),
        positive_offset=0,
        gradient=wants_gradient(q, temperature),
        accuracy=accuracy,
        precision=chosen_precision(temperature, precision),
    )
    loss, hits = one_pass(
        (q,), (k.detach(),), request, triton=chosen == "triton", queue=queue.detach()
    )
    return InfoNCEResult(loss, hits[0], hits[1]) if accuracy else InfoNCEResult(loss, None, None)
