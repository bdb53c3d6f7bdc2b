"""What one of two real processes does with each objective of the table: two steps under DDP,
FSDP2, and in chunks.

Started by test_conformance_ranks.py as `python -m tests.distributed.run_conformance OUT`; the test
computes what they must equal by calling `run_steps` in one process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from fastmoco.config import (
    BatchConfig,
    Config,
    MoCoV3Config,
    ObjectiveConfig,
    OptimConfig,
    ParallelConfig,
)
from fastmoco.distributed import World
from fastmoco.distributed.sharding import shard_
from fastmoco.objectives.build import OBJECTIVES, build_objective
from fastmoco.objectives.interface import START
from fastmoco.objectives.swav import SwAV
from fastmoco.optim.build import build_optimizer
from fastmoco.optim.groups import set_learning_rates
from fastmoco.recipes.dino import DINOConfig
from fastmoco.recipes.esvit import EsViTConfig
from fastmoco.recipes.mae import MAEConfig
from fastmoco.recipes.sdssl import SDSSLConfig
from fastmoco.recipes.simclr import SimCLRConfig
from fastmoco.recipes.supervised import SupervisedConfig
from fastmoco.recipes.swav import SwAVConfig
from fastmoco.training import state as training_state
from fastmoco.training.forward_backward import ForwardBackward
from tests.distributed.cases import run_cases, whole
from tests.distributed.run_ranks import part
from tests.distributed.some_costs import with_some_costs
from tests.fastmoco.objectives.test_conformance import (
    ONLY_CONVNEXT,
    ONLY_VIT,
    REGIONS,
    TRUNKS,
    config_of,
    rest_of,
    rough,
    views_of,
)

IMAGES, STEPS = 12, 2
WAYS: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp"},
    "ddp chunked": {"strategy": "ddp", "chunk": 2},
    "fsdp chunked": {"strategy": "fsdp", "chunk": 2},
}


@dataclass(frozen=True)
class Variant:
    """An objective with other options, and the ways in which two ranks take its steps."""

    kind: type[ObjectiveConfig]
    model: Mapping[str, Any] = field(default_factory=dict)
    objective: Mapping[str, Any] = field(default_factory=dict)
    ways: tuple[str, ...] = ("fsdp",)


VARIANTS = {
    "batch norm in blocks": Variant(MoCoV3Config, {"mlp_norm": "batch", "positions": "none"}),
    "mean, all trained": Variant(
        MoCoV3Config, {"pooling": "mean", "positions": "learned", "freeze_patch_embed": False}
    ),
    "patches that train": Variant(SimCLRConfig, {"freeze_patch_embed": False}),
    "half of the patches, which train": Variant(
        MoCoV3Config, {"freeze_patch_embed": False, "keep_tokens": "0.5@0"}, ways=("fsdp chunked",)
    ),
    "masked patches, which train": Variant(
        MAEConfig,
        {"freeze_patch_embed": False, "positions": "sincos_columns"},
        ways=("fsdp chunked",),
    ),
    "keys in a ring": Variant(
        MoCoV3Config, objective={"keys": "ring"}, ways=("ddp", "fsdp chunked")
    ),
    "SDSSL on SimCLR": Variant(SDSSLConfig, objective={"on": "simclr"}),
    "bare heads": Variant(MoCoV3Config, objective={"predictor": False, "head_norm": False}),
    "DINO with norms": Variant(DINOConfig, objective={"head_norm": True}, ways=("fsdp chunked",)),
    "EsViT with norms": Variant(EsViTConfig, objective={"head_norm": True}, ways=("fsdp chunked",)),
    "frozen trunk": Variant(
        SupervisedConfig,
        objective={"train_from": "head"},
        ways=("ddp", "fsdp", "fsdp chunked"),
    ),
    "batch norm before the classifier": Variant(
        SupervisedConfig,
        objective={"train_from": "head", "feature_norm": True},
        ways=("ddp", "fsdp chunked"),
    ),
}
"""Options of the paper's ablations and of the linear probe."""


def config_for(
    kind: type[ObjectiveConfig],
    trunk: str = "vit",
    strategy: str = "ddp",
    chunk: int = 0,
    variant: str = "",
) -> Config:
    """LARS, which does not enlarge the rounding of gradients that are zero in truth; stochastic
    depth where a trunk has it, whose draws are those of an image wherever it is."""
    options = VARIANTS.get(variant, Variant(kind))
    base = config_of(kind, TRUNKS[trunk])
    frozen = options.objective.get("train_from") == "head"
    depth = 0.3 if trunk != "resnet" and not frozen else 0.0
    return replace(
        base,
        objective=replace(base.objective, **options.objective),
        model=replace(base.model, drop_path=depth, **options.model),
        global_batch_size=IMAGES,
        batch=BatchConfig(chunk=chunk or "none", kept=1 if chunk else "auto"),
        parallel=ParallelConfig(strategy=strategy),  # type: ignore[arg-type]
        optim=OptimConfig(name="lars", lr=0.5, weight_decay=0.01, warmup_epochs=0),
    )


def run_steps(
    world: World, kind: type[ObjectiveConfig], trunk: str = "vit", **how: Any
) -> dict[str, Any]:
    """Losses, gradients of the first step, the state after two and the records that FSDP2 keeps
    for a backward that never comes, on this rank's part of each batch."""
    config = config_for(kind, trunk, **how)
    objective = rough(config)
    with with_some_costs():  # of any objective: chunks are given
        forward_backward = ForwardBackward(config, objective, world, "fp64")
    optimizer = build_optimizer(
        config,
        objective.named_parameters(),
        objective.averages(),
        objective.parameter_group,
    )
    set_learning_rates(optimizer.param_groups, 0.5, peak=0.5)
    found: dict[str, Any] = {"losses": []}
    for step in range(STEPS):
        views = [part(view, world) for view in views_of(config, IMAGES)]
        objective.zero_grad(set_to_none=True)
        rest = {name: part(rows, world) for name, rows in rest_of(objective, IMAGES).items()}
        output = forward_backward(*views, **rest)
        found["losses"].append(output.loss.detach())
        if step == 0:
            named = objective.named_parameters()
            found["gradients"] = whole({n: p.grad for n, p in named if p.grad is not None})
        optimizer.step(ema_momentum=0.9, skip=torch.zeros(()))
        objective.after_step(torch.zeros(()), START)
    tensors = training_state.collect(objective, optimizer)
    # Without what differs between ranks on purpose.
    own = tuple(f"model.{name}" for name in objective.per_rank)
    found["state"] = whole({n: t for n, t in tensors.items() if not n.startswith(("rng", *own))})
    found["sharded"] = any(isinstance(t, DTensor) for t in tensors.values())
    found["records"] = max(
        (
            len(network._get_fsdp_state()._comm_ctx.post_forward_order)  # type: ignore[attr-defined]
            for network in objective.networks().values()
            if hasattr(network, "_get_fsdp_state")
            and not any(p.requires_grad for p in network.parameters())
        ),
        default=0,
    )
    return found


def ways_of(kind: type[ObjectiveConfig], trunk: str) -> tuple[str, ...]:
    """MoCo v3 goes all ways. The others go those that differ most; a ResNet has no chunks. A Swin and
    a ConvNeXt V2 differ from a ViT by their blocks alone, and go one."""
    if trunk in ("swin", "convnext"):
        return ("fsdp chunked",) if kind is MoCoV3Config else ()
    if kind is MoCoV3Config:
        return tuple(WAYS) if trunk == "vit" else ("ddp", "fsdp")
    if trunk == "vit":
        return ("ddp", "fsdp chunked")
    return () if kind.kind in ONLY_VIT | ONLY_CONVNEXT | REGIONS else ("fsdp",)


def scores_in_bf16(world: World) -> dict[str, Any]:
    """Scores of SwAV's prototypes in a sharded run in bf16, and by the whole weight in float32."""
    config = replace(config_of(SwAVConfig), precision="fp32")
    objective = build_objective(config, torch.device("cpu"))
    assert isinstance(objective, SwAV)
    rows = torch.randn(6, config.model.projection_dim, generator=torch.Generator().manual_seed(1))
    expected = rows @ objective.prototypes.weight.detach().T
    shard_(objective, world, bf16=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = objective.prototypes(rows)
        head = objective.encoder.head(torch.randn(6, objective.encoder.embed_dim))
    return {"scores": scores.detach(), "expected": expected, "head": head.dtype}


CASES: dict[str, Callable[[World], dict[str, Any]]] = {
    f"{kind.kind} {trunk} {way}": functools.partial(run_steps, kind=kind, trunk=trunk, **WAYS[way])
    for kind in OBJECTIVES
    for trunk in TRUNKS
    for way in ways_of(kind, trunk)
} | {
    f"{name} {way}": functools.partial(run_steps, kind=variant.kind, variant=name, **WAYS[way])
    for name, variant in VARIANTS.items()
    for way in variant.ways
}
CASES["scores in bf16"] = scores_in_bf16


if __name__ == "__main__":
    run_cases(CASES)
