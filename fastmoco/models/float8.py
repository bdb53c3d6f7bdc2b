"""Matrix products in float8 for wide encoders, with torchao.

torchao replaces the forward of a linear layer and both products of its backward. Parameters stay
the same objects under the same names, so state, optimizers, momentum encoder and shards are not
affected. Every row of an operand is scaled by its own power of two to the range of float8 (e4m3),
so no state is carried from step to step. docs/precision.md describes the errors and their
dependence on micro-batches and ranks.

Some layers stay in bf16: patch projection and heads; layers whose sides are not multiples of 16,
which the hardware does not support; and the last block, which computes few rows and bypasses the
layers for queries and values (`blocks`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fastmoco.models.vit import VisionTransformer
from fastmoco_pipelines.errors import install_command

BALANCE = 367.0
"""FLOP per byte above which float8 products are limited by arithmetic, not memory: 1580 TFLOP/s
over 4.3 TB/s on an H200."""
CAPABILITY = (8, 9)
"""Lowest CUDA capability with float8 products: Ada, then Hopper."""
ALIGNMENT = 16
"""Both sides of the weights of a float8 product are multiples of this."""


def candidates(encoder: VisionTransformer) -> dict[str, nn.Linear]:
    """The layers that float8 replaces, by name in the encoder."""
    return {
        f"blocks.{i}.{name}": module
        for i, block in enumerate(encoder.blocks[:-1])
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
        and module.in_features % ALIGNMENT == module.out_features % ALIGNMENT == 0
    }


def flop_per_byte(encoder: VisionTransformer) -> float:
    """FLOP of the float8 products of a step, divided by the least bytes that
    they and their casts move.

    For each token and each layer of K inputs and N outputs a step has four products of 2 K N FLOP:
    query, key, and the gradients of inputs and weights. An operand is read in bf16, written in
    float8, and read again: 4 bytes per element. A result is written in bf16. Each forward moves 4 K
    + 2 N bytes, the gradient of the inputs 4 N + 2 K, that of the weights 4 K + 4 N. Bytes of
    weights are neglected: a batch has far more tokens than an encoder has channels.
    """
    sizes = [(layer.in_features, layer.out_features) for layer in candidates(encoder).values()]
    moved = sum(14 * K + 12 * N for K, N in sizes)
    return sum(8 * K * N for K, N in sizes) / moved if moved else 0.0


def require_gain(encoder: VisionTransformer) -> None:
    """Refuse encoders that float8 would slow down.

    Raises:
        ValueError: with the FLOP per byte of the encoder and the number that float8 needs.
    """
    found = flop_per_byte(encoder)
    if found < BALANCE:
        raise ValueError(
            f"model.linears='float8': the products of this encoder, {encoder.embed_dim} channels "
            f"wide, do {found:.0f} FLOP per byte, casts included; below {BALANCE:.0f} an H200 "
            "waits for memory and float8 is slower. Both are counted from shapes, not measured. "
            "Use model.linears native, or an encoder of at least the size of vit_large"
        )


def require_support(device: torch.device, precision: str, *, field: str = "model.linears") -> None:
    """Refuse devices without float8 products, and precisions other than bf16.

    Args:
        device: of the encoder.
        precision: "bf16", "fp32" or "fp64".
        field: name of the config field in error messages.

    Raises:
        ValueError: naming the missing capability and the cure.
    """
    if device.type != "cuda":
        raise ValueError(
            f"{field}='float8': device {device.type!r} has no fast float8 products, only CUDA has; "
            f"use {field} native"
        )
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        raise ValueError(
            f"{field}='float8': {torch.cuda.get_device_name(device)} has CUDA capability "
            f"{found[0]}.{found[1]}, and float8 products need {CAPABILITY[0]}.{CAPABILITY[1]}; "
            f"use {field} native"
        )
    if precision != "bf16":
        raise ValueError(
            f"{field}='float8': requires precision bf16, got {precision}: float8 products are less "
            f"precise than bf16, which an {precision} run has ruled out; "
            f"use --precision bf16, or {field} native"
        )


def use_float8_(encoder: VisionTransformer, *, emulate: bool = False) -> list[str]:
    """Replace the encoder's `candidates` by float8 layers, in place. Call it before compiling,
    wrapping and sharding.

    Args:
        encoder: on any device; its parameters do not change.
        emulate: round to float8 but multiply in float32, which is slow; for tests on any device.

    Returns:
        Names of the layers.

    Raises:
        ModuleNotFoundError: without torchao.
    """
    chosen = candidates(encoder)
    convert, rowwise = _torchao()
    # If the tokens of a batch are not a multiple of 16, products are padded with zeros.
    config = replace(rowwise, pad_inner_dim=True, emulate=emulate)
    convert(encoder, module_filter_fn=lambda _, name: name in chosen, config=config)
    for name in chosen:
        encoder.get_submodule(name).register_forward_pre_hook(_as_autocast_has_it)
    return list(chosen)


def _as_autocast_has_it(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
    """Cast inputs to the dtype of autocast. torchao does this on CUDA only, but
    plans and tests run on a CPU.
    """
    kind = inputs[0].device.type
    return (
        (inputs[0].to(torch.get_autocast_dtype(kind)),) if torch.is_autocast_enabled(kind) else None
    )


@cache
def _torchao() -> tuple[Callable[..., Any], Any]:
    """torchao's conversion and its rowwise recipe."""
    try:
        with _quiet("torchao", "torch.utils._pytree"):
            from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "torchao":
            raise
        raise ModuleNotFoundError(
            f"model.linears='float8' needs torchao: {install_command('float8')}",
            name="torchao",
        ) from error
    return convert_to_float8_training, Float8LinearConfig.from_recipe_name("rowwise")


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Silence these loggers: torchao warns of every library that it cannot
    load, and needs none of them here.
    """
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
