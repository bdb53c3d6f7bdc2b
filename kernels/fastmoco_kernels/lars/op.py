"""LARS over any number of tensors in two sweeps, on whole tensors and on shards.

1. `lars_squares`: `||p||^2` and `||g + weight_decay * p||^2` of every tensor.
2. `lars_update_`: reads the sums, computes the ratio, updates buffer and parameter.

Why two sweeps, and what sharded parameters need between them: kernels/README.md, "Design notes".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastmoco_kernels.backends import choose_backend, require_triton, triton_is_default
from fastmoco_kernels.lars.foreach import squares_foreach, update_foreach_
from fastmoco_kernels.lars.reference import lars_step_reference_
from fastmoco_kernels.tensors import check_lists, same_layout, traced

BACKENDS = ("triton", "foreach")
OP = "lars_step_"
WIDE = (torch.float32, torch.float64)


@torch.no_grad()
def lars_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    *,
    lr: float | Tensor,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    trust_coefficient: float = 0.001,
    adapt: Sequence[bool] | None = None,
    lr_in_buffer: bool = False,
    reduce_squares: Callable[[Tensor], object] | None = None,
    found_inf: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """One step of layer-wise adaptive rate scaling, in place on parameters and buffers.

    For a tensor of two or more dimensions `u = g + weight_decay * p`, then
    `u *= trust_coefficient * ||p|| / ||u||` (factor 1 if either norm is 0; no epsilon); for others,
    biases and norms, `u = g`. Then `b <- momentum * b + u` and `p <- p - lr * b`. You, Gitman,
    Ginsburg 2017, with the rate outside the buffer as in MoCo v3's ResNet runs and in BYOL. With
    `lr_in_buffer` it is inside, as in SimCLR: `b <- momentum * b + lr * u` and `p <- p - b`. The
    two differ where the rate changes.

    Args:
        params: T tensors of float32 or float64, any shape, one device; changed in place.
        grads: as many, each of its parameter's shape and device; narrower ones are widened first.
        momentum_buffers: as many, of shape and dtype of the parameters, zeros before the first
            step; changed in place.
        lr: >= 0, a number or a 0-dimensional tensor: under a CUDA graph or `torch.compile` a tensor
            follows its schedule.
        momentum: in [0, 1).
        weight_decay: >= 0, added to the gradient before it is scaled.
        trust_coefficient: > 0.
        adapt: for each tensor, whether it is decayed and scaled; default: tensors of two or more
            dimensions. SimCLR and BYOL exclude biases and norms by name instead.
        lr_in_buffer: whether the rate is a factor of what the buffer accumulates.
        reduce_squares: for tensors that are shards: called with the [T, 2] float64 squared norms of
            the local parts; it must add them in place over the ranks that hold the other parts.
        found_inf: one element on the same device; where it is not 0 nothing is changed.
        backend: `"auto"`, `"triton"`, `"foreach"` or `"reference"`.

    Raises:
        ValueError: for different counts, shapes, dtypes or devices, for numbers out of range, for
            an unknown backend, and for `reduce_squares` with `"reference"`.

    Numerics: parameters' dtype, norms in float64 (Triton: float32 inside a chunk, float64 over
        chunks); bitwise reproducible. Autocast changes nothing. Agrees with the reference to
        rounding.
    Memory and cost: 28 bytes a float32 parameter (`lars_bytes`); no copy of the model with Triton,
        one with foreach.
    Distributed: none, or what `reduce_squares` does.

    Example:
        >>> import torch
        >>> from fastmoco_kernels import lars_step_
        >>> p, g, b = torch.eye(2), torch.eye(2), torch.zeros(2, 2)
        >>> lars_step_([p], [g], [b], lr=100.0); p.diagonal()
        tensor([0.9000, 0.9000])
    """
    check_numbers(lr, momentum, weight_decay, trust_coefficient)
    check_tensors(params, grads, momentum_buffers, found_inf)
    if not params:
        return
    flags = by_dimensions(params) if adapt is None else list(adapt)
    if len(flags) != len(params):
        raise ValueError(f"{OP}: {len(params)} params but {len(flags)} flags in adapt")

    if backend == "reference":
        numbers = {
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        if reduce_squares is not None:
            raise ValueError(
                "lars_step_: backend='reference' takes whole tensors; "
                "reduce_squares needs another backend"
            )
        if found_inf is None or not bool(found_inf != 0):
            lars_step_reference_(
                params,
                grads,
                momentum_buffers,
                lr=float(lr),
                adapt=flags,
                lr_in_buffer=lr_in_buffer,
                **numbers,
            )
        return

    chosen = resolve_backend(backend, params, momentum_buffers)
    squares = lars_squares(params, grads, weight_decay, flags, backend=chosen)
    if reduce_squares is not None:
        reduce_squares(squares)
    lars_update_(
        params,
        grads,
        momentum_buffers,
        squares,
        flags,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        trust_coefficient=trust_coefficient,
        found_inf=found_inf,
        lr_in_buffer=lr_in_buffer,
        backend=chosen,
    )


def by_dimensions(params: Sequence[Tensor]) -> list[bool]:
    """The tensors that are adapted by default: not biases and norms."""
    return [param.ndim > 1 for param in params]


def check_numbers(
    lr: float | Tensor, momentum: float, weight_decay: float, trust_coefficient: float
) -> None:
    """Refuse numbers out of range; of a learning rate in a tensor only the size is checked."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"{OP}: lr has {lr.numel()} elements; it needs 1")
    elif not lr >= 0:
        raise ValueError(f"{OP}: lr={lr} is below 0")
    if not 0 <= momentum < 1:
        raise ValueError(f"{OP}: momentum={momentum} is outside [0, 1)")
    if not weight_decay >= 0:
        raise ValueError(f"{OP}: weight_decay={weight_decay} is below 0")
    if not trust_coefficient > 0:
        raise ValueError(f"{OP}: trust_coefficient={trust_coefficient} is not above 0")


def check_tensors(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    found_inf: Tensor | None,
) -> None:
    """Refuse lists, shapes, types and devices that do not fit together."""
    check_lists(OP, "params", params, {"grads": grads, "momentum_buffers": momentum_buffers})
    for i, (param, grad, buffer) in enumerate(zip(params, grads, momentum_buffers, strict=True)):
        if param.dtype not in WIDE:
            raise ValueError(
                f"{OP}: params[{i}] is {param.dtype}; small steps vanish in it: needs one of {WIDE}"
            )
        if not grad.dtype.is_floating_point:
            raise ValueError(f"{OP}: grads[{i}] is {grad.dtype}; it must be floating point")
        if param.dtype != params[0].dtype or buffer.dtype != param.dtype:
            raise ValueError(
                f"{OP}: params[{i}] is {param.dtype}, momentum_buffers[{i}] {buffer.dtype}, "
                f"params[0] {params[0].dtype}; "
                "all must have one dtype"
            )
    if found_inf is not None and params:
        if found_inf.numel() != 1:
            raise ValueError(f"{OP}: found_inf has {found_inf.numel()} elements; it needs 1")
        if found_inf.device != params[0].device:
            raise ValueError(
                f"{OP}: found_inf is on {found_inf.device}, the parameters on {params[0].device}"
            )


def resolve_backend(
    backend: str, params: Sequence[Tensor], momentum_buffers: Sequence[Tensor]
) -> str:
    """`"triton"` or `"foreach"`; refuses what cannot run on these devices or strides."""
    device = params[0].device
    odd = [
        i
        for i, (p, b) in enumerate(zip(params, momentum_buffers, strict=True))
        if not same_layout(p, b)
    ]
    default = "triton" if triton_is_default(device) and not odd else "foreach"
    chosen = choose_backend("lars_step_", backend, default, BACKENDS)
    if chosen == "triton":
        require_triton("lars_step_", device)
        if odd:
            strides = [tuple(tensors[odd[0]].stride()) for tensors in (params, momentum_buffers)]
            raise ValueError(
                "lars_step_: backend='triton' needs dense tensors and buffers of equal strides; "
                f"parameter {odd[0]} has "
                f"strides {strides[0]}, its buffer {strides[1]}; use backend='auto'"
            )
    return chosen


def lars_bytes(params: Sequence[Tensor], adapt: Sequence[bool] | None = None) -> int:
    """Bytes that one step must move.

    The first pass reads p and g where scaled; the second reads p, g and b and writes p and b.

    28 a float32 element of a tensor that is adapted, 20 of others. The [T, 2] sums and
    the table add some hundred bytes a tensor, the partial sums 16 a chunk of 2048 elements; neither
    is counted.
    """
    return sum(
        (7 if adapted else 5) * param.numel() * param.element_size()
        for param, adapted in zip(params, adapt or by_dimensions(params), strict=True)
    )


def lars_squares(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    weight_decay: float,
    adapt: Sequence[bool],
    *,
    backend: str,
) -> Tensor:
    """First pass: [T, 2] float64 of `||p||^2` and `||g + weight_decay * p||^2`, 0 where not scaled.

    Args as in `lars_step_`, checked there; `backend` is `"triton"` or `"foreach"`.
    """
    if traced():
        squares: Tensor = torch.ops.fastmoco.lars_squares(
            list(params), list(grads), weight_decay, list(adapt), backend
        )
        return squares
    return _run_squares(params, grads, weight_decay, adapt, backend)


def lars_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    squares: Tensor,
    adapt: Sequence[bool],
    *,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    trust_coefficient: float,
    found_inf: Tensor | None,
    lr_in_buffer: bool = False,
    backend: str,
) -> None:
    """Second pass: update buffers and parameters, given `lars_squares` of whole tensors."""
    rate = lr if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64)
    numbers = (
        rate,
        list(adapt),
        momentum,
        weight_decay,
        trust_coefficient,
        found_inf,
        lr_in_buffer,
        backend,
    )
    if traced():
        torch.ops.fastmoco.lars_update_(
            list(params), list(grads), list(momentum_buffers), squares, *numbers
        )
    else:
        _run_update_(params, grads, momentum_buffers, squares, *numbers)


def _run_squares(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    weight_decay: float,
    adapt: Sequence[bool],
    backend: str,
) -> Tensor:
    if backend == "triton":
        from fastmoco_kernels.lars.launch import squares_triton

        return squares_triton(params, grads, weight_decay, adapt)
    return squares_foreach(params, grads, weight_decay, adapt)


def _run_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    squares: Tensor,
    lr: Tensor,
    adapt: Sequence[bool],
    momentum: float,
    weight_decay: float,
    trust_coefficient: float,
    found_inf: Tensor | None,
    lr_in_buffer: bool,
    backend: str,
) -> None:
    if backend == "triton":
        from fastmoco_kernels.lars.launch import update_triton_ as update_
    else:
        update_ = update_foreach_
    update_(
        params,
        grads,
        momentum_buffers,
        squares,
        lr,
        adapt,
        momentum=momentum,
        weight_decay=weight_decay,
        trust_coefficient=trust_coefficient,
        found_inf=found_inf,
        lr_in_buffer=lr_in_buffer,
    )


@torch.library.custom_op("fastmoco::lars_squares", mutates_args=())
def _squares(
    params: list[Tensor],
    grads: list[Tensor],
    weight_decay: float,
    adapt: list[bool],
    backend: str,
) -> Tensor:
    return _run_squares(params, grads, weight_decay, adapt, backend)


@_squares.register_fake
def _(
    params: list[Tensor],
    grads: list[Tensor],
    weight_decay: float,
    adapt: list[bool],
    backend: str,
) -> Tensor:
    return params[0].new_empty((len(params), 2), dtype=torch.float64)


@torch.library.custom_op("fastmoco::lars_update_", mutates_args=("params", "momentum_buffers"))
def _update(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    squares: Tensor,
    lr: Tensor,
    adapt: list[bool],
    momentum: float,
    weight_decay: float,
    trust_coefficient: float,
    found_inf: Tensor | None,
    lr_in_buffer: bool,
    backend: str,
) -> None:
    numbers = (
        lr,
        adapt,
        momentum,
        weight_decay,
        trust_coefficient,
        found_inf,
        lr_in_buffer,
        backend,
    )
    _run_update_(params, grads, momentum_buffers, squares, *numbers)


@_update.register_fake
def _(*arguments: object) -> None:
    return None
