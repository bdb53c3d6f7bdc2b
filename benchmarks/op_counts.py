"""Operations of eager PyTorch, counted as they run: bytes read and written, and FLOPs of products.

For fake tensors, which have shapes and storages but no values. A view costs nothing. Every other
operation reads each input once and writes each output once, as with tensors far larger than a
cache.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from fastmoco.planning.costs import OWN_FLOPS

PRODUCTS, ATTENTION, FLOAT8 = "products", "attention", "float8 products"
KINDS = {
    "addmm": PRODUCTS,
    "add": "add",
    "add_": "add",
    "_to_copy": "casts",
    "copy_": "casts",
    "native_layer_norm": "layer norm",
    "native_layer_norm_backward": "layer norm",
    "gelu": "GELU",
    "gelu_backward": "GELU",
    "sum": "bias sums",
    "clone": "stack, cat, clone",
    "stack": "stack, cat, clone",
    "cat": "stack, cat, clone",
    "residual_norm": "layer norm",
    "residual_norm_backward": "layer norm",
    "block_norm": "layer norm",
    "block_norm_backward": "layer norm",
    "block_gelu_backward": "GELU",
    "block_stack_qkv": "stack, cat, clone",
}
"""Names of operations in the report; products and attention are recognized by
their FLOPs, others are "other"."""


@dataclass(slots=True)
class Cost:
    """Total cost of some operations."""

    operations: int = 0
    bytes: float = 0.0
    flops: float = 0.0

    def add(self, other: Cost, times: float = 1.0) -> None:
        """Add another cost, the given number of times."""
        self.operations += round(other.operations * times)
        self.bytes += other.bytes * times
        self.flops += other.flops * times


@dataclass(slots=True)
class Counts:
    """Costs by kind."""

    by_kind: defaultdict[str, Cost] = field(default_factory=lambda: defaultdict(Cost))

    def add(self, kind: str, size: float, flops: float = 0.0) -> None:
        """Add one operation."""
        self.by_kind[kind].add(Cost(1, size, flops))

    def merge(self, other: Counts, times: float = 1.0) -> None:
        """Add other counts, the given number of times."""
        for kind, cost in other.by_kind.items():
            self.by_kind[kind].add(cost, times)

    @property
    def total(self) -> Cost:
        """Total of all kinds."""
        found = Cost()
        for cost in self.by_kind.values():
            found.add(cost)
        return found


class OperationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts every operation while it is active.

    Attributes:
        counts: the costs so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = Counts()
        self._paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing inside, because the caller counts it in another way."""
        before = self._paused
        self._paused = True
        try:
            yield
        finally:
            self._paused = before

    @contextmanager
    def off(self) -> Iterator[None]:
        """Leave the stack of modes inside; only the innermost mode can."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            self.__enter__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._paused:
            return out
        inputs, outputs = tensors((args, kwargs)), tensors(out)
        if _is_free(func, inputs, outputs):
            return out
        flops = flops_of(func, args, kwargs or {}, out)
        moved = sum(map(tensor_bytes, inputs)) + sum(map(tensor_bytes, outputs))
        self.counts.add(kind_of(func, flops), moved, flops)
        return out


def tensors(tree: Any) -> list[Tensor]:
    """The tensors of a tree of arguments or results."""
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor)]


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor in memory: an expanded dimension is stored once."""
    numel = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numel *= size if stride else 1
    return numel * tensor.element_size()


def flops_of(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    """FLOPs of a product or of attention; 0 for other operations. A multiply-add counts as two."""
    packet = func._overloadpacket if isinstance(func, torch._ops.OpOverload) else func
    if packet in OWN_FLOPS:
        shaped: Any = OWN_FLOPS[packet]
        return float(shaped(*(arg.shape if isinstance(arg, Tensor) else arg for arg in args)))
    count: Any = flop_registry.get(packet)
    if count is not None:
        return float(count(*args, **kwargs, out_val=out))
    return 0.0


def kind_of(func: Any, flops: float) -> str:
    """The name of an operation in the report."""
    name = func._overloadpacket.__name__ if isinstance(func, torch._ops.OpOverload) else str(func)
    if flops:
        return ATTENTION if "attention" in name else FLOAT8 if name == "_scaled_mm" else PRODUCTS
    return KINDS.get(name, "other")


def _is_free(func: Any, inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> bool:
    """Whether an operation moves no bytes: views, and allocations of uninitialised memory."""
    if "empty" in func._overloadpacket.__name__:
        return True
    if func._schema.is_mutable:
        return False
    known = {tensor.untyped_storage()._cdata for tensor in inputs}
    return all(tensor.untyped_storage()._cdata in known for tensor in outputs)
