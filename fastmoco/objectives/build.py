"""From a config to an objective: encoder, momentum encoder and heads, initialised from the seed."""

from __future__ import annotations

from functools import partial

import torch

from fastmoco.config import Config
from fastmoco.models import float8, float8_inference
from fastmoco.models.blocks import Block
from fastmoco.models.precision import choose_precision
from fastmoco.models.vit import ARCHITECTURES, VisionTransformer
from fastmoco.objectives import MoCoV3
from fastmoco_kernels.attention.choice import AttentionChoice, choose_attention


def build_objective(config: Config, device: torch.device) -> MoCoV3:
    """Encoder, twin and heads of a config, initialised from its seed: the same numbers on every rank and device.

    Raises:
        ValueError: if the device does not multiply as the config says, or that would lose.
    """
    for name in ("linears", "momentum_linears"):
        if getattr(config.model, name) == "float8":
            float8.require_support(device, choose_precision(config.precision, device), field=f"model.{name}")
    torch.manual_seed(config.seed)
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    return build_model(config).to(device, dtype)


def build_model(config: Config) -> MoCoV3:
    """Encoder, twin and heads of a config as torch's current seed, device and dtype make them."""
    model = config.model
    build_encoder = partial(
        ARCHITECTURES[model.architecture],
        image_size=model.image_size,
        patch_size=model.patch_size,
        attention=model.attention,
    )
    objective = MoCoV3(
        build_encoder,
        projection_dim=model.projection_dim,
        hidden_dim=model.hidden_dim,
        temperature=config.objective.temperature,
        ema_momentum=config.objective.ema_momentum,
        ema_schedule=config.objective.ema_schedule,
        epochs=config.epochs,
    )
    objective.encoder.recompute(model.checkpointing)
    for encoder in (objective.encoder, objective.momentum_encoder):
        # Float8 layers of a momentum encoder are modules, which a fused block would pass by.
        ours = model.blocks == "fused" and (encoder is objective.encoder or model.momentum_linears == "native")
        for block in encoder.blocks:
            assert isinstance(block, Block)
            block.fused = ours
    if model.linears == "float8":
        for encoder in (objective.encoder, objective.momentum_encoder):
            float8.require_gain(encoder)
            float8.use_float8_(encoder)
    if model.momentum_linears == "float8":
        float8_inference.require_gain(objective.momentum_encoder)
        float8_inference.use_float8_inference_(objective.momentum_encoder)
    return objective


def attention_choice(
    config: Config, encoder: VisionTransformer, precision: str, device: torch.device
) -> AttentionChoice:
    """Who computes attention in a run, and why.

    Raises:
        ValueError: if the config names a backend that does not run here: with what it lacks and the cure.
    """
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[precision]
    block = encoder.blocks[0]
    assert isinstance(block, Block)
    tokens = encoder.pos_embed.shape[1]
    head_dim = encoder.embed_dim // block.attn.num_heads
    return choose_attention(device, dtype, tokens, tokens, head_dim, backend=config.model.attention)
