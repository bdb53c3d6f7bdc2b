"""Cross-entropy of soft targets with the predictions of other views, over a wide head.

Of DINO (Caron et al. 2021, 65536 outputs, targets from a teacher's logits) and SwAV (Caron et al.
2020, 3000 prototypes, targets from an assignment). Plain torch keeps the student's logits several
times in float32; here they exist once in the type in which they are given, or, from rows and the
weight of the head, only in blocks. Nothing here communicates.

Paths: `triton_kernels.py` (GPUs), `blocks.py` (all other devices), `reference.py` (the definition).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmoco_kernels.backends import choose_backend, require_triton, triton_is_default
from fastmoco_kernels.soft_cross_entropy.blocks import Targets
from fastmoco_kernels.soft_cross_entropy.operator import of_given_logits, of_products
from fastmoco_kernels.soft_cross_entropy.reference import (
    soft_cross_entropy_reference,
    soft_cross_entropy_rows_reference,
)

BACKENDS = ("triton", "blocks", "reference")


def soft_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    centre: Tensor | None = None,
    target_temperature: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean over pairs (q, v) of different views and over images of the cross-entropy
    `sum_k -T_q,k log softmax(logits_v / temperature)_k`.

    The targets are those of the first Q views, and each is compared with all views but its own:
    Q (V - 1) pairs. `T_q` are the targets themselves, or, with a `target_temperature`,
    `softmax((targets - centre) / target_temperature)` in float32.

    Args:
        logits: [V, B, K] floating point, V at least 2: outputs of the head of all views.
        targets: [Q, B, K] floating point, 1 <= Q <= V, constants. Probabilities need not sum to 1.
        temperature: > 0, divides the logits.
        centre: [K] or [1, K], subtracted from a teacher's logits.
        target_temperature: > 0 for a teacher's logits; None for probabilities.
        backend: "auto", "triton" (CUDA), "blocks" (torch, any device) or "reference". "auto" is
            triton on CUDA devices of compute capability 8.0 and newer, and blocks elsewhere.

    Returns:
        A scalar, float32 (float64 for float64 logits), differentiable once in `logits`; only the
        reference can be differentiated twice.

    Raises:
        ValueError: for shapes that do not fit, mixed devices, temperatures <= 0, or a centre
            without a temperature.

    Numerics: sums in float32, whatever autocast says. A logit of -inf has no share; if it has a
        target, the loss is infinite.
    Memory: kept for the backward are the logits, the targets, and with triton two numbers a row.
        The gradient has the dtype of the logits. Further memory is that of a few cached blocks.
    Distributed: none.

    Example:
        >>> import torch
        >>> from fastmoco_kernels import soft_cross_entropy
        >>> logits, targets = torch.zeros(3, 4, 8), torch.full((2, 4, 8), 1 / 8)
        >>> round(soft_cross_entropy(logits, targets, temperature=0.1).item(), 4)
        2.0794
    """
    name = "soft_cross_entropy"
    centre = _flat(centre)
    _check(name, logits, targets, centre, temperature, target_temperature)
    chosen = _backend(name, backend, logits, targets, centre)
    if chosen == "reference":
        return soft_cross_entropy_reference(
            logits,
            targets,
            temperature=temperature,
            centre=centre,
            target_temperature=target_temperature,
        )
    return of_given_logits(
        logits,
        Targets(targets.detach(), centre, target_temperature),
        temperature=float(temperature),
        triton=chosen == "triton",
    )


def soft_cross_entropy_of_rows(
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    centre: Tensor | None = None,
    target_temperature: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """`soft_cross_entropy` of `logits = rows weight^T`, which are never stored as a whole.

    Blocks of images are multiplied, their logits are replaced by the gradient, and multiplied
    again: one pass gives the loss and both gradients.

    Args:
        rows: [V, B, D] floating point: the rows in front of the last layer of the head.
        weight: [K, D] floating point: that layer, without bias.
        targets: [Q, B, K], constants, as in `soft_cross_entropy`.
        temperature: as in `soft_cross_entropy`.
        centre: as in `soft_cross_entropy`.
        target_temperature: as in `soft_cross_entropy`.
        backend: as in `soft_cross_entropy`.

    Returns:
        A scalar, float32 (float64 for float64 rows), differentiable once in `rows` and `weight`.

    Raises:
        ValueError: as `soft_cross_entropy`, and for rows and weight of different widths.

    Numerics: on the CPU products are in float32 whatever the dtypes. With triton they are in the
        dtype of the rows, and logits of a block are stored in it: bf16 rows give bf16 logits, as
        autocast does.
    Memory and cost: `6 V B K D` FLOPs with both gradients. Memory beyond inputs and gradients: a
        block of logits, 64 MiB on the CPU and 256 MiB elsewhere, or those of one image.
    Distributed: none.

    Example:
        >>> import torch
        >>> from fastmoco_kernels import soft_cross_entropy_of_rows
        >>> rows, weight = torch.zeros(2, 4, 3), torch.ones(8, 3)
        >>> teacher = torch.randn(2, 4, 8)
        >>> loss = soft_cross_entropy_of_rows(
        ...     rows, weight, teacher, temperature=0.1, target_temperature=0.04
        ... )
        >>> round(loss.item(), 4)
        2.0794
    """
    name = "soft_cross_entropy_of_rows"
    if rows.dim() != 3 or weight.dim() != 2 or rows.shape[2] != weight.shape[1]:
        raise ValueError(
            f"{name}: rows {tuple(rows.shape)} and weight {tuple(weight.shape)} must be [V, B, D] "
            "and [K, D]"
        )
    if rows.device != weight.device or not weight.is_floating_point():
        raise ValueError(
            f"{name}: rows are {rows.dtype} on {rows.device} but weight is {weight.dtype} on "
            f"{weight.device}; both must be floating point on one device"
        )
    centre = _flat(centre)
    logits = rows.new_empty(1).expand(*rows.shape[:2], len(weight))
    _check(name, logits, targets, centre, temperature, target_temperature)
    chosen = _backend(name, backend, rows, weight, targets, centre)
    if chosen == "reference":
        return soft_cross_entropy_rows_reference(
            rows,
            weight,
            targets,
            temperature=temperature,
            centre=centre,
            target_temperature=target_temperature,
        )
    return of_products(
        rows,
        weight,
        Targets(targets.detach(), centre, target_temperature),
        temperature=float(temperature),
        triton=chosen == "triton",
    )


def _flat(centre: Tensor | None) -> Tensor | None:
    """[K] of [1, K], as DINO keeps it."""
    return None if centre is None else centre.detach().reshape(-1)


def _backend(name: str, backend: str, *tensors: Tensor | None) -> str:
    """The backend; "auto" takes blocks for what the kernels cannot do, "triton" raises."""
    first = tensors[0]
    assert first is not None  # noqa: S101 - a type: only the later ones are optional
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    default = "triton" if triton_is_default(first.device) and not wide else "blocks"
    chosen = choose_backend(name, backend, default, BACKENDS)
    if chosen == "triton":
        require_triton(name, first.device)
        if wide:
            raise ValueError(
                f"{name}: backend='triton' does not take float64 (its kernels sum in float32); "
                "use backend='auto'"
            )
    return chosen


def _check(
    name: str,
    logits: Tensor,
    targets: Tensor,
    centre: Tensor | None,
    temperature: float,
    target_temperature: float | None,
) -> None:
    """Refuse wrong arguments; every message contains both values."""
    if logits.dim() != 3 or targets.dim() != 3 or logits.shape[1:] != targets.shape[1:]:
        raise ValueError(
            f"{name}: logits {tuple(logits.shape)} and targets {tuple(targets.shape)} must be "
            "[V, B, K] and [Q, B, K]"
        )
    V, B, K = logits.shape
    Q = len(targets)
    if V < 2 or not 1 <= Q <= V or B < 1 or K < 1:
        raise ValueError(
            f"{name}: V={V} views, Q={Q} with targets, B={B} images, K={K} outputs; must be V >= "
            "2, 1 <= Q <= V, B >= 1, K >= 1"
        )
    for what, tensor in (("logits", logits), ("targets", targets), ("centre", centre)):
        if tensor is None:
            continue
        if not tensor.is_floating_point() or tensor.device != logits.device:
            raise ValueError(
                f"{name}: {what} are {tensor.dtype} on {tensor.device}; must be floating point on "
                f"{logits.device}"
            )
    if centre is not None and (centre.numel() != K or target_temperature is None):
        raise ValueError(
            f"{name}: centre has {centre.numel()} numbers for K={K} and "
            f"target_temperature={target_temperature}; must be K numbers, with a temperature"
        )
    for what, value in (("temperature", temperature), ("target_temperature", target_temperature)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}: {what}={value} must be positive and finite")
