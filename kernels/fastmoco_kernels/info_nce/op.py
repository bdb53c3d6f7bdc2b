"""The InfoNCE loss of MoCo v3.

Every query row i has one positive among the keys, row ``positive_offset + i``; all other keys are its negatives. Keys
come from the momentum encoder and carry no gradient, so the gradient with respect to a normalised query is
``(2 / B) * (sum_j p_ij k_j - k_positive)``: the temperature cancels, which is why the loss is scaled by 2 * temperature.
Normalisation, similarity, softmax and mean run in float32 whatever the inputs are (float64 stays float64); autocast is
switched off inside, because fp16 logits at a temperature of 0.2 lose the third digit of the gradient.

What crosses ranks: nothing here. The caller gathers the keys in rank order and passes ``positive_offset = rank * B``.
"""

from __future__ import annotations

from torch import Tensor

from fastmoco_kernels._runtime import choose_backend
from fastmoco_kernels.info_nce.reference import info_nce_reference


def info_nce_loss(
    q: Tensor, keys: Tensor, *, temperature: float, positive_offset: int = 0, backend: str = "auto"
) -> Tensor:
    """The InfoNCE loss of raw queries against raw keys.

    ``2 * temperature * mean_i(logsumexp_j(s_ij) - s_i,i+positive_offset)`` with ``s = u(q) u(keys)^T / temperature`` and
    ``u(v) = v / max(||v||_2, 1e-12)`` by rows (Chen, Xie, He 2021, Eq. 1, times 2 * temperature).

    Args:
        q: [B, D] floating point, any stride: predictor outputs, not normalised.
        keys: [N, D] floating point on the same device, N >= B: projector outputs of all ranks, not normalised. Treated as
            constants: no gradient reaches them.
        temperature: > 0; 0.2 for vision transformers, 1.0 for ResNet-50.
        positive_offset: row of ``keys`` that is the positive of ``q[0]``; rank * B where ranks hold equal parts.
        backend: ``"auto"`` or ``"reference"``.

    Returns:
        A scalar tensor, float32 (float64 for float64 input), differentiable in ``q``.

    Raises:
        ValueError: for shapes that do not fit, positives beyond the keys, mixed devices or a temperature <= 0.

    Numerics: accumulates in float32; deterministic on one device and number of threads.
    Memory and cost: 4 B N bytes for the logits and as much for their gradient; 4 B N D FLOPs forward, as many backward.
    Distributed: none.

    Example:
        >>> import torch
        >>> from fastmoco_kernels import info_nce_loss
        >>> q = torch.eye(4, requires_grad=True)
        >>> round(info_nce_loss(q, torch.eye(4), temperature=0.2).item(), 4)
        0.008
    """
    _check(q, keys, temperature, positive_offset)
    choose_backend("info_nce_loss", backend, "reference", ("reference",))
    return info_nce_reference(q, keys, temperature=temperature, positive_offset=positive_offset)


def _check(q: Tensor, keys: Tensor, temperature: float, positive_offset: int) -> None:
    """Every way of calling the op wrongly, each with both numbers in its text."""
    if q.dim() != 2 or keys.dim() != 2:
        raise ValueError(f"info_nce_loss: q {tuple(q.shape)} and keys {tuple(keys.shape)} must be [B, D] and [N, D]")
    if q.shape[1] != keys.shape[1]:
        raise ValueError(f"info_nce_loss: q has D={q.shape[1]} but keys have D={keys.shape[1]}")
    if not (q.is_floating_point() and keys.is_floating_point()):
        raise ValueError(f"info_nce_loss: q is {q.dtype} and keys are {keys.dtype}; both must be floating point")
    if q.device != keys.device:
        raise ValueError(f"info_nce_loss: q is on {q.device} but keys are on {keys.device}")
    if q.shape[0] < 1:
        raise ValueError(f"info_nce_loss: q {tuple(q.shape)} has no rows")
    if not temperature > 0:
        raise ValueError(f"info_nce_loss: temperature={temperature} must be positive")
    if positive_offset < 0 or positive_offset + q.shape[0] > keys.shape[0]:
        raise ValueError(
            f"info_nce_loss: positives {positive_offset}..{positive_offset + q.shape[0] - 1} "
            f"lie outside the {keys.shape[0]} keys"
        )
