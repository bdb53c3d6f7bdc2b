"""The momentum (EMA) update of the twin encoder.

``average <- average + (1 - momentum) * (source - average)``: the lerp form. It equals ``m * a + (1 - m) * s`` in exact
arithmetic, and in floating point it leaves ``average`` untouched where it equals ``source``, so frozen tensors never
drift. Averages must be stored in float32: near momentum 1 an increment is below half a unit in the last place of bf16
and vanishes, whatever type the arithmetic uses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmoco_kernels._runtime import choose_backend
from fastmoco_kernels.ema.reference import ema_update_reference_

WIDE = (torch.float32, torch.float64)


@torch.no_grad()
def ema_update_(
    averages: Sequence[Tensor], sources: Sequence[Tensor], momentum: float, *, backend: str = "auto"
) -> None:
    """Move every average towards its source, in place (Chen, Xie, He 2021, section 3).

    Args:
        averages: tensors of float32 or float64, any shape; changed in place.
        sources: as many tensors, each of its average's shape and device; read only.
        momentum: in [0, 1]: 1 keeps the averages, 0 copies the sources.
        backend: ``"auto"``, ``"foreach"`` or ``"reference"``.

    Raises:
        ValueError: for different counts, shapes or devices, for averages narrower than float32, for a momentum
            outside [0, 1].

    Numerics: computed in the averages' dtype; bitwise reproducible; both backends agree bit for bit on a CPU.
    Memory and cost: 12 bytes a float32 parameter (two reads, one write); no allocation where the dtypes agree.
    Distributed: none; sharded twins are updated shard by shard.

    Example:
        >>> import torch
        >>> from fastmoco_kernels import ema_update_
        >>> twin = [torch.zeros(2)]
        >>> ema_update_(twin, [torch.ones(2)], 0.75); twin[0]
        tensor([0.2500, 0.2500])
    """
    _check(averages, sources, momentum)
    if choose_backend("ema_update_", backend, "foreach", ("foreach", "reference")) == "reference":
        ema_update_reference_(averages, sources, momentum)
    elif averages:
        matching = [source.to(average.dtype) for average, source in zip(averages, sources, strict=True)]
        torch._foreach_lerp_(list(averages), matching, 1 - momentum)


def _check(averages: Sequence[Tensor], sources: Sequence[Tensor], momentum: float) -> None:
    """Every way of calling the op wrongly, each with both numbers in its text."""
    if not 0 <= momentum <= 1:
        raise ValueError(f"ema_update_: momentum={momentum} lies outside [0, 1]")
    if len(averages) != len(sources):
        raise ValueError(f"ema_update_: {len(averages)} averages but {len(sources)} sources")
    for i, (average, source) in enumerate(zip(averages, sources, strict=True)):
        if average.shape != source.shape:
            raise ValueError(
                f"ema_update_: average {i} is {tuple(average.shape)} but its source is {tuple(source.shape)}"
            )
        if average.device != source.device:
            raise ValueError(f"ema_update_: average {i} is on {average.device} but its source is on {source.device}")
        if average.dtype not in WIDE:
            raise ValueError(
                f"ema_update_: average {i} is {average.dtype}; near momentum 1 only float32 or wider moves"
            )
