"""Transformer blocks with torch.compile.

Each block is compiled on its own, so that all blocks share one compilation and the hooks of FSDP2
stay outside of it. Shapes are static: the micro-batches of a step have one size, and kernels for a
symbolic batch are slower. Evaluation runs the blocks uncompiled, because its last batch has another
size; the graphs of training are therefore the same with and without it.

torch's partitioner chooses the activations that a compiled block keeps for its backward. Its
setting `torch._functorch.config.activation_memory_budget` is a share of the default: 1 keeps the
inputs of all matrix products, less first recomputes element-wise operations (layer norms, GELU),
then whole products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastmoco.models.blocks import Block
from fastmoco_kernels.backends import triton_is_default

BUDGETS = (1.0, 0.9)
"""Budgets that a plan chooses from. A smaller one recomputes products, where a second forward of a
micro-batch costs the same."""
GRAPHS = 32
"""Graphs of a block that torch.compile may hold: with and without gradient, by encoder and size of
a micro-batch. Two sizes reach its own limit of 8, after which it silently computes uncompiled."""
METHODS = ("forward", "class_row")


class CompileChoice(NamedTuple):
    """Whether blocks are compiled, and why."""

    compiled: bool
    reason: str

    def __str__(self) -> str:
        return f"{'compiled' if self.compiled else 'not compiled'} ({self.reason})"


def choose_compile(
    wanted: Literal["auto"] | bool, device: torch.device, precision: str
) -> CompileChoice:
    """Resolve `model.compile` for a device: `auto` compiles where torch generates Triton kernels.

    Args:
        wanted: the value in the config.
        device: of the model.
        precision: "bf16", "fp32" or "fp64".
    """
    if wanted != "auto":
        return CompileChoice(wanted, "set in the config")
    if device.type != "cuda":
        return CompileChoice(False, "auto compiles on CUDA only")
    if precision == "fp64":
        return CompileChoice(False, "auto does not compile fp64, which is for comparing runs")
    if not triton_is_default(device):
        return CompileChoice(False, "needs Triton and compute capability 8.0")
    return CompileChoice(True, "auto, on CUDA")


def compile_blocks(objective: nn.Module, *, budget: float = 1.0) -> None:
    """Compile every transformer block in place; names, hooks and state do not change.

    Args:
        objective: or any module that contains lists of blocks named `blocks`. In evaluation mode
            they run uncompiled.
        budget: share of the activations that the backward keeps, in [0, 1]; see `BUDGETS`.
    """
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS)
    # Dynamo would split every block at the borders of DDP's buckets. Blocks are small, so gradients
    # are sent in time anyway.
    dynamo.optimize_ddp = False
    options: dict[str, Any] = {"backend": _within(budget)} if budget < 1 else {}
    for block in _blocks(objective):
        # One tensor between blocks, as in `traced_blocks`: with two inputs both would be kept, but
        # their sum suffices.
        block.__dict__["hands_on_parts"] = False
        for name in METHODS:
            plain = getattr(block, name)
            compiled = torch.compile(plain, dynamic=False, **options)
            setattr(block, name, _in_training(block, compiled, plain))


def _blocks(objective: nn.Module) -> list[nn.Module]:
    lists = [getattr(part, "blocks", None) for part in objective.modules()]
    return [block for blocks in lists if isinstance(blocks, nn.ModuleList) for block in blocks]


def _in_training(
    block: nn.Module, compiled: Callable[..., Any], plain: Callable[..., Any]
) -> Callable[..., Any]:
    def forward(*stream: Tensor | None) -> Any:
        return (compiled if block.training else plain)(*stream)

    return forward


def _within(budget: float) -> Callable[[torch.fx.GraphModule, Any], Any]:
    """torch's compiler with an activation budget. The setting is read when a graph is split, so it
    affects these graphs only.
    """

    def inductor(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        import torch._functorch.config as functorch
        from torch._inductor.compile_fx import compile_fx

        with functorch.patch(activation_memory_budget=budget):
            return compile_fx(graph, inputs)

    return inductor


@contextmanager
def traced_blocks(objective: nn.Module, *, budget: float = 1.0) -> Iterator[None]:
    """Run blocks operation by operation but keep the activations that compiled blocks keep, to
    count them on fake tensors.

    The graphs are those of the compiler before fusion, with the same split into forward and
    backward and the same tensors kept in between. The split counts the inputs of a graph as free,
    so blocks pass on one tensor: of stream and branch it would keep both. Without gradient nothing
    is kept, and blocks run as they do uncompiled. Run each call once before counting.

    Args:
        objective: its blocks are replaced within the context.
        budget: as for `compile_blocks`.
    """
    graphs: dict[Any, Callable[..., Any]] = {}
    blocks = [
        block
        for block in _blocks(objective)
        if isinstance(block, Block) and block.recompute == "none"
    ]
    try:
        for block in blocks:
            block.hands_on_parts = False
            for name in METHODS:
                block.__dict__[name] = _traced(block, name, budget, graphs)
        yield
    finally:
        for block in blocks:
            block.hands_on_parts = True
            for name in METHODS:
                del block.__dict__[name]


def _traced(
    block: Block, name: str, budget: float, graphs: dict[Any, Callable[..., Any]]
) -> Callable[..., Any]:
    """A method of a block through graphs shared by all blocks, one for each kind of call."""
    import torch._functorch.config as functorch
    from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    plain = getattr(type(block), name)
    parameters = dict(block.named_parameters())

    def split(*joint: Any, **options: Any) -> Any:
        # Weights stay in memory, so tensors computed from them alone, such as their copies for
        # autocast, are recomputed.
        weights = list(range(len(parameters)))
        options |= {"compiler": "inductor", "static_lifetime_input_indices": weights}
        return min_cut_rematerialization_partition(*joint, **options)

    def as_it_is(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        return make_boxed_func(graph.forward)

    def whole_of(present: tuple[bool, ...]) -> Callable[..., Any]:
        def whole(weights: dict[str, Tensor], *given: Tensor) -> Any:
            tensors = iter(given)
            stream = tuple(next(tensors) if there else None for there in present)
            named = {f"block.{key}": value for key, value in weights.items()}
            return functional_call(_Method(block, plain), named, stream)

        return whole

    def forward(*stream: Tensor | None) -> Any:
        if not torch.is_grad_enabled():
            return plain(block, *stream)
        key = (
            name,
            *((x.shape, x.dtype, x.requires_grad) if x is not None else None for x in stream),
        )
        if key not in graphs:
            graphs[key] = aot_function(
                whole_of(tuple(x is not None for x in stream)),
                as_it_is,
                as_it_is,
                partition_fn=split,
                decompositions=select_decomp_table(),
            )
        with functorch.patch(activation_memory_budget=budget):
            return graphs[key](parameters, *(x for x in stream if x is not None))

    return forward


class _Method(nn.Module):
    """A method of a module, callable as a module's forward."""

    def __init__(self, block: nn.Module, method: Callable[..., Any]) -> None:
        super().__init__()
        self.block = block
        self._method = method

    def forward(self, *stream: Tensor | None) -> Any:
        return self._method(self.block, *stream)
