"""From a config to an objective: encoders and heads, initialised from the seed, in the form that
the config asks for."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch

from fastmoco.config import Config, MoCoV3Config, ModelConfig, ObjectiveConfig
from fastmoco.models import float8, float8_inference
from fastmoco.models.blocks import Block
from fastmoco.models.convnextv2 import CONVNEXTS, ConvNeXtV2
from fastmoco.models.decoder import TokenDecoder
from fastmoco.models.drop_path import PathDraws
from fastmoco.models.encoder import Encoder
from fastmoco.models.map_decoder import MapDecoder
from fastmoco.models.precision import choose_precision
from fastmoco.models.resnet import RESNETS, ResNet
from fastmoco.models.swin import SWINS, SwinTransformer
from fastmoco.models.token_drop import TokenDraws
from fastmoco.models.vit import ARCHITECTURES, VisionTransformer
from fastmoco.objectives.byol import BYOL
from fastmoco.objectives.cmae import CMAE
from fastmoco.objectives.dino import DINO
from fastmoco.objectives.esvit import EsViT
from fastmoco.objectives.extrema import ExtreMA
from fastmoco.objectives.fcmae import FCMAE
from fastmoco.objectives.interface import Objective
from fastmoco.objectives.macrl import MACRL
from fastmoco.objectives.mae import MAE
from fastmoco.objectives.maskfeat import MaskFeat
from fastmoco.objectives.moby import MoBY
from fastmoco.objectives.moco import MoCo
from fastmoco.objectives.moco_v3 import MoCoV3
from fastmoco.objectives.mp3 import MP3
from fastmoco.objectives.projector_momentum import ProjectorMomentum
from fastmoco.objectives.sdssl import SDSSL
from fastmoco.objectives.simclr import SimCLR
from fastmoco.objectives.simsiam import SimSiam
from fastmoco.objectives.supervised import Supervised
from fastmoco.objectives.supmae import SupMAE
from fastmoco.objectives.swav import SwAV
from fastmoco.recipes.byol import BYOLConfig
from fastmoco.recipes.cmae import CMAEConfig
from fastmoco.recipes.dino import DINOConfig
from fastmoco.recipes.esvit import EsViTConfig
from fastmoco.recipes.extrema import ExtreMAConfig
from fastmoco.recipes.fcmae import FCMAEConfig
from fastmoco.recipes.macrl import MACRLConfig
from fastmoco.recipes.mae import MAEConfig
from fastmoco.recipes.maskfeat import MaskFeatConfig
from fastmoco.recipes.moby import MoBYConfig
from fastmoco.recipes.moco import MoCoConfig
from fastmoco.recipes.mp3 import MP3Config
from fastmoco.recipes.projector_momentum import ProjectorMomentumConfig
from fastmoco.recipes.sdssl import SDSSLConfig
from fastmoco.recipes.simclr import SimCLRConfig
from fastmoco.recipes.simsiam import SimSiamConfig
from fastmoco.recipes.supervised import SupervisedConfig
from fastmoco.recipes.supmae import SupMAEConfig
from fastmoco.recipes.swav import SwAVConfig
from fastmoco_kernels.attention.choice import AttentionChoice, choose_attention
from fastmoco_pipelines.spec import each_view

BuildEncoder: TypeAlias = Callable[[], Any]
"""Makes an `Encoder`."""
OBJECTIVES: dict[type[ObjectiveConfig], Callable[[Config, BuildEncoder], Objective]] = {
    MoCoV3Config: MoCoV3.build,
    BYOLConfig: BYOL.build,
    SimCLRConfig: SimCLR.build,
    SwAVConfig: SwAV.build,
    DINOConfig: DINO.build,
    MoCoConfig: MoCo.build,
    SimSiamConfig: SimSiam.build,
    ProjectorMomentumConfig: ProjectorMomentum.build,
    SupervisedConfig: Supervised.build,
    SDSSLConfig: SDSSL.build,
    MAEConfig: MAE.build,
    SupMAEConfig: SupMAE.build,
    CMAEConfig: CMAE.build,
    MACRLConfig: MACRL.build,
    MoBYConfig: MoBY.build,
    FCMAEConfig: FCMAE.build,
    MaskFeatConfig: MaskFeat.build,
    MP3Config: MP3.build,
    EsViTConfig: EsViT.build,
    ExtreMAConfig: ExtreMA.build,
}
"""Type of `Config.objective` -> what makes the objective of a config, from what makes an
encoder."""


def build_objective(config: Config, device: torch.device) -> Objective:
    """The objective of a config, initialised from its seed: the same numbers on every rank and
    device.

    Raises:
        ValueError: if the device does not multiply as the config says, or that would lose; or if a
            tensor does not fit into the memory.
    """
    for name in ("linears", "momentum_linears"):
        if getattr(config.model, name) == "float8":
            float8.require_support(
                device, choose_precision(config.precision, device), field=f"model.{name}"
            )
    torch.manual_seed(config.seed)
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    try:
        return build_model(config).to(device, dtype)
    except RuntimeError as error:
        wanted = re.search(
            r"(?:tried to allocate|out of memory|size calculation overflowed)[^.]*", str(error)
        )
        if wanted is None:
            raise
        raise ValueError(
            f"the weights and buffers of this config do not fit into the memory ({wanted[0]}): take a "
            "smaller architecture, model.hidden_dim, objective.prototypes or objective.queue; "
            "fastmoco plan shows what they need"
        ) from error


def build_model(config: Config) -> Objective:
    """The objective of a config as torch's current seed, device and dtype make it.

    Raises:
        ValueError: if it takes another number of views than the config makes, or more large ones.
    """
    model = config.model
    objective = OBJECTIVES[type(config.objective)](config, encoder_builder(model))
    sizes = [view.size for view in each_view(config.data.views)]
    views = len(sizes)
    if objective.view_count not in (None, views):
        raise ValueError(
            f"data: {views} views of an image, and {config.objective.kind} takes "
            f"{objective.view_count}; change data.more_views, or the copies of a view"
        )
    least = objective.least_large
    if sizes[:least] != [model.image_size] * least:
        large = sizes[:least].count(model.image_size)
        raise ValueError(
            f"data: {large} of the first {least} views has model.image_size={model.image_size}, "
            f"and {config.objective.kind} takes {least} such views; set data.view2.copies to 1"
        )
    encoders: list[VisionTransformer] = []
    for network in objective.networks().values():
        if isinstance(network, VisionTransformer):
            encoders.append(network)
        elif isinstance(network, ResNet | SwinTransformer | ConvNeXtV2 | MapDecoder) and _trains(
            network
        ):
            network.recompute(model.checkpointing)
        elif isinstance(network, TokenDecoder):
            _decoder_in_form(network, model)
    if model.momentum_linears == "float8" and all(_trains(encoder) for encoder in encoders):
        raise ValueError(
            f"model.momentum_linears='float8': {config.objective.kind} has no momentum encoder; "
            "take model.momentum_linears native"
        )
    for encoder in encoders:
        _in_form(encoder, model)
    if model.drop_path and _trains(objective.encoder):
        depth = len(objective.encoder.parts().blocks)
        objective.path_draws = PathDraws(model.drop_path, depth, config.seed)
    objective.phases = model.phases
    if objective.phases.drops_tokens:
        objective.token_draws = TokenDraws(config.seed)
    return objective


def encoder_builder(model: ModelConfig) -> BuildEncoder:
    """What makes the encoder of a config."""
    if model.family == "resnet":
        return partial(
            RESNETS[model.architecture],
            image_size=model.image_size,
            zero_residual=model.zero_residual,
        )
    if model.family == "swin":
        return partial(
            SWINS[model.architecture],
            image_size=model.image_size,
            window=model.window,
            eps=model.norm_eps,
        )
    if model.family == "convnextv2":
        return partial(CONVNEXTS[model.architecture], image_size=model.image_size)
    return partial(
        ARCHITECTURES[model.architecture],
        image_size=model.image_size,
        patch_size=model.patch_size,
        freeze_patch_embed=model.freeze_patch_embed,
        pooling=model.pooling,
        positions=model.positions,
        mlp_norm=model.mlp_norm,
        attention=model.attention,
    )


def _trains(encoder: torch.nn.Module) -> bool:
    """Whether an encoder gets gradients; a momentum encoder does not."""
    return any(parameter.requires_grad for parameter in encoder.parameters())


def _in_form(encoder: VisionTransformer, model: ModelConfig) -> None:
    """Give an encoder the form that a config asks for: what it recomputes, fused blocks, products
    in float8."""
    trains = _trains(encoder)
    if trains:
        encoder.recompute(model.checkpointing)
    for block in encoder.blocks:
        assert isinstance(block, Block)  # noqa: S101 - a type: all blocks are of this class
        # Float8 layers of a momentum encoder are modules, which a fused block would bypass.
        block.fused = model.blocks == "fused" and (trains or model.momentum_linears == "native")
    if model.linears == "float8":
        float8.require_gain(encoder)
        float8.use_float8_(encoder)
    if model.momentum_linears == "float8" and not trains:
        float8_inference.require_gain(encoder)
        float8_inference.use_float8_inference_(encoder)


def _decoder_in_form(decoder: TokenDecoder, model: ModelConfig) -> None:
    """Give a decoder what it recomputes, and fused blocks. Its products stay native: it is narrower
    than what gains by float8."""
    decoder.recompute(model.checkpointing)
    for block in decoder.blocks:
        assert isinstance(block, Block)  # noqa: S101 - a type: all blocks are of this class
        block.fused = model.blocks == "fused"


def attention_choice(
    config: Config, encoder: Encoder, precision: str, device: torch.device
) -> AttentionChoice:
    """Who computes attention in a run, and why; "none" for an encoder without attention.

    Raises:
        ValueError: if the config names a backend that does not run here: with what it lacks and the
            cure.
    """
    if isinstance(encoder, SwinTransformer):
        return AttentionChoice("sdpa", "in windows with a mask, which torch's own attention takes")
    if not isinstance(encoder, VisionTransformer):
        return AttentionChoice("none", f"{config.model.architecture} has no attention")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[precision]
    block = encoder.blocks[0]
    assert isinstance(block, Block)  # noqa: S101 - a type: all blocks are of this class
    tokens = encoder.tokens
    head_dim = encoder.embed_dim // block.attn.num_heads
    return choose_attention(device, dtype, tokens, tokens, head_dim, backend=config.model.attention)
