"""A model of a fusing compiler: the kernels that it makes of a graph, and the
bytes that each of them moves.

The graph is the real one: Dynamo's and AOT autograd's with inductor's decompositions, joint passes
and partitioner, so the choice of kept and recomputed tensors is that of torch.compile. Only the
last stage, from operations to kernels, is modelled, because inductor needs a GPU for it:

* Products, convolutions, attention and custom operators are a kernel each, reading inputs and
  writing outputs once.
* A pointwise operation has no cost of its own: it is computed inside every kernel that needs it.
  Its value is written only if a product or the caller reads it, or if several kernels read it and
  it has more than four inputs.
* A value that is written and a reduction over trailing dimensions ("rows") make one kernel with
  adjacent ones of the same size, unless another kernel has to run in between.
* A reduction over leading dimensions ("columns": gradients of biases and norm weights) is a
  separate kernel, shared by those over the same rows that read a common tensor. Newer inductors
  fuse some of these into the rows; the model does not.
* Views are free; concatenation is pointwise; an operation with several results writes all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_map_only

from benchmarks.op_counts import Counts, flops_of, kind_of, tensor_bytes, tensors

MANY_READS = 4
"""Inputs above which a value that several kernels use is written once instead of computed in each
(inductor's default)."""
REDUCTIONS = (
    "sum",
    "mean",
    "amax",
    "amin",
    "var_mean",
    "var",
    "prod",
    "argmax",
    "argmin",
    "any",
    "all",
)
POINTWISE = (
    "convert_element_type",
    "fma",
    "clone",
    "cat",
    "_to_copy",
    "copy",
    "copy_",
    "where",
    "select_scatter",
)
POINTWISE_TOO = (
    "slice_scatter",
    "constant_pad_nd",
    "full",
    "full_like",
    "zeros",
    "zeros_like",
    "ones",
    "iota",
    "arange",
)
VIEWS = ("_unsafe_view", "reshape", "expand_as", "view_as", "_reshape_alias")
ROWS, COLUMNS, EXTERNAL = "fused rows", "column sums", "external"


@dataclass(eq=False)
class Kernel:
    """One launch.

    Attributes:
        kind: `ROWS`, "fused pointwise", `COLUMNS`, or what an external operation is reported as.
        size: number of elements that it processes.
        made: nodes whose values it computes and may have to write.
        reads: bytes of every buffer that its members read.
        rests: sizes of the results of its reductions.
    """

    kind: str
    size: int
    made: list[Node]
    reads: dict[Node, float]
    rests: set[int] = field(default_factory=set)
    flops: float = 0.0


class FusedGraph:
    """The kernels of a graph.

    Args:
        graph: a graph of aten operations whose nodes carry fake values.
    """

    def __init__(self, graph: GraphModule) -> None:
        self._nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
        self._output = next(node for node in graph.graph.nodes if node.op == "output")
        self._returned = {_buffer(node) for node in self._output.all_input_nodes}
        self._written: set[Node] = set()
        self._memo: dict[Node, dict[Node, float]] = {}
        for node in self._nodes:
            if _is_pointwise(node) and self._must_write(node):
                self._written.add(node)
        self.kernels = [
            self._kernel(node)
            for node in self._nodes
            if not _is_view(node) and (not _is_pointwise(node) or node in self._written)
        ]
        self._fuse()

    def counts(self) -> Counts:
        """Kernels, bytes and FLOPs by kind."""
        found = Counts()
        for kernel in self.kernels:
            found.add(kernel.kind, self.bytes_of(kernel), kernel.flops)
        return found

    def bytes_of(self, kernel: Kernel) -> float:
        """Buffers that a kernel reads from others and writes for others."""
        made = set(kernel.made)
        read = sum(
            min(size, _bytes(buffer)) for buffer, size in kernel.reads.items() if buffer not in made
        )
        others = {buffer for other in self.kernels if other is not kernel for buffer in other.reads}
        return read + sum(_bytes(node) for node in made if node in others or node in self._returned)

    def _must_write(self, node: Node) -> bool:
        if node in self._returned:
            return True
        users = _users(node)
        if any(not _is_pointwise(user) and not _reduction(user) for user in users):
            return True
        return len(users) > 1 and len(self._reads(node)) > MANY_READS

    def _reads(self, node: Node) -> dict[Node, float]:
        """Buffers that computing a node reads, with bytes; pointwise values that are not written
        are replaced by their inputs.
        """
        if node in self._memo:
            return self._memo[node]
        found: dict[Node, float] = {}
        for argument in node.all_input_nodes:
            value, source = _value(argument), _buffer(argument)
            if value is None:
                continue
            if _is_pointwise(source) and source not in self._written:
                share = min(1.0, value.numel() / max(1, _value(source).numel()))
                for buffer, size in self._reads(source).items():
                    found[buffer] = found.get(buffer, 0.0) + share * size
            else:
                found[source] = found.get(source, 0.0) + min(tensor_bytes(value), _bytes(source))
        found = {buffer: min(size, _bytes(buffer)) for buffer, size in found.items()}
        self._memo[node] = found
        return found

    def _kernel(self, node: Node) -> Kernel:
        reads, reduction = dict(self._reads(node)), _reduction(node)
        if reduction:
            source = _value(node.all_input_nodes[0])
            result = tensors(node.meta["val"])[0]
            kind = ROWS if reduction == ROWS else COLUMNS
            return Kernel(kind, source.numel(), [node], reads, {result.numel()})
        if _is_pointwise(node):
            return Kernel("fused pointwise", _value(node).numel(), [node], reads)
        args, kwargs = tree_map_only(
            Node, lambda arg: arg.meta.get("val"), (node.args, node.kwargs)
        )
        flops = flops_of(node.target, args, kwargs, node.meta.get("val"))
        return Kernel(
            kind_of(node.target, flops) if flops else EXTERNAL, 0, [node], reads, flops=flops
        )

    def _fuse(self) -> None:
        changed = True
        while changed:
            changed = False
            for i, first in enumerate(self.kernels):
                for second in self.kernels[i + 1 :]:
                    if self._may_fuse(first, second):
                        self._merge(first, second)
                        changed = True
                        break
                if changed:
                    break

    def _may_fuse(self, first: Kernel, second: Kernel) -> bool:
        if not first.size or not second.size:
            return False
        feeds = any(node in second.reads for node in first.made)
        if COLUMNS in (first.kind, second.kind):
            both = (
                first.kind == second.kind
                and first.size == second.size
                and first.rests == second.rests
            )
            after = (
                feeds
                and first.kind == COLUMNS
                and second.size in first.rests
                and second.kind != ROWS
            )
            alike = (
                both and not feeds and not first.reads.keys().isdisjoint(second.reads)
            ) or after
        else:
            alike = (
                first.size == second.size
                or second.size in first.rests
                or first.size in second.rests
            )
            alike = alike and (feeds or not first.reads.keys().isdisjoint(second.reads))
        return alike and not self._between(first, second)

    def _between(self, first: Kernel, second: Kernel) -> bool:
        """Whether a third kernel depends on one and the other depends on it, in either order."""
        makers = {node: kernel for kernel in self.kernels for node in kernel.made}

        def reaches(source: Kernel, goal: Kernel) -> bool:
            """Whether `goal` depends on `source` by way of another kernel."""
            seen: set[int] = set()
            waiting = [
                maker
                for read in goal.reads
                if (maker := makers.get(read)) not in (None, source, goal)
            ]
            while waiting:
                kernel = waiting.pop()
                if kernel is None or id(kernel) in seen:
                    continue
                seen.add(id(kernel))
                if kernel is source:
                    return True
                waiting += [makers[read] for read in kernel.reads if read in makers]
            return False

        return reaches(first, second) or reaches(second, first)

    def _merge(self, first: Kernel, second: Kernel) -> None:
        for buffer, size in second.reads.items():
            first.reads[buffer] = min(_bytes(buffer), first.reads.get(buffer, 0.0) + size)
        first.made += second.made
        first.rests |= second.rests
        if first.kind != COLUMNS:
            first.kind = ROWS if ROWS in (first.kind, second.kind) else first.kind
        first.size = max(first.size, second.size)
        self.kernels.remove(second)


def _name(node: Node) -> str:
    target = node.target
    return (
        str(target._overloadpacket.__name__)
        if isinstance(target, torch._ops.OpOverload)
        else str(target)
    )


def _is_view(node: Node) -> bool:
    if node.op != "call_function":
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return getattr(node.target, "__name__", "") == "getitem"
    return node.target.is_view or _name(node) in VIEWS


def _is_pointwise(node: Node) -> bool:
    if (
        node.op != "call_function"
        or _is_view(node)
        or not isinstance(node.target, torch._ops.OpOverload)
    ):
        return False
    return (
        torch.Tag.pointwise in node.target.tags
        or _name(node) in POINTWISE
        or _name(node) in POINTWISE_TOO
    )


def _reduction(node: Node) -> str:
    """`ROWS`, `COLUMNS`, or "" if the node is not a reduction."""
    if node.op != "call_function" or _name(node) not in REDUCTIONS or _is_pointwise(node):
        return ""
    value = _value(node.all_input_nodes[0])
    dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if dims is None or value is None:
        return COLUMNS
    reduced = {dim % value.ndim for dim in ([dims] if isinstance(dims, int) else dims)} or set(
        range(value.ndim)
    )
    return ROWS if reduced == set(range(value.ndim - len(reduced), value.ndim)) else COLUMNS


def _buffer(node: Node) -> Node:
    """The node that allocated the memory of a view."""
    while _is_view(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _users(node: Node) -> list[Node]:
    """Operations that read a node's value, through views."""
    found: list[Node] = []
    for user in node.users:
        found += _users(user) if _is_view(user) else [user]
    return found


def _value(node: Node) -> Any:
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else None


def _bytes(node: Node) -> float:
    value = node.meta.get("val")
    return (
        math.fsum(tensor_bytes(tensor) for tensor in tensors(value)) if value is not None else 0.0
    )
