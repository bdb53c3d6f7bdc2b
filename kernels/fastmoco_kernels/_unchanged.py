"""Whether tensors are as they were when a plan was made, in a few dozen nanoseconds a tensor.

A plan (which tensors share a launch, which take the plain path) depends on the type, dtype, device,
shape and strides of every tensor, not on which objects they are. A caller may change any of these
under the same Python object and at the same address: `p.data = p.data.t()`, `module.half()`, a
block of memory that the allocator returns again. So every call compares all of them. Addresses are
not compared here: a tensor may move, and `PointerTable.refresh` follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_GUARDED = ((2, 11), (2, 14))
"""Versions of torch whose private `TensorGuards` is tested here; others take the plain path."""


class Unchanged:
    """A comparison with some tensors as they are now; holds none of them.

    Args:
        tensors: in the order in which they are compared later.

    Example:
        >>> import torch
        >>> weight = torch.zeros(2, 2)
        >>> same = Unchanged([weight])
        >>> same.holds([torch.ones(2, 2)]), same.holds([weight.t()])
        (True, False)
        >>> same.holds([torch.zeros(2, 2).half()])
        False
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._count = len(tensors)
        self._check = guards(tensors) if tensors and _has_guards() else plain(tensors)

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the tensors match one by one in type, dtype, device, shape and strides.

        Also False where the compiled comparison cannot decide: another autocast or inference mode,
        another `requires_grad`. The caller then makes a new plan, which is always right.
        """
        return len(tensors) == self._count and self._check(*tensors)


def plain(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """The comparison in Python: the reference of the tests, and the path of other versions."""
    known = _facts(tensors)
    return lambda *now: _facts(now) == known


def guards(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """The same in compiled code: what torch.compile checks of its inputs before every call."""
    from torch._C._dynamo.guards import TensorGuards

    sizes: Any = [list(tensor.shape) for tensor in tensors]
    strides: Any = [list(tensor.stride()) for tensor in tensors]
    check: Callable[..., bool] = TensorGuards(
        *tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides
    ).check
    return check


def _facts(tensors: Sequence[Tensor]) -> list[tuple[object, ...]]:
    return [(type(t), t.dtype, t.device, t.shape, t.stride(), t.requires_grad) for t in tensors]


def _has_guards() -> bool:
    major, minor = torch.__version__.split(".")[:2]
    return _GUARDED[0] <= (int(major), int(minor)) < _GUARDED[1]
