"""Forward and backward of a step: the whole batch or micro-batches, on one process or several.

The gradients are the same in all cases.
"""

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
from fastmoco.objectives.interface import START, Objective, Output, Progress
from fastmoco.objectives.prepare import view_preparation
from fastmoco.planning.choose import choose_plan
from fastmoco_pipelines.loading.step_parts import BACKWARD, TRANSFER, part
from fastmoco_pipelines.spec import each_view


class ForwardBackward:
    """Runs forward and backward of a batch and returns the output of the forward.

    Afterwards `grad` of every trainable parameter holds the gradient of the global batch. The
    constructor may shard the objective in place, so the optimizer is built after it.

    Attributes:
        strategy: how the model is distributed over processes: "ddp", "fsdp", "hsdp" or "one
            process".
        plan: size and handling of the micro-batches, with the reason.
        compile: whether blocks are compiled, with the reason.
        prepare: converts views from the loader to the input of the encoder.
        replays: a description of what CUDA graphs replay.

    Args:
        config: of the run.
        objective: not sharded yet, initialised, on the device of `world`.
        world: this process's rank and device.
        precision: "bf16", "fp32" or "fp64".
        attention: the attention backend.
        levels: whether views arrive as uint8.
        reserved: bytes of device memory that others will allocate, such as the loader, minus the
            bytes that they hold already.
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
        self._objective = objective
        self._world = world
        self._verify_every = config.parallel.verify_replicas_every
        # Counts from 0, so that the first call compares the state that a restore has loaded.
        self._calls = 0
        bf16 = precision == "bf16"
        self._autocast: Callable[[], AbstractContextManager[Any]] = partial(
            torch.autocast, world.device.type, dtype=torch.bfloat16, enabled=bf16
        )

        # The strategy comes before the plan, which counts sharded state.
        if isinstance(config.batch.chunk, int):
            require_separable(objective, config.batch.chunk)
        strategy = choose_strategy(config.parallel.strategy, objective, world)
        self._float8 = float8_layers(objective)
        require_whole(bool(self._float8) and strategy != "ddp" and world.world_size > 1)
        self.strategy: str = strategy if world.world_size > 1 else "one process"

        # `possible` is the choice for blocks made of modules; fused blocks are not compiled.
        possible = choose_compile(config.model.compile, world.device, precision)
        self.compile = _choose_for_blocks(possible, config, world.device, bool(self._float8))

        # The plan measures the objective before it is compiled and wrapped.
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
        if self.plan.keys:
            objective.ring = self.plan.keys == "ring"
        self.prepare = view_preparation(
            each_view(config.data.views),
            precision,
            compiled=possible.compiled,
            exact=objective.exact_views,
        )

        # Compile the blocks; of fused ones only those with float8, to fuse the casts to float8.
        if self.compile.compiled:
            compile_blocks(objective, budget=self.plan.activation_budget)
        elif config.model.blocks == "fused" and self._float8 and possible.compiled:
            for network in objective.networks().values():
                if float8_layers(network):
                    compile_blocks(network)

        # Micro-batches bypass the DDP wrapper, whose hooks would average after each of them.
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
        self.replays = self._replays(config)
        self._chunked = self._chunked_step(config) if self.plan.chunk else None

    def _replays(self, config: Config) -> str:
        """What CUDA graphs replay, for the log."""
        if not config.batch.cuda_graphs:
            return "nothing"
        images = config.global_batch_size // self._world.world_size
        if self.plan.chunk and not self.plan.lean and self.plan.kept_images < images:
            return "the micro-batches whose autograd graph is not kept"
        return "nothing, because every micro-batch keeps its autograd graph"

    def _chunked_step(self, config: Config) -> ChunkedStep:
        """The step in micro-batches, as planned."""
        graphs = None
        if config.batch.cuda_graphs:
            graphs = ChunkGraphs(
                self._objective, self.plan.chunk, self._autocast, prepare=self.prepare
            )
        return ChunkedStep(
            self._objective,
            chunk=self.plan.chunk,
            kept_images=self.plan.kept_images,
            lean=self.plan.lean,
            autocast=self._autocast,
            prepare=self.prepare,
            graphs=graphs,
        )

    def __call__(
        self,
        *views: Tensor,
        masks: tuple[Tensor, ...] = (),
        labels: Tensor | None = None,
        at: Progress = START,
        accuracy: bool = False,
    ) -> Output:
        """Add this batch's gradients, averaged over ranks, to `grad` of every trainable parameter.

        Args:
            views: [B, 3, H, W] each, of this rank, as the loader delivers them.
            masks: one for each view that has one.
            labels: [B], on the device, where the objective needs them.
            at: the step.
            accuracy: as for `Objective.compare`.

        Returns:
            The output of this rank's forward. Its graph is freed.

        Raises:
            RunError: if the replicas of the state differ between ranks; compared once every
                `ParallelConfig.verify_replicas_every` calls.
        """
        if self._verify_every and self._calls % self._verify_every == 0:
            require_equal_replicas(self._objective, self._world)
        self._calls += 1
        self._objective.before_step(at)
        for layer in self._float8:
            layer.refresh_()
        rest: dict[str, Any] = {"masks": masks, "at": at, "accuracy": accuracy}
        if labels is not None:
            rest["labels"] = labels
        output = self._forward_backward(views, rest)
        self._objective.after_backward(at)
        return output

    def _forward_backward(self, views: tuple[Tensor, ...], rest: dict[str, Any]) -> Output:
        if self._chunked is not None:
            return self._chunked(*views, **rest)
        with self._autocast():
            with part(TRANSFER):
                views = self.prepare(views)
            output: Output = self._forward(*views, **rest)
        with part(BACKWARD):
            output.loss.backward()  # type: ignore[no-untyped-call]
        return output


def _choose_for_blocks(
    possible: CompileChoice, config: Config, device: torch.device, float8: bool
) -> CompileChoice:
    """Whether blocks of this config are compiled.

    Args:
        possible: the choice for blocks made of modules.
        config: of the run.
        device: of the model.
        float8: whether the momentum encoder has float8 layers.

    Raises:
        ValueError: if float8 layers would run uncompiled on CUDA.
    """
    if float8 and device.type == "cuda" and not possible.compiled:
        raise ValueError(
            f"model.momentum_linears='float8': needs compiled blocks, and they are {possible}: "
            "uncompiled, casts move several times the bytes of the products; "
            "use model.momentum_linears native"
        )
    if config.model.family == "resnet":
        return CompileChoice(False, "a ResNet's convolutions are kernels of a library already")
    if config.model.family == "swin":
        return CompileChoice(False, "a Swin's blocks differ in shape, one compilation for each")
    if config.model.family == "convnextv2":
        return CompileChoice(False, "compiled blocks are those of a ViT")
    if config.model.mlp_norm == "batch":
        return CompileChoice(False, "mlp_norm=batch exchanges statistics inside the blocks")
    if config.model.blocks != "fused":
        return possible
    also = ", the momentum encoder's in float8 are compiled" if float8 else ""
    return CompileChoice(False, f"fused blocks have their own kernels{also}")
