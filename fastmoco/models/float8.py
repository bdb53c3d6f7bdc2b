"""Matrix products in float8 for wide encoders, by torchao: which linear layers, on which devices, and where it cannot pay.

torchao replaces a linear layer's forward and both products of its backward; parameters stay the same objects under the same
names, so state, optimizers, twin and shards see nothing of it. Each row of an operand is scaled by a power of two to the
range of float8 (e4m3) as it comes, so nothing is carried from step to step. Rows of the inputs are tokens, and a token's
outputs and gradients do not depend on its neighbours: a chunk is exact there. In the gradient of the weights rows are
channels, scaled by their largest entry over all tokens of a product: there another chunk, or another number of processes,
moves what falls below float8's smallest normal number, 2^-15 of the largest. docs/precision.md has the figures.

Left in bf16: patch projection and heads; layers whose sides are not multiples of 16, which the hardware cannot take; and the
last block, of which only the class token is read: few rows, and its queries and values go round the layer (`blocks`).
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

BALANCE = 367.0
"""FLOP a byte from which float8 products wait for arithmetic, not for memory: 1580 TFLOP/s over 4.3 TB/s, an H200."""
CAPABILITY = (8, 9)
"""First CUDA capability that multiplies float8: Ada, then Hopper."""
ALIGNMENT = 16
"""Both sides of a float8 product's weights are multiples of this."""


def candidates(encoder: VisionTransformer) -> dict[str, nn.Linear]:
    """The layers that become float8, by their names in the encoder."""
    return {
        f"blocks.{i}.{name}": module
        for i, block in enumerate(encoder.blocks[:-1])
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and module.in_features % ALIGNMENT == module.out_features % ALIGNMENT == 0
    }


def flop_per_byte(encoder: VisionTransformer) -> float:
    """FLOP of a step's float8 products over the bytes that they and their casts move at least.

    For a token and a layer of K inputs and N outputs a step has four products of 2 K N FLOP: query, key, and the gradients
    of inputs and weights. An operand is read in bf16, written in float8, and read again: 4 bytes a number; a result is
    written in bf16. Both forwards take 4 K + 2 N bytes each, the gradient of the inputs 4 N + 2 K, that of the weights
    4 K + 4 N. Weights are left out: a batch has far more tokens than an encoder has channels.
    """
    sizes = [(layer.in_features, layer.out_features) for layer in candidates(encoder).values()]
    moved = sum(14 * K + 12 * N for K, N in sizes)
    return sum(8 * K * N for K, N in sizes) / moved if moved else 0.0


def require_gain(encoder: VisionTransformer) -> None:
    """Refuse encoders that float8 can only slow down.

    Raises:
        ValueError: with the FLOP a byte of the encoder, and those it would need.
    """
    found = flop_per_byte(encoder)
    if found < BALANCE:
        raise ValueError(
            f"model.linears='float8': the products of this encoder, {encoder.embed_dim} channels wide, do {found:.0f} FLOP a "
            f"byte, casts included; below {BALANCE:.0f} an H200 waits for memory and float8 loses. Both are counted from "
            "shapes, not measured here. Take model.linears native, or an encoder from vit_large up"
        )


def require_support(device: torch.device, precision: str, *, field: str = "model.linears") -> None:
    """Refuse devices that do not multiply float8, and precisions that do not go with it.

    Args:
        device: of the encoder.
        precision: "bf16", "fp32" or "fp64".
        field: which asks for float8, as errors name it.

    Raises:
        ValueError: with what is missing, and the cure.
    """
    if device.type != "cuda":
        raise ValueError(
            f"{field}='float8': there are no fast float8 products on device {device.type!r}, only on CUDA; "
            f"take {field} native"
        )
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        raise ValueError(
            f"{field}='float8': {torch.cuda.get_device_name(device)} has CUDA capability {found[0]}.{found[1]}, and "
            f"float8 products come with {CAPABILITY[0]}.{CAPABILITY[1]}; take {field} native"
        )
    if precision != "bf16":
        raise ValueError(
            f"{field}='float8': goes with precision bf16, not {precision}: whoever wants more than bf16 keeps does not "
            f"want less in between; take --precision bf16, or {field} native"
        )


def use_float8_(encoder: VisionTransformer, *, emulate: bool = False) -> list[str]:
    """Compute the encoder's `candidates` in float8 from now on, in place. Before compiling, wrapping and sharding.

    Args:
        encoder: on any device; its parameters stay as they are.
        emulate: round to float8, multiply in float32: slow, for tests on any device.

    Returns:
        Names of the layers.

    Raises:
        ModuleNotFoundError: without torchao.
    """
    chosen = candidates(encoder)
    convert, rowwise = _torchao()
    # Tokens of a batch need not be a multiple of 16: then, and only then, a product is padded with zeros.
    config = replace(rowwise, pad_inner_dim=True, emulate=emulate)
    convert(encoder, module_filter_fn=lambda _, name: name in chosen, config=config)
    for name in chosen:
        encoder.get_submodule(name).register_forward_pre_hook(_as_autocast_has_it)
    return list(chosen)


def _as_autocast_has_it(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
    """Inputs in autocast's type. torchao asks CUDA's autocast alone; a plan is counted, and tests run, on a CPU."""
    kind = inputs[0].device.type
    return (inputs[0].to(torch.get_autocast_dtype(kind)),) if torch.is_autocast_enabled(kind) else None


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
            "model.linears='float8' needs torchao: pip install '.[float8]' in fastmoco's source folder", name="torchao"
        ) from error
    return convert_to_float8_training, Float8LinearConfig.from_recipe_name("rowwise")


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """No warnings of these loggers: torchao names every library of its own that a machine cannot load, and needs none here."""
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
