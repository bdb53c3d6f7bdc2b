"""One forward and backward of a run: the batch whole or in chunks, on one process or many. The
gradients are the same."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastmoco.config import Config
from fastmoco.distributed.mesh import World
from fastmoco.distributed.parallelize import choose_strategy, parallelize
from fastmoco.distributed.replicas import require_equal_replicas
from fastmoco.models.compiled import CompileChoice, choose_compile, compile_blocks
from fastmoco.models.float8_inference import float8_layers, require_whole
from fastmoco.objectives.chunk_graphs import ChunkGraphs, require_capturable
from fastmoco.objectives.chunked import ChunkedStep, require_separable
from fastmoco.objectives.interface import START, Inputs, Objective, Output, Progress
from fastmoco.objectives.prepare import view_preparation
from fastmoco.planning.choose import choose_plan
from fastmoco_pipelines.spec import each_view


class ForwardBackward:
    """Call it with a batch: loss out, gradients of the global batch in every trainable parameter's
    ``grad``.

    Attributes:
        strategy: how the model is spread over processes, in words. Making this object may shard the
            objective, in place: build the optimizer afterwards.
        plan: how the batch is taken, and why.
        compile: whether blocks are compiled, and why.
        prepare: makes what the encoder reads of the views as the loader delivers them.
        replays: what CUDA graphs replay, in words.

    Args:
        config: of the run.
        objective: whole, initialised, on the device of ``world``.
        world: this process among its peers.
        precision: "bf16", "fp32" or "fp64".
        attention: who computes attention.
        levels: whether views come as uint8.
        reserved: bytes of the device's memory that others will take, the loader among them, less
            those that it holds already.
    """

    def __init__(
        self,
        config: Config,
        objective: Objective,
        world: World,
        precision: str,
        *,
        attention: str = "sdpa",
        levels: bool = False,
        reserved: float = 0.0,
    ) -> None:
        self._objective, self._world = objective, world
        # From the first call on: it sees what a restore left.
        self._verify_every, self._calls = config.parallel.verify_replicas_every, 0
        bf16 = precision == "bf16"
        self._autocast: Callable[[], AbstractContextManager[Any]] = partial(
            torch.autocast, world.device.type, dtype=torch.bfloat16, enabled=bf16
        )
        if isinstance(config.batch.chunk, int):
            require_separable(objective, config.batch.chunk)
        strategy = choose_strategy(config.parallel.strategy, objective, world)
        self._float8 = float8_layers(objective)
        require_whole(bool(self._float8) and strategy != "ddp" and world.world_size > 1)
        self.strategy: str = strategy if world.world_size > 1 else "one process"
        possible = choose_compile(config.model.compile, world.device, precision)
        fused = config.model.blocks == "fused"
        if self._float8 and world.device.type == "cuda" and not possible.compiled:
            raise ValueError(
                f"model.momentum_linears='float8': needs compiled blocks, and they are {possible}: uncompiled, casts move "
                "several times the bytes of the products; take model.momentum_linears native"
            )
        also = ", the momentum encoder's in float8 are compiled" if self._float8 else ""
        self.compile = CompileChoice(False, f"fused blocks bring their own kernels{also}") if fused else possible
        self.plan = choose_plan(
            config,
            objective,
            world,
            precision,
            attention=attention,
            strategy=strategy,
            compiled=self.compile.compiled,
            levels=levels,
            reserved=reserved,
        )
        prepare = view_preparation(each_view(config.data.views), precision, compiled=possible.compiled)
        self.prepare = prepare
        if self.compile.compiled:
            compile_blocks(objective, budget=self.plan.activation_budget)
        elif fused and self._float8 and possible.compiled:
            for network in objective.networks().values():
                if float8_layers(network):
                    compile_blocks(network)  # whose casts to float8 are then part of other kernels
        self._chunked: ChunkedStep | None = None
        images = config.global_batch_size // world.world_size
        self.replays = "nothing: no chunk is without its own" if config.batch.cuda_graphs else "nothing"
        # Chunks go round the wrapper, whose hooks would average after each of them.
        self._forward = parallelize(
            objective,
            world,
            strategy=strategy,
            shard_size=config.parallel.shard_size,
            bf16=bf16,
            average_gradients=self.plan.chunk == 0,
        )
        if config.batch.cuda_graphs:
            require_capturable(objective)
        if self.plan.chunk:
            graphs = None
            if config.batch.cuda_graphs:
                graphs = ChunkGraphs(objective, self.plan.chunk, self._autocast, prepare=prepare)
            replayed = graphs is not None and not self.plan.lean and self.plan.kept_images < images
            self.replays = "chunks without a graph" if replayed else self.replays
            self._chunked = ChunkedStep(
                objective,
                chunk=self.plan.chunk,
                kept_images=self.plan.kept_images,
                lean=self.plan.lean,
                autocast=self._autocast,
                prepare=prepare,
                graphs=graphs,
            )

    def __call__(
        self, *views: Tensor, masks: tuple[Tensor, ...] = (), at: Progress = START, accuracy: bool = False
    ) -> Output:
        """Add this batch's gradients to `grad`, averaged over ranks.

        Args:
            views: [B, 3, H, W] each, this rank's, as the loader delivers them.
            masks: of the views that have one.
            at: the step.
            accuracy: as for `Objective.compare`.

        Returns:
            This rank's loss and what telemetry looks at; the graph is used up.

        Raises:
            RunError: if ranks no longer hold the same state; looked at every
                `ParallelConfig.verify_replicas_every` calls.
        """
        if self._verify_every and self._calls % self._verify_every == 0:
            require_equal_replicas(self._objective, self._world)
        self._calls += 1
        self._objective.before_step(at)
        for layer in self._float8:
            layer.refresh_()
        output = self._forward_backward(Inputs(views, masks), at, accuracy)
        self._objective.after_backward(at)
        return output

    def _forward_backward(self, inputs: Inputs, at: Progress, accuracy: bool) -> Output:
        views, masks = inputs
        if self._chunked is not None:
            return self._chunked(*views, masks=masks, at=at, accuracy=accuracy)
        with self._autocast():
            output: Output = self._forward(*self.prepare(views), masks=masks, at=at, accuracy=accuracy)
        output.loss.backward()  # type: ignore[no-untyped-call]
        return output
