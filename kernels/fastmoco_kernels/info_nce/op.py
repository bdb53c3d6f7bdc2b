"""The InfoNCE loss of MoCo v3, SimCLR and CLIP, with its gradient from one pass over the keys.

Every query i has one positive among the keys, row `positive_offset + i`; all other keys are its
negatives. One pass that streams the keys gives loss and gradient and keeps nothing of size B x N.
The derivation and the numerics are in kernels/README.md, "Design notes".

Distributed: nothing here communicates. The caller gathers the keys in rank order and passes
`positive_offset = rank * B`. Paths: `triton_kernels.py` (GPUs), `chunked.py` (all other devices),
`reference.py` (the definition).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmoco_kernels.backends import choose_backend, require_triton, triton_is_default
from fastmoco_kernels.info_nce.chunked import Request
from fastmoco_kernels.info_nce.cost import MAX_DIM, PRECISIONS, smallest_temperature
from fastmoco_kernels.info_nce.operator import one_pass
from fastmoco_kernels.info_nce.reference import info_nce_reference, positive_ranks_reference

BACKENDS = ("triton", "chunked", "reference")
TF32_BELOW = 0.07
"""Largest temperature at which `precision="auto"` means tf32: see `info_nce_loss`."""


class InfoNCEResult(NamedTuple):
    """What `symmetric_info_nce_loss` gives."""

    loss: Tensor
    """Scalar, float32 (float64 for float64 input): the sum of both directions."""
    top1: Tensor | None
    """Scalar: share of rows whose positive is more similar than every negative, over both
    directions.
    """
    top5: Tensor | None
    """Scalar: share of rows whose positive is among the five most similar keys."""

    @property
    def shares(self) -> Tensor | None:
        """[2]: `top1` and `top5`; None where they were not counted."""
        if self.top1 is None or self.top5 is None:
            return None
        return torch.stack([self.top1, self.top5])


def info_nce_loss(
    q: Tensor,
    keys: Tensor,
    *,
    temperature: float | Tensor,
    positive_offset: int = 0,
    scale: float | None = None,
    key_gradients: bool = False,
    precision: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """The InfoNCE loss of raw queries against raw keys.

    `scale * mean_i(logsumexp_j(s_ij) - s_i,i+positive_offset)` with
    `s = u(q) u(keys)^T / temperature` and `u(v) = v / max(||v||_2, 1e-12)` by rows (Chen, Xie, He
    2021, Eq. 1; moco-v3 scales it by 2 * temperature).

    Args:
        q: [B, D] floating point, any stride: predictor outputs, not normalised.
        keys: [N, D] floating point on the same device, N >= B, any stride: projector outputs of all
            ranks, not normalised.
        temperature: > 0; 0.2 for vision transformers, 1.0 for ResNet-50. A 0-dim tensor may require
            a gradient (CLIP); its value is never read by the host, and must stay above
            `smallest_temperature`.
        positive_offset: row of `keys` that is the positive of `q[0]`; rank * B where ranks hold
            equal parts.
        scale: factor of the mean; None for 2 * temperature (MoCo v3), 1.0 for SimCLR and CLIP.
        key_gradients: whether `keys` get their gradient; else they are constants.
        precision: what the tensor cores multiply, on the Triton path: "bf16", "fp16", "tf32",
            "fp32" (exact, slow). "auto" is bf16, and tf32 for a number <= 0.07 as temperature. It
            does not follow torch's global matmul precision. The other paths compute in float32 (on
            CUDA with torch's own float32 matmul precision); float64 stays float64.
        backend: "auto", "triton" (CUDA), "chunked" (torch, any device) or "reference" ([B, N]
            logits). "auto" is triton on CUDA devices of compute capability 8.0 and newer, for D <=
            512, and chunked elsewhere.

    Returns:
        A scalar tensor, float32 (float64 for float64 input), differentiable once in `q`, in `keys`
        with `key_gradients`, and in a temperature that is a tensor. Only the reference can be
        differentiated twice.

    Raises:
        ValueError: for shapes that do not fit, positives beyond the keys, mixed devices, a
            temperature <= 0, or one that is too small for `backend="triton"`.

    Numerics: sums and everything about the positive in float32, whatever autocast says. On features
        of late training gradients differ from float64 by about 1e-3 in bf16 at temperature 0.2 and
        in tf32 at 0.07 (bf16 there: 7e-3), by 1e-6 in fp32. Reproducible bit by bit on one device
        (and one choice of tile, which is kept on disk).
    Memory and cost: `cost.flops` (4 B N D) and `cost.bytes_moved`; O((B + N) D) memory beyond the
        inputs.
    Distributed: none.

    Example:
        >>> import torch
        >>> from fastmoco_kernels import info_nce_loss
        >>> q = torch.eye(4, requires_grad=True)
        >>> round(info_nce_loss(q, torch.eye(4), temperature=0.2).item(), 4)
        0.008
    """
    check_arguments(q, keys, temperature, positive_offset, precision, "info_nce_loss")
    if not key_gradients:
        keys = keys.detach()
    chosen = chosen_backend(q, temperature, precision, backend, "info_nce_loss")
    if chosen == "reference":
        return info_nce_reference(
            q,
            keys,
            temperature=temperature,
            positive_offset=positive_offset,
            scale=scale,
            key_gradients=key_gradients,
        )
    request = Request(
        temperature=temperature,
        scale=inner_scale(temperature, scale),
        positive_offset=positive_offset,
        gradient=wants_gradient(q, keys, temperature),
        key_gradient=torch.is_grad_enabled() and keys.requires_grad,
        precision=chosen_precision(temperature, precision),
    )
    loss, _ = one_pass((q,), (keys,), request, triton=chosen == "triton")
    return loss * (2 * temperature) if isinstance(temperature, Tensor) and scale is None else loss


def symmetric_info_nce_loss(
    q1: Tensor,
    k2: Tensor,
    q2: Tensor,
    k1: Tensor,
    *,
    temperature: float | Tensor,
    positive_offset: int = 0,
    precision: str = "auto",
    backend: str = "auto",
    accuracy: bool = False,
) -> InfoNCEResult:
    """Both directions of MoCo v3's loss in one launch.

    `info_nce_loss(q1, k2) + info_nce_loss(q2, k1)`: Chen, Xie, He 2021, Algorithm 1,
    `ctr(q1, k2) + ctr(q2, k1)`, each scaled by 2 * temperature.

    Args:
        q1: [B, D] raw queries of view 1.
        k2: [N, D] raw keys of view 2, constants.
        q2: [B, D] raw queries of view 2, of q1's dtype.
        k1: [N, D] raw keys of view 1, constants, of k2's dtype.
        temperature: as for `info_nce_loss`.
        positive_offset: as for `info_nce_loss`.
        precision: as for `info_nce_loss`.
        backend: as for `info_nce_loss`.
        accuracy: whether to count how positives rank, in the same pass. A negative as similar as
            the positive ranks first.

    Returns:
        The loss, differentiable once in `q1`, `q2` and a temperature that is a tensor; top-1 and
        top-5 shares, or None.

    Raises:
        ValueError: as `info_nce_loss`, and where the two directions differ in shape or dtype.

    Numerics, memory and cost, distributed: as `info_nce_loss`, twice.

    Example:
        >>> import torch
        >>> from fastmoco_kernels import symmetric_info_nce_loss
        >>> q, k = torch.eye(8, requires_grad=True), torch.eye(8)
        >>> symmetric_info_nce_loss(q, k, q, k, temperature=0.2, accuracy=True).top1.item()
        1.0
    """
    name = "symmetric_info_nce_loss"
    check_arguments(q1, k2, temperature, positive_offset, precision, name)
    for (first, one), (second, two) in ((("q1", q1), ("q2", q2)), (("k2", k2), ("k1", k1))):
        if (one.shape, one.dtype, one.device) != (two.shape, two.dtype, two.device):
            raise ValueError(
                f"{name}: {first} is {one.dtype} {tuple(one.shape)} on {one.device} but "
                f"{second} is {two.dtype} {tuple(two.shape)} on {two.device}"
            )
    chosen = chosen_backend(q1, temperature, precision, backend, name)
    if chosen == "reference":
        return _symmetric_reference(((q1, k2), (q2, k1)), temperature, positive_offset, accuracy)
    request = Request(
        temperature=temperature,
        scale=inner_scale(temperature, None),
        positive_offset=positive_offset,
        gradient=wants_gradient(q1, q2, temperature),
        accuracy=accuracy,
        precision=chosen_precision(temperature, precision),
    )
    loss, hits = one_pass((q1, q2), (k2.detach(), k1.detach()), request, triton=chosen == "triton")
    if isinstance(temperature, Tensor):
        loss = loss * (2 * temperature)
    return InfoNCEResult(loss, hits[0], hits[1]) if accuracy else InfoNCEResult(loss, None, None)


def _symmetric_reference(
    directions: tuple[tuple[Tensor, Tensor], ...],
    temperature: float | Tensor,
    offset: int,
    accuracy: bool,
) -> InfoNCEResult:
    one, two = (
        info_nce_reference(q, k, temperature=temperature, positive_offset=offset)
        for q, k in directions
    )
    if not accuracy:
        return InfoNCEResult(one + two, None, None)
    ranks = torch.cat(
        [positive_ranks_reference(q, k, positive_offset=offset) for q, k in directions]
    )
    return InfoNCEResult(one + two, *((ranks < first).to(one.dtype).mean() for first in (1, 5)))


def chosen_backend(
    q: Tensor, temperature: float | Tensor, precision: str, backend: str, name: str
) -> str:
    """The backend; "auto" takes chunks for what the kernels cannot do, "triton" raises."""
    smallest = smallest_temperature(chosen_precision(temperature, precision))
    limits = []
    if q.dtype == torch.float64:
        limits.append("float64 input (its kernels sum in float32)")
    if q.shape[1] > MAX_DIM:
        limits.append(f"D={q.shape[1]} above {MAX_DIM}")
    if not isinstance(temperature, Tensor) and temperature < smallest:
        limits.append(
            f"temperature={temperature} below {smallest:.4g}, "
            "where exponentials leave float32's range"
        )
    default = "triton" if triton_is_default(q.device) and not limits else "chunked"
    chosen = choose_backend(name, backend, default, BACKENDS)
    if chosen == "triton":
        require_triton(name, q.device)
        if limits:
            raise ValueError(
                f"{name}: backend='triton' does not take {limits[0]}; use backend='auto'"
            )
    return chosen


def chosen_precision(temperature: float | Tensor, precision: str) -> str:
    """What "auto" means for this temperature."""
    if precision != "auto":
        return precision
    return "tf32" if not isinstance(temperature, Tensor) and temperature <= TF32_BELOW else "bf16"


def inner_scale(temperature: float | Tensor, scale: float | None) -> float:
    """The factor inside the operator; a temperature on the device multiplies its result instead."""
    if scale is not None:
        return float(scale)
    return 1.0 if isinstance(temperature, Tensor) else 2.0 * temperature


def wants_gradient(*inputs: float | Tensor) -> bool:
    """Whether the pass has to compute one."""
    return torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in inputs
    )


def check_arguments(
    q: Tensor,
    keys: Tensor,
    temperature: float | Tensor,
    positive_offset: int,
    precision: str,
    name: str,
) -> None:
    """Refuse wrong arguments; every message contains both values."""
    if q.dim() != 2 or keys.dim() != 2:
        raise ValueError(
            f"{name}: q {tuple(q.shape)} and keys {tuple(keys.shape)} must be [B, D] and [N, D]"
        )
    if q.shape[1] != keys.shape[1]:
        raise ValueError(f"{name}: q has D={q.shape[1]} but keys have D={keys.shape[1]}")
    if not (q.is_floating_point() and keys.is_floating_point()):
        raise ValueError(
            f"{name}: q is {q.dtype} and keys are {keys.dtype}; both must be floating point"
        )
    if q.device != keys.device:
        raise ValueError(f"{name}: q is on {q.device} but keys are on {keys.device}")
    if q.shape[0] < 1 or q.shape[1] < 1:
        raise ValueError(f"{name}: q {tuple(q.shape)} has no rows or no columns")

    if isinstance(temperature, Tensor):
        if (
            temperature.dim() != 0
            or not temperature.is_floating_point()
            or temperature.device != q.device
        ):
            raise ValueError(
                f"{name}: temperature is {temperature.dtype} {tuple(temperature.shape)} on "
                f"{temperature.device}; "
                f"it must be a floating-point scalar on {q.device}"
            )
    elif not temperature > 0:
        raise ValueError(f"{name}: temperature={temperature} must be positive")

    if positive_offset < 0 or positive_offset + q.shape[0] > keys.shape[0]:
        raise ValueError(
            f"{name}: positives {positive_offset}..{positive_offset + q.shape[0] - 1} "
            f"are outside the {keys.shape[0]} keys"
        )
    if precision not in ("auto", *PRECISIONS):
        raise ValueError(f"{name}: precision={precision!r} is none of {('auto', *PRECISIONS)}")
