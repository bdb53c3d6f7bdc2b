"""One forward and backward of a run: the batch whole or in chunks, on one process or many. The gradients are the same."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
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
from fastmoco.models.float8_inference import float8_layers, require_whole
from fastmoco.objectives import MoCoV3, MoCoV3Output
from fastmoco.objectives.chunk_graphs import ChunkGraphs, require_capturable
from fastmoco.objectives.chunked import ChunkedStep, require_separable
from fastmoco.planner import HEADROOM, StepPlan, plan_step, sharded, state_bytes
from fastmoco.step_costs import measure_costs

SURELY_SMALL = 0.25
"""Share of the free memory below which an upper bound of a step is not worth counting exactly, which takes seconds."""


class Gradients:
    """Call it with a batch: loss out, gradients of the global batch in every trainable parameter's ``grad``.

    Attributes:
        strategy: how the model is spread over processes, in words. Making this object may shard the objective, in place:
            build the optimizer afterwards.
        plan: how the batch is taken, and why.
    """

    def __init__(
        self, config: Config, objective: MoCoV3, world: World, precision: str, *, attention: str = "sdpa"
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
        self.plan = choose_plan(config, objective, world, precision, attention=attention, strategy=strategy)
        self._chunked: ChunkedStep | None = None
        # Chunks go round the wrapper, whose hooks would average after each of them.
        self._forward = parallelize(
            objective,
            world,
            strategy=strategy,
            shard_size=config.parallel.shard_size,
            half=half,
            compiled=config.model.compile,
            average_gradients=self.plan.chunk == 0,
        )
        if config.batch.cuda_graphs:
            require_capturable(objective)
        if self.plan.chunk:
            graphs = ChunkGraphs(objective, self.plan.chunk, self._autocast) if config.batch.cuda_graphs else None
            self._chunked = ChunkedStep(
                objective, chunk=self.plan.chunk, kept=self.plan.kept, autocast=self._autocast, graphs=graphs
            )

    def __call__(self, view1: Tensor, view2: Tensor, *, accuracy: bool = False) -> MoCoV3Output:
        """Add this batch's gradients to ``grad``, averaged over ranks.

        Args:
            view1: [B, 3, H, W], this rank's.
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
            output: MoCoV3Output = self._forward(view1, view2, accuracy=accuracy)
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
) -> StepPlan:
    """The plan for the memory that is free now: on every rank for the rank that has least.

    Now the objective is whole, and neither gradients nor the optimizer's state are there, also where a run continues: a
    checkpoint is read behind this.
    """
    images = config.global_batch_size // world.world_size
    batch = config.batch
    if batch.chunk == "none":
        return StepPlan(chunk=0, kept=0, chunks=1, overhead=0.0, peak_bytes=0.0, reason="asked for")
    free = torch.tensor([free_bytes(world.device)], dtype=torch.float64, device=world.device)
    if world.world_size > 1:
        dist.all_reduce(free, op=dist.ReduceOp.MIN)
    budget = free.item() * HEADROOM
    if batch.chunk == "auto" and _at_most(config, objective, images) < SURELY_SMALL * budget:
        return StepPlan(chunk=0, kept=0, chunks=1, overhead=0.0, peak_bytes=0.0, reason="small beside the free memory")
    costs = measure_costs(config, precision, attention=attention)
    element = objective.encoder.pos_embed.element_size()
    state = whole = state_bytes(costs, config.optim.name, element)
    if strategy != "ddp" and world.world_size > 1:
        shards = world.world_size if strategy == "fsdp" else config.parallel.shard_size or world.local_world_size
        state, costs = state_bytes(costs, config.optim.name, element, shards=shards), sharded(costs, element)
    if world.device.type == "cpu" and config.checkpoint.async_save:
        budget -= state.parameters + state.optimizer  # the copy that a save in the background writes lies here too
    return plan_step(
        costs,
        images=images,
        budget=budget + whole.parameters - state.total,
        tokens=objective.encoder.pos_embed.shape[1],
        chunk=batch.chunk,
        kept=batch.kept,
        world_size=world.world_size,
    )


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
