"""Operators and host waits of a step, counted on any device as they are called.

On a CPU nothing waits for the device, but the calls that would on a GPU are the same: reading a
number (`item`, `bool`, `tolist`), copying to the host, comparing tensors, and operators whose
output has a size that depends on values. So a run on a CPU shows whether a step would wait.

Compiled code is not counted: under such a mode torch runs it uncompiled.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fastmoco_pipelines.loading.step_parts import Collector

_WAITS = {
    "_local_scalar_dense": "item",
    "equal": "equal",
    "is_nonzero": "bool",
    "nonzero": "nonzero",
    "masked_select": "masked_select",
    "_unique2": "unique",
    "unique_dim": "unique",
    "unique_consecutive": "unique",
    "repeat_interleave": "repeat_interleave",
    "bincount": "bincount",
}
"""Operators whose caller waits for the device -> their names for people."""
_METHODS: dict[Any, str] = {Tensor.tolist: "tolist", Tensor.cpu: "cpu"}
"""Methods that wait, and that no operator shows for a tensor of the CPU."""
_SIZED_BY_VALUES = ("repeat_interleave",)
"""Operators of `_WAITS` that wait only where they are not given the size of their output."""


class StepCounter:
    """Counts what this thread calls while the context is open.

    Args:
        collector: names the part that a call belongs to; None: all belong to "".

    Attributes:
        operators: calls by part and name of the operator. Views and allocations, which do no work,
            are not counted.
        waits: calls that wait for the device, by part and name.
    """

    def __init__(self, collector: Collector | None = None) -> None:
        self.operators: Counter[tuple[str, str]] = Counter()
        self.waits: Counter[tuple[str, str]] = Counter()
        self._collector = collector
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(_Methods(self))
        self._stack.enter_context(_Operators(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def key(self, name: str) -> tuple[str, str]:
        """The part under way, and a name."""
        part = self._collector.current() if self._collector is not None else None
        return part or "", name

    def by_part(self, counts: Counter[tuple[str, str]]) -> Counter[str]:
        """The sums by part of `operators` or of `waits`."""
        found: Counter[str] = Counter()
        for (part, _), count in counts.items():
            found[part] += count
        return found


class _Methods(TorchFunctionMode):
    def __init__(self, counter: StepCounter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = _METHODS.get(func)
        if name is not None:
            self._counter.waits[self._counter.key(name)] += 1
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, counter: StepCounter) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._overloadpacket.__name__
        wait = _wait(name, args, kwargs)
        if wait is not None:
            self._counter.waits[self._counter.key(wait)] += 1
        if not _is_free(func, name, args, kwargs, out):
            self._counter.operators[self._counter.key(name)] += 1
        return out


def _wait(name: str, args: Any, kwargs: Any) -> str | None:
    """What to call an operator that waits; None for another one."""
    if name in _SIZED_BY_VALUES:
        return None if kwargs.get("output_size") is not None else _WAITS[name]
    if name in _WAITS:
        return _WAITS[name]
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        written = name != "index"
        if masks and not (written and args[2].numel() == 1):  # a single value becomes masked_fill
            return "boolean index"
    if name in ("_to_copy", "copy_"):
        source = args[0] if name == "_to_copy" else args[1]
        target = kwargs.get("device") if name == "_to_copy" else args[0].device
        if target is not None and source.device.type != "cpu" and target.type == "cpu":
            return "copy to the host"
    return None


def _is_free(func: Any, name: str, args: Any, kwargs: Any, out: Any) -> bool:
    """Whether an operator does no work: a view, memory that is not written, nothing with tensors."""
    if "empty" in name:
        return True
    if func._schema.is_mutable:
        return False
    given = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
    made = [leaf for leaf in tree_iter(out) if isinstance(leaf, Tensor)]
    if not made:
        return not given
    known = {leaf.untyped_storage()._cdata for leaf in given}
    return all(leaf.untyped_storage()._cdata in known for leaf in made)
