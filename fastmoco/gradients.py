"""One forward and backward of a run: the batch whole or in chunks, on one process or many. The gradients are the same."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastmoco.config import Config
from fastmoco.distributed.mesh import World
from fastmoco.distributed.parallelize import Strategy, choose_strategy, parallelize
from fastmoco.distributed.replicas import require_equal_replicas
from fastmoco.free_memory import free_bytes
from fastmoco.models.compiled import BUDGETS, CompileChoice, choose_compile, compile_blocks
from fastmoco.models.float8_inference import float8_layers, require_whole
from fastmoco.objectives import MoCoV3, MoCoV3Output
from fastmoco.objectives.chunk_graphs import ChunkGraphs, require_capturable
from fastmoco.objectives.chunked import ChunkedStep, require_separable
from fastmoco.objectives.prepare import view_preparation
from fastmoco.planner import HEADROOM, StepPlan, best_plan, busy_chunk, plan_step, sharded, state_bytes
from fastmoco.step_costs import StepCosts, measure_costs

SURELY_SMALL = 0.25
"""Share of the free memory below which an upper bound of a step is not worth counting exactly, which takes seconds."""


class Gradients:
    """Call it with a batch: loss out, gradients of the global batch in every trainable parameter's ``grad``.

    Attributes:
        strategy: how the model is spread over processes, in words. Making this object may shard the objective, in place:
            build the optimizer afterwards.
        plan: how the batch is taken, and why.
        compile: whether blocks are compiled, and why.
        prepare: makes what the encoder reads of two views as the loader delivers them.
        replays: what CUDA graphs replay, in words.

    Args:
        config: of the run.
        objective: whole, initialised, on the device of ``world``.
        world: this process among its peers.
        precision: "bf16", "fp32" or "fp64".
        attention: who computes attention.
        levels: whether views come as uint8.
        reserved: bytes of the device's memory that others will take, the loader among them, less those that it holds already.
    """

    def __init__(
        self,
        config: Config,
        objective: MoCoV3,
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
        half = precision == "bf16"
        self._autocast: Callable[[], AbstractContextManager[Any]] = partial(
            torch.autocast, world.device.type, dtype=torch.bfloat16, enabled=half
        )
        if isinstance(config.batch.chunk, int):
            require_separable(objective, config.batch.chunk)
        strategy = choose_strategy(config.parallel.strategy, objective, world)
        self._float8 = float8_layers(objective.momentum_encoder)
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
        data = config.data
        prepare = view_preparation(data.view1, data.view2, precision, compiled=possible.compiled)
        self.prepare = prepare
        if self.compile.compiled:
            compile_blocks(objective, budget=self.plan.activation_budget)
        elif fused and self._float8 and possible.compiled:
            compile_blocks(objective.momentum_encoder)  # whose casts to float8 are then part of other kernels
        self._chunked: ChunkedStep | None = None
        images = config.global_batch_size // world.world_size
        self.replays = "nothing: no chunk is without its own" if config.batch.cuda_graphs else "nothing"
        # Chunks go round the wrapper, whose hooks would average after each of them.
        self._forward = parallelize(
            objective,
            world,
            strategy=strategy,
            shard_size=config.parallel.shard_size,
            half=half,
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

    def __call__(self, view1: Tensor, view2: Tensor, *, accuracy: bool = False) -> MoCoV3Output:
        """Add this batch's gradients to ``grad``, averaged over ranks.

        Args:
            view1: [B, 3, H, W], this rank's, as the loader delivers it.
            view2: [B, 3, H, W].
            accuracy: as for `MoCoV3.forward`.

        Returns:
            This rank's loss, queries and keys; the graph is used up.

        Raises:
            RunError: if ranks no longer hold the same state; looked at every `ParallelConfig.verify_replicas_every` calls.
        """
        if self._verify_every and self._calls % self._verify_every == 0:
            require_equal_replicas(self._objective, self._world)
        self._calls += 1
        for layer in self._float8:
            layer.refresh_()
        if self._chunked is not None:
            return self._chunked(view1, view2, accuracy=accuracy)
        with self._autocast():
            output: MoCoV3Output = self._forward(*self.prepare(view1, view2), accuracy=accuracy)
        output.loss.backward()  # type: ignore[no-untyped-call]
        return output


def choose_plan(
    config: Config,
    objective: MoCoV3,
    world: World,
    precision: str,
    *,
    attention: str = "sdpa",
    strategy: Strategy = "ddp",
    compiled: bool = False,
    levels: bool = False,
    reserved: float = 0.0,
) -> StepPlan:
    """The plan for the memory that is free now: on every rank for the rank that has least.

    Now the objective is whole, and neither gradients nor the optimizer's state are there, also where a run continues: a
    checkpoint is read after this. Arguments are those of `Gradients`; ``compiled`` says whether blocks are compiled, ``levels``
    whether views come as uint8.
    """
    images = config.global_batch_size // world.world_size
    batch, wanted = config.batch, config.batch.activation_budget
    splits = compiled and config.model.checkpointing == "none"  # else checkpointing says what is kept
    budgets = (BUDGETS if wanted == "auto" else (float(wanted),)) if splits else (1.0,)
    at_once = StepPlan(chunk=0, kept=0, chunks=1, overhead=0.0, peak_bytes=0.0, reason="", activation_budget=budgets[0])
    if batch.chunk == "none":
        return replace(at_once, reason="asked for")
    free = torch.tensor([free_bytes(world.device) - reserved], dtype=torch.float64, device=world.device)
    if world.world_size > 1:
        dist.all_reduce(free, op=dist.ReduceOp.MIN)
    memory = free.item() * HEADROOM
    if batch.chunk == "auto" and _at_most(config, objective, images) < SURELY_SMALL * memory:
        return replace(at_once, reason="small beside the free memory")

    def plan_within(budget: float) -> StepPlan:
        costs = measure_costs(config, precision, attention=attention, compiled=compiled, budget=budget, levels=levels)
        taken, costs = _beside(config, costs, world, strategy, objective)
        if batch.cuda_graphs:  # what a captured pass needs in passing is never given back
            size = min(images, busy_chunk(objective.encoder.pos_embed.shape[1]))
            taken += size * costs.view_bytes + max(costs.forward.at(size), costs.train.at(size))
        plan = plan_step(
            costs,
            images=images,
            budget=memory - taken,
            tokens=objective.encoder.pos_embed.shape[1],
            chunk=batch.chunk,
            kept=batch.kept,
            world_size=world.world_size,
        )
        return replace(plan, activation_budget=budget)

    return best_plan(map(plan_within, budgets))


def _beside(
    config: Config, costs: StepCosts, world: World, strategy: Strategy, objective: MoCoV3
) -> tuple[float, StepCosts]:
    """Bytes that the state will take beyond the parameters that lie there now, and the costs of a step with such a state."""
    element = objective.encoder.pos_embed.element_size()
    state = whole = state_bytes(costs, config.optim.name, element)
    if strategy != "ddp" and world.world_size > 1:
        shards = world.world_size if strategy == "fsdp" else config.parallel.shard_size or world.local_world_size
        state, costs = state_bytes(costs, config.optim.name, element, shards=shards), sharded(costs, element)
    taken = state.total - whole.parameters
    if world.device.type == "cpu" and config.checkpoint.async_save:
        taken += state.parameters + state.optimizer  # the copy that a save in the background writes lies here too
    return taken, costs


def _at_most(config: Config, objective: MoCoV3, images: int) -> float:
    """Twice what a step keeps, and more: 40 numbers a token, width and block, and as many a hidden unit of the heads.

    Attention that is written out keeps a few more numbers for each pair of tokens and head.
    """
    encoder = objective.encoder
    element, tokens = encoder.pos_embed.element_size(), encoder.pos_embed.shape[1]
    block = encoder.embed_dim * 40 + encoder.blocks[0].attn.num_heads * tokens * 8  # type: ignore[union-attr, operator]
    numbers = 2 * tokens * block * (len(encoder.blocks) + 1) + 2 * 40 * config.model.hidden_dim
    state = 5 * sum(parameter.numel() for parameter in objective.parameters())
    return float(element * (images * numbers + state))
