"""Choose the plan of a step for the memory that is free now."""

from __future__ import annotations

import math
from dataclasses import replace

from fastmoco.config import Config
from fastmoco.distributed.agree import least
from fastmoco.distributed.mesh import World
from fastmoco.distributed.parallelize import Strategy
from fastmoco.models.compiled import BUDGETS
from fastmoco.objectives.interface import Objective
from fastmoco.planning.costs import StepCosts, key_bytes, measure_costs
from fastmoco.planning.free_memory import free_bytes
from fastmoco.planning.keys import choose_keys, other_keys_bytes, ring_above
from fastmoco.planning.plan import (
    HEADROOM,
    StepPlan,
    best_plan,
    busy_chunk,
    plan_step,
    sharded,
    state_bytes,
    tokens_of_views,
)
from fastmoco_pipelines.spec import each_view

SURELY_SMALL = 0.25
"""The bytes of a step are not counted, which takes seconds, if an upper bound of them is below this
share of the free memory."""


def choose_plan(
    config: Config,
    objective: Objective,
    world: World,
    precision: str,
    *,
    attention: str = "sdpa",
    strategy: Strategy = "ddp",
    compiled: bool = False,
    levels: bool = False,
    reserved: float = 0.0,
) -> StepPlan:
    """The plan for the memory that is free now, on every rank for the rank with the least.

    Call it after the objective is built and before gradients and optimizer state exist. A run that
    continues reads its checkpoint later. The arguments are those of `ForwardBackward`; `compiled`:
    whether blocks are compiled; `levels`: whether views come as uint8.
    """
    images = config.global_batch_size // world.world_size
    batch = config.batch
    wanted = batch.activation_budget

    # With checkpointing, the checkpointing decides what is kept.
    splits = compiled and config.model.checkpointing == "none"
    budgets = (BUDGETS if wanted == "auto" else (float(wanted),)) if splits else (1.0,)
    at_once = StepPlan(
        chunk=0,
        kept=0,
        chunks=1,
        overhead=0.0,
        peak_bytes=0.0,
        reason="",
        activation_budget=budgets[0],
    )
    exchanged = objective.ring is not None and world.world_size > 1
    if batch.chunk == "none" and not exchanged:
        return replace(at_once, reason="requested")

    # How the keys of other processes come, if there are any.
    memory = least(free_bytes(world.device) - reserved, world.device) * HEADROOM
    above, keys = math.inf, 0.0
    if exchanged:
        way = getattr(config.objective, "keys", "auto")
        size = key_bytes(config, next(objective.parameters()).element_size())
        ring, reason = choose_keys(way, size, images, world.world_size, memory)
        at_once = replace(at_once, keys="ring" if ring else "gathered", keys_reason=reason)
        above = ring_above(way, memory)
        keys = other_keys_bytes(size, images, world.world_size, above)
    if batch.chunk == "none":
        return replace(at_once, reason="requested")

    # Most steps are small: an upper bound is enough for them.
    largest = _at_most(config, objective, images) + keys
    if batch.chunk == "auto" and largest < SURELY_SMALL * memory:
        return replace(at_once, reason="small compared with the free memory")

    # Only a trunk that goes in chunks is asked for its tokens.
    sides = [view.size for view in each_view(config.data.views)]
    is_vit = hasattr(objective.encoder, "tokens")
    tokens = tokens_of_views(sides, config.model.patch_size) if is_vit else 1

    def plan_within(budget: float) -> StepPlan:
        costs = measure_costs(
            config, precision, attention=attention, compiled=compiled, budget=budget, levels=levels
        )
        costs = replace(costs, ring_above=above)
        taken, costs = _beside(config, costs, world, strategy, objective)
        if batch.cuda_graphs:  # a captured pass never frees its temporary memory
            size = min(images, busy_chunk(tokens))
            taken += size * costs.view_bytes + max(costs.forward.at(size), costs.train.at(size))
        plan = plan_step(
            costs,
            images=images,
            budget=memory - taken,
            tokens=tokens,
            chunk=batch.chunk,
            kept=batch.kept,
            world_size=world.world_size,
        )
        return replace(
            plan,
            activation_budget=budget,
            keys=at_once.keys,
            keys_reason=at_once.keys_reason,
        )

    return best_plan(map(plan_within, budgets))


def _beside(
    config: Config, costs: StepCosts, world: World, strategy: Strategy, objective: Objective
) -> tuple[float, StepCosts]:
    """Bytes that the state will take besides the parameters, which exist already, and the costs of
    a step with that state."""
    element = next(objective.parameters()).element_size()
    state = whole = state_bytes(costs, config.optim.name, element)
    if strategy != "ddp" and world.world_size > 1:
        shards = (
            world.world_size
            if strategy == "fsdp"
            else config.parallel.shard_size or world.local_world_size
        )
        state = state_bytes(costs, config.optim.name, element, shards=shards)
        costs = sharded(costs, element)

    # A background save holds its copy in the same memory on a CPU.
    taken = state.total - whole.parameters
    if world.device.type == "cpu" and config.checkpoint.async_save:
        taken += state.parameters + state.optimizer
    return taken, costs


def _at_most(config: Config, objective: Objective, images: int) -> float:
    """Upper bound of the bytes of a step, at least twice the true value.

    The elements of the trunk by `Encoder.most_numbers`, and 40 per view and hidden unit of the
    heads.
    """
    element = next(objective.parameters()).element_size()
    views = each_view(config.data.views)
    numbers = sum(objective.encoder.most_numbers(view.size) for view in views)
    numbers += len(views) * 40 * config.model.hidden_dim
    state = 5 * sum(parameter.numel() for parameter in objective.parameters())
    return float(element * (images * numbers + state))
