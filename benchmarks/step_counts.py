"""Costs of the pieces of a training step, eager and compiled, counted on fake
tensors without GPU and data.

Eager operations are counted one by one (`op_counts`). If blocks are compiled, a model of fusion
(`fusion`) counts the graphs that Dynamo and AOT autograd make of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.fusion import FusedGraph
from benchmarks.op_counts import PRODUCTS, Counts, OperationCounter
from fastmoco.config import Config
from fastmoco.models.blocks import Attention
from fastmoco.models.compiled import compile_blocks
from fastmoco.models.float8_inference import float8_layers
from fastmoco.objectives.build import build_model
from fastmoco.objectives.interface import Features, Inputs, Objective, Progress
from fastmoco.objectives.prepare import PrepareViews, view_preparation
from fastmoco_kernels.adamw_ema.op import bytes_moved as sweep_bytes
from fastmoco_kernels.info_nce import cost as loss_cost
from fastmoco_kernels.residual_norm import op as residual_norm
from fastmoco_pipelines.spec import each_view


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCounts:
    """Costs of the pieces of a step; the first four are for one chunk."""

    chunk: int
    first: Counts
    """Query trunk without gradient."""
    query: Counts
    """Query trunk with gradient."""
    keys: Counts
    """Trunk of the momentum encoder."""
    backward: Counts
    """Backward of the query trunk."""
    heads: Counts
    """Heads and loss on the whole batch, forward and backward, and the optimizer."""

    def step(self, chunks: float, kept: float) -> Counts:
        """A whole step of some chunks, of which `kept` are computed once."""
        whole = self.trunk(chunks)
        whole.merge(self.first, chunks - kept)
        whole.merge(self.heads)
        return whole

    def trunk(self, chunks: float) -> Counts:
        """Both trunks and the backward of the given number of chunks, once."""
        found = Counts()
        for part in (self.query, self.keys, self.backward):
            found.merge(part, chunks)
        return found


class CountingBackend:
    """A backend of torch.compile that counts the graphs instead of compiling them."""

    def __init__(self) -> None:
        from torch._dynamo.backends.common import aot_autograd  # here: a second of imports
        from torch._inductor import compile_fx
        from torch._inductor.decomposition import select_decomp_table

        self.counter: OperationCounter | None = None
        self.calls = 0
        self._backend = aot_autograd(
            fw_compiler=self._counted,
            bw_compiler=self._counted,
            inference_compiler=self._counted,
            decompositions=select_decomp_table(),
            partition_fn=compile_fx.partition_fn,
        )

    @contextmanager
    def instead(self) -> Iterator[None]:
        """Replace `torch.compile` and inductor by this backend, also in calls
        from other backends.
        """
        from torch._inductor import compile_fx

        with (
            mock.patch.object(torch, "compile", self.compile),
            mock.patch.object(compile_fx, "compile_fx", self._backend),
        ):
            yield

    def compile(self, function: Callable[..., Any], **options: Any) -> Any:
        """Replaces `torch.compile`."""
        kept = {name: options[name] for name in ("dynamic", "fullgraph") if name in options}
        given = options.get("backend", "inductor")
        compiled = _compile(
            function, backend=self._backend if given == "inductor" else given, **kept
        )

        def call(*arguments: Any, **named: Any) -> Any:
            if self.counter is None:
                return compiled(*arguments, **named)
            with self.counter.off():  # Dynamo does nothing under a dispatch mode
                return compiled(*arguments, **named)

        return call

    def _counted(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        counts = FusedGraph(graph).counts()

        def run(arguments: list[Any]) -> Any:
            self.calls += 1
            if self.counter is None:
                return graph(*arguments)
            self.counter.counts.merge(counts)
            with self.counter.paused():
                return graph(*arguments)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


_compile = torch.compile


def count_step(
    config: Config,
    *,
    chunk: int,
    compiled: bool,
    budget: float = 1.0,
    views: torch.dtype = torch.float32,
) -> StepCounts:
    """Count the pieces of a step.

    Args:
        config: its model, heads and batch are used.
        chunk: images of a micro-batch.
        compiled: whether blocks go through torch.compile.
        budget: share of the activations that compiled blocks keep for their backward.
        views: dtype of the views.
    """
    torch._dynamo.reset()
    blocks, found = CountingBackend(), {}
    # Fused blocks and the norm of the last block, whose class row is not fused, as on a GPU.
    kernels = mock.patch.object(
        residual_norm, "triton_is_default", return_value=config.model.blocks == "fused"
    )
    fused = config.model.blocks == "fused"
    bf16 = config.precision in ("auto", "bf16")
    # With fused blocks a run compiles the rest: conversion of uint8 views, and
    # a momentum encoder in float8.
    graphs = compiled or (fused and views == torch.uint8)
    with blocks.instead() if graphs else nullcontext(), kernels, FakeTensorMode():
        prepare = view_preparation(
            each_view(config.data.views), "bf16" if bf16 else "fp32", compiled=graphs
        )
        objective = build_model(config)
        for module in objective.modules():
            if isinstance(module, Attention):
                module.backend = "sdpa"
        if compiled:
            compile_blocks(objective, budget=budget)
        elif fused and config.model.momentum_linears == "float8":
            for network in objective.networks().values():
                if float8_layers(network):
                    compile_blocks(network)
        for rehearsal in (True, True, False) if graphs else (False,):
            # The first round compiles, which is no part of a step. The second
            # is measured, like the last.
            calls = blocks.calls
            blocks.calls = 0
            found = _count_pieces(
                config, objective, chunk, views, prepare, None if rehearsal else blocks
            )
        if graphs and (blocks.calls != calls or not calls):
            raise RuntimeError(
                f"{blocks.calls} compiled graphs ran where {calls} had been compiled: counted "
                "nothing"
            )
    heads = found["heads"]
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    averaged = sum(p.numel() for p in objective.averages() if p.requires_grad)
    heads.add("sweep", sweep_bytes(trained, averaged=averaged))
    return StepCounts(chunk=chunk, **found)


def _count_pieces(
    config: Config,
    objective: Objective,
    chunk: int,
    views: torch.dtype,
    prepare: PrepareViews,
    blocks: CountingBackend | None,
) -> dict[str, Counts]:
    """Run every piece; with `blocks` under a counter."""
    found: dict[str, Counts] = {}

    @contextmanager
    def counted(name: str) -> Iterator[None]:
        counter = OperationCounter()
        if blocks is None:
            yield
        else:
            blocks.counter = counter
            with counter:
                yield
            blocks.counter = None
        found[name] = counter.counts

    autocast = partial(
        torch.autocast, "cpu", dtype=torch.bfloat16, enabled=config.precision in ("auto", "bf16")
    )
    side, batch = config.model.image_size, config.global_batch_size
    at, of_chunk = (
        Progress(),
        tuple(torch.empty(chunk, 3, side, side, dtype=views) for _ in range(2)),
    )

    def prepared() -> Inputs:
        return Inputs(prepare(of_chunk))

    with counted("first"), torch.no_grad(), autocast():
        objective.features(prepared(), at, target=False)
    with counted("keys"), torch.no_grad(), autocast():
        features = objective.features(prepared(), at)
    found["keys"].merge(found["first"], -1.0)
    with counted("query"), autocast():
        online = objective.features(prepared(), at, target=False).online
    gradient = [torch.empty_like(rows) for rows in online]
    with counted("backward"):
        torch.autograd.backward(online, gradient)
    objective.zero_grad(set_to_none=True)
    whole = Features(
        *(tuple(rows.new_empty(batch, *rows.shape[1:]) for rows in part) for part in features)
    )
    for rows in whole.online:
        rows.requires_grad_()
    with counted("heads"):
        with autocast():
            loss = objective.compare(whole, at).loss
        loss.backward()  # type: ignore[no-untyped-call]
    width = config.model.projection_dim
    found["heads"].add(PRODUCTS, 0.0, loss_cost.flops(batch, batch, width, directions=2))
    return found
