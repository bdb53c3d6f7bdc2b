"""One of several real processes: a training under DDP, FSDP2 and HSDP, and mutants of it.

Started by test_sharded_ranks.py as `python -m tests.distributed.run_sharded OUT CASES`; results go
to OUT/rank<r>.pt. The test computes the expected values with `run_steps` in one process.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fastmoco.distributed import World, parallelize
from fastmoco.distributed.gradient_average import ShardedGradientAverage
from fastmoco.distributed.replicas import require_equal_replicas
from fastmoco.models.blocks import Block
from fastmoco.models.compiled import compile_blocks
from fastmoco.objectives import MoCoV3
from fastmoco.objectives.chunked import ChunkedStep
from fastmoco.optim import build_adamw, build_adamw_ema, build_lars
from fastmoco.optim.averaged import AveragedLARS, AveragedOptimizer, FusedAdamW, SweptAdamW
from fastmoco.optim.groups import ParameterGroup, set_learning_rates, split_groups
from fastmoco.telemetry.stability import gradient_norms
from fastmoco.telemetry.stability_weights import UpdateRatios, ema_distance
from fastmoco.training import state as training_state
from tests.distributed.cases import run_cases, whole
from tests.distributed.run_ranks import GLOBAL_BATCH, message_of, part
from tests.golden_objective import random_views, rough_objective

STEPS = 3
GRADIENTS_OF = (0, STEPS - 1)
"""Steps whose gradients are kept."""
Case = dict[str, Any]


def build(
    stem: str, dtype: torch.dtype, seed: int = 30
) -> tuple[MoCoV3, list[tuple[Tensor, Tensor]]]:
    """The same objective and batches in every process; both encoders share
    their frozen stem, as in a run.
    """
    torch.manual_seed(seed)
    objective = rough_objective(stem=stem)
    batches = [random_views(objective, GLOBAL_BATCH) for _ in range(STEPS)]
    return objective.to(dtype), [(one.to(dtype), two.to(dtype)) for one, two in batches]


def build_optimizer(name: str, objective: MoCoV3) -> AveragedOptimizer:
    named, averages = list(objective.named_parameters()), objective.averages()
    if name == "lars":
        return AveragedLARS(build_lars(named, lr=0.5, weight_decay=0.01), averages)
    if name == "adamw":
        return FusedAdamW(build_adamw(named, lr=1e-3, weight_decay=0.1), averages)
    return SweptAdamW(build_adamw_ema(named, averages, lr=1e-3, weight_decay=0.1), averages)


def split_predictor(optimizer: AveragedOptimizer, objective: MoCoV3) -> None:
    """The predictor in a group of its own."""
    own = ParameterGroup(lr_scale=0.5, constant_lr=True, weight_decay_scale=0.1)
    (whole_group,) = optimizer.param_groups
    lr = whole_group["lr"]
    split_groups(
        optimizer.inner,
        objective.named_parameters(),
        lambda name, parameter: own if name.startswith("predictor.") else ParameterGroup(),
    )
    set_learning_rates(optimizer.param_groups, lr, peak=3 * lr)
    assert [group["lr"] for group in optimizer.param_groups] == [lr, 1.5 * lr]


def run_steps(
    world: World,
    strategy: str = "ddp",
    *,
    dtype: torch.dtype = torch.float64,
    stem: str = "patch",
    chunk: int = 0,
    kept: int = 0,
    optimizer: str = "lars",
    groups: bool = False,
    bf16: bool = False,
    recompute: str = "none",
    compiled: bool = False,
    fused: bool = False,
    seed: int = 30,
) -> Case:
    """Three steps on this rank's part of each batch, an evaluation between the
    second and the third.
    """
    objective, batches = build(stem, dtype, seed)
    objective.encoder.recompute(recompute)  # type: ignore[arg-type]
    for module in objective.modules():
        if isinstance(module, Block):
            module.fused = fused
    if compiled:
        compile_blocks(objective)
    forward = parallelize(
        objective,
        world,
        strategy=strategy,  # type: ignore[arg-type]
        shard_size=2,
        bf16=bf16,
        average_gradients=chunk == 0,
    )

    def autocast() -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16)

    chunked = ChunkedStep(objective, chunk=chunk, kept=kept, autocast=autocast) if chunk else None
    weights = build_optimizer(optimizer, objective)
    if groups:
        split_predictor(weights, objective)
    result: Case = {"losses": [], "gradients": [], "norms": [], "shares": [], "keys": []}
    for step, views in enumerate(batches):
        mine = [part(view, world) for view in views]
        objective.zero_grad(set_to_none=True)
        if chunked is not None:
            output = chunked(*mine)
        else:
            with autocast():
                output = forward(*mine)
            output.loss.backward()
        trained = {n: p for n, p in objective.named_parameters() if p.grad is not None}
        result["losses"].append(output.loss.detach())
        result["keys"].append(tuple(output.watch["keys"]))
        if step in GRADIENTS_OF:
            result["gradients"].append(
                whole({n: p.grad for n, p in trained.items() if p.grad is not None})
            )
        result["norms"].append(gradient_norms(trained.items(), objective.places()))
        result["shares"].append(objective.momentum.shares_tokens())
        ratios = UpdateRatios(trained, objective.places())
        ratios.begin()
        weights.step(ema_momentum=0.9, skip=torch.zeros(()))
        distance = ema_distance(objective.averages().items())
        assert distance is not None
        result["norms"][-1] |= {**ratios.finish(), "ema_distance": distance}
        if step == 1:
            result["features"] = evaluate(objective, mine[0], autocast)

    # The state of the last step.
    tensors = training_state.collect(objective, weights)
    result["state"] = whole({n: t for n, t in tensors.items() if not n.startswith("rng")})
    result["sharded"] = {n for n, t in tensors.items() if isinstance(t, DTensor)}
    result["dtypes"] = {t.dtype for t in tensors.values() if t.is_floating_point()}
    result["notes"] = (
        len(objective.momentum_encoder._get_fsdp_state()._comm_ctx.post_forward_order)
        if (hasattr(objective.momentum_encoder, "_get_fsdp_state"))
        else 0
    )
    return result


def evaluate(objective: MoCoV3, images: Tensor, autocast: Callable[[], Any]) -> Tensor:
    """Features of the encoder as for kNN."""
    objective.encoder.eval()
    with torch.no_grad(), autocast():
        features: Tensor = objective.encoder(images)
    objective.encoder.train()
    return features


def mutant(target: str, replacement: object) -> Callable[[World, str], Case]:
    """The same training with one fault; returns its error, if any."""

    def run(world: World, strategy: str) -> Case:
        with mock.patch(target, replacement):
            return run_steps(world, strategy)

    return run


def run_mixed_start(world: World, strategy: str) -> Case:
    """Mutant: the last rank starts from another seed; once with the comparison
    at the start, once without.
    """
    seed = 30 + int(world.rank == world.world_size - 1)
    message = message_of(lambda: run_steps(world, strategy, seed=seed))
    with mock.patch("fastmoco.distributed.parallelize.require_equal_start"):
        return run_steps(world, strategy, seed=seed) | {"message": message}


def run_uneven(world: World, strategy: str) -> Case:
    """Mutant: the last rank has one image less."""
    objective, batches = build("patch", torch.float64)
    forward = parallelize(objective, world, strategy=strategy, shard_size=2)  # type: ignore[arg-type]
    rows = 3 - int(world.rank == world.world_size - 1)
    return {"message": message_of(lambda: forward(*(view[:rows] for view in batches[0])))}


def run_default_roots(world: World, strategy: str) -> Case:
    """Mutant: torch's default roots, which keep their weights unsharded until a backward."""

    def as_torch_does(module: Any, **options: Any) -> Any:
        return fully_shard(module, **options | {"reshard_after_forward": None})

    with mock.patch("torch.distributed.fsdp.fully_shard", as_torch_does):
        try:
            return run_steps(world, strategy)
        except (ValueError, RuntimeError, AttributeError, KeyError) as error:
            return {"message": f"{type(error).__name__}: {error}"}


def run_flipped_bit(world: World, strategy: str) -> Case:
    """One bit of the last rank flips: in a weight, a shard of one, a buffer, or
    an unsharded weight.
    """
    objective, _ = build("patch", torch.float64)
    parallelize(objective, world, strategy=strategy, shard_size=2)  # type: ignore[arg-type]
    named = objective.state_dict(keep_vars=True)
    messages = {}
    for name in ("predictor.0.weight", "encoder.head.1.running_var", "momentum_encoder.pos_embed"):
        own = named[name].detach()
        bits = (own.to_local() if isinstance(own, DTensor) else own).view(torch.int64).view(-1)
        require_equal_replicas(objective, world)
        flip = int(world.rank == world.world_size - 1)
        bits[5] ^= flip
        messages[name] = message_of(lambda: require_equal_replicas(objective, world))
        bits[5] ^= flip
    require_equal_replicas(objective, world)
    return {"messages": messages}


def run_unsynced(world: World, strategy: str) -> Case:
    """Mutant: even the last chunk does not reduce the gradients of the trunk."""
    with mock.patch.object(ShardedGradientAverage, "last", ShardedGradientAverage.local):
        return run_steps(world, strategy, chunk=2)


def run_compiled(world: World, strategy: str) -> Case:
    """Blocks traced by torch.compile and run without its code generator, which
    takes minutes on few cores.
    """
    traced = functools.partial(torch.compile, backend="aot_eager")
    with mock.patch("fastmoco.models.compiled.torch.compile", traced):
        return run_steps(world, strategy, dtype=torch.float32, compiled=True)


def run_bad_shard_size(world: World) -> Case:
    """Groups of all processes, and of a number that does not divide them."""
    objective, _ = build("patch", torch.float64)

    def message(size: int) -> str:
        return message_of(lambda: parallelize(objective, world, strategy="hsdp", shard_size=size))

    return {"messages": [message(world.world_size), message(3)]}


OPTIONS: dict[str, Case] = {
    "fp64": {},
    "fp32": {"dtype": torch.float32},
    "chunked fp64": {"chunk": 2, "kept": 1},
    "chunked fp32": {"chunk": 2, "dtype": torch.float32},
    "conv fp64": {"stem": "conv"},
    "recomputed fp64": {"recompute": "full", "chunk": 2},
    "fused fp64": {"fused": True, "chunk": 2, "kept": 1},
    "adamw fp64": {"optimizer": "adamw"},
    "sweep fp64": {"optimizer": "sweep"},
    "lars groups fp64": {"groups": True},
    "sweep groups fp64": {"optimizer": "sweep", "groups": True},
    "bf16": {"dtype": torch.float32, "bf16": True},
    "bf16 chunked": {"dtype": torch.float32, "bf16": True, "chunk": 2, "kept": 1},
    "bf16 fused": {"dtype": torch.float32, "bf16": True, "chunk": 2, "kept": 1, "fused": True},
}
MUTANTS: dict[str, Callable[[World, str], Case]] = {
    "wrong offset": mutant("fastmoco.objectives.key_comparison.group_rank", lambda: 0),
    "local norms": mutant("fastmoco.distributed.sync_batch_norm.group_size", lambda: 1),
    "mixed start": run_mixed_start,
    "uneven": run_uneven,
    "flipped bit": run_flipped_bit,
    "default roots": run_default_roots,
    "unsynced trunk": run_unsynced,
    "compiled fp32": run_compiled,
}
"""Other ways to run, most of them wrong."""
CASES: dict[int, dict[str, tuple[str, ...]]] = {
    2: {"ddp": ("fp64", "bf16", "uneven", "flipped bit"), "fsdp": (*OPTIONS, *MUTANTS)},
    4: {
        "ddp": ("fp64",),
        "fsdp": ("fp64", "chunked fp64", "fp32", "wrong offset", "local norms"),
        "hsdp": ("fp64", "chunked fp64", "fp32", "bf16", "mixed start", "uneven", "flipped bit"),
    },
}
"""Cases by number of ranks. DDP and its mutants are in run_ranks.py and run_chunked.py."""


def cases_of(world_size: int) -> dict[str, Callable[[World], Case]]:
    """Every case of a number of ranks, by name."""
    cases: dict[str, Callable[[World], Case]] = {"bad shard size": run_bad_shard_size}
    for strategy, names in CASES[world_size].items():
        for name in names:
            run = (
                MUTANTS[name] if name in MUTANTS else functools.partial(run_steps, **OPTIONS[name])
            )
            cases[f"{strategy} {name}"] = functools.partial(_with_strategy, run, strategy)
    return cases


def _with_strategy(run: Callable[..., Case], strategy: str, world: World) -> Case:
    return run(world, strategy)


if __name__ == "__main__":
    run_cases(cases_of(int(os.environ["WORLD_SIZE"])))
