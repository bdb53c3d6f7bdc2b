"""The momentum (EMA) update of the momentum encoder.

`average <- average + (1 - momentum) * (source - average)`: the lerp form. It equals
`m * a + (1 - m) * s` in exact arithmetic, and in floating point it leaves `average` untouched where
it equals `source`, so frozen tensors never drift. Averages must be stored in float32: near momentum
1 an increment is below half a unit in the last place of bf16 and vanishes, whatever type the
arithmetic uses.

On CUDA all tensors are updated by one launch over a table of their addresses (`tables.py`), built
on the first call and refreshed where a tensor moved. The momentum encoder of a ViT-S has 150
tensors, most of them tiny: one launch per tensor costs more than moving 12 bytes a parameter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmoco_kernels.backends import choose_backend, require_triton, triton_is_default
from fastmoco_kernels.ema.plan import known_plan, new_plan
from fastmoco_kernels.ema.reference import ema_update_foreach_, ema_update_reference_
from fastmoco_kernels.tensors import check_lists, local, traced

WIDE = (torch.float32, torch.float64)
BACKENDS = ("triton", "foreach", "reference")
OP = "ema_update_"


@torch.no_grad()
def ema_update_(
    averages: Sequence[Tensor],
    sources: Sequence[Tensor],
    momentum: float | Tensor,
    *,
    backend: str = "auto",
) -> None:
    """Move every average towards its source, in place (Chen, Xie, He 2021, section 3).

    `average <- average + (1 - momentum) * (source - average)`

    Args:
        averages: tensors of float32 or float64, any shape and strides, on one device; changed in
            place. Of a DTensor the local shard is used.
        sources: as many floating-point tensors, each of its average's shape and device; read only.
        momentum: in [0, 1]: 1 keeps the averages, 0 copies the sources. A tensor of one element is
            read on the device, without a synchronisation and without a check of its range; float64
            keeps `1 - momentum` exact.
        backend: `"auto"` (triton on CUDA, foreach elsewhere), `"triton"`, `"foreach"` or
            `"reference"`.

    Raises:
        ValueError: for different counts, shapes or devices, for averages narrower than float32, for
            a momentum outside [0, 1] or of more than one element.

    Numerics: computed in the averages' dtype; bitwise reproducible; equal tensors stay bitwise
        equal at any momentum; foreach and reference agree bit for bit on a CPU, triton to two units
        in the last place. Autocast changes nothing.
    Memory and cost: `bytes_moved`: 12 bytes a float32 parameter (two reads, one write); no
        allocation where the dtypes agree. Under triton, float64 averages and tensors with gaps or
        with strides unlike their average's take the foreach path.
    Distributed: none; sharded averages are updated shard by shard.

    Example:
        >>> import torch
        >>> from fastmoco_kernels import ema_update_
        >>> averages = [torch.zeros(2)]
        >>> ema_update_(averages, [torch.ones(2)], 0.75); averages[0]
        tensor([0.2500, 0.2500])
    """
    own_averages, own_sources = local(averages), local(sources)
    _check_momentum(own_averages, momentum)
    if not own_averages:
        _check_tensors(own_averages, own_sources)
        return
    device = own_averages[0].device
    default = "triton" if triton_is_default(device) else "foreach"
    chosen = choose_backend(OP, backend, default, BACKENDS)
    if chosen == "triton":
        require_triton(OP, device)
        plan = None if traced() else known_plan(own_averages, own_sources)
        if plan is not None:  # these tensors have been checked
            plan.run(own_averages, own_sources, momentum)
            return
    _check_tensors(own_averages, own_sources)
    run = torch.ops.fastmoco.ema_update_ if traced() else _run
    number, tensor = (0.0, momentum) if isinstance(momentum, Tensor) else (float(momentum), None)
    run(own_averages, own_sources, number, tensor, chosen)


def bytes_moved(elements: int, *, source_bytes: int = 4) -> int:
    """Bytes that one launch reads and writes: average and source in, average out.

    Args:
        elements: of all averages together.
        source_bytes: of one source element.
    """
    return elements * (4 + source_bytes + 4)


def flops(elements: int) -> int:
    """Arithmetic of one launch: a subtraction, a multiplication and an addition an element."""
    return 3 * elements


def _run(
    averages: Sequence[Tensor],
    sources: Sequence[Tensor],
    momentum: float,
    device_momentum: Tensor | None,
    backend: str,
) -> None:
    """The update by one named backend, its arguments checked."""
    value = momentum if device_momentum is None else device_momentum
    if backend == "reference":
        ema_update_reference_(averages, sources, value)
    elif backend == "foreach":
        ema_update_foreach_(averages, sources, value)
    else:
        (known_plan(averages, sources) or new_plan(averages, sources)).run(averages, sources, value)


@torch.library.custom_op("fastmoco::ema_update_", mutates_args=("averages",))
def _ema_update(
    averages: list[Tensor],
    sources: list[Tensor],
    momentum: float,
    device_momentum: Tensor | None,
    backend: str,
) -> None:
    _run(averages, sources, momentum, device_momentum, backend)


@_ema_update.register_fake
def _(
    averages: object, sources: object, momentum: object, device_momentum: object, backend: object
) -> None:
    return None


def _check_momentum(averages: Sequence[Tensor], momentum: float | Tensor) -> None:
    if isinstance(momentum, Tensor):
        if momentum.numel() != 1:
            raise ValueError(f"{OP}: momentum has {momentum.numel()} elements; it needs 1")
        if averages and momentum.device != averages[0].device:
            raise ValueError(
                f"{OP}: momentum is on {momentum.device} but averages[0] is on {averages[0].device}"
            )
    elif not 0 <= momentum <= 1:
        raise ValueError(f"{OP}: momentum={momentum} is outside [0, 1]")


def _check_tensors(averages: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Refuse pairs of tensors that do not fit; every message contains both values."""
    # The usual case, in three comparisons.
    if (
        [average.shape for average in averages] == [source.shape for source in sources]
        and len({tensor.device for tensors in (averages, sources) for tensor in tensors}) < 2
        and {average.dtype for average in averages} <= set(WIDE)
    ):
        return
    check_lists(OP, "averages", averages, {"sources": sources})
    for i, average in enumerate(averages):
        if average.dtype not in WIDE:
            raise ValueError(
                f"{OP}: averages[{i}] is {average.dtype}; near momentum 1 only one of {WIDE} moves"
            )
