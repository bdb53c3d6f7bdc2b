"""Matrix products in float8 for the momentum encoder only, which has no backward; one product per
layer, without torchao.

    y = s_x s_w (x8 w8^T) + b,    x8 = e4m3(x / s_x),    w8 = e4m3(W / s_w)

A row of `x` is a token, a row of `W` an output channel. Each has its own scale: the smallest power
of two that brings its largest entry to at most 448, the largest number of e4m3. Scaling therefore
adds no rounding, the result of a token does not depend on other tokens, and keys do not depend on
micro-batches. `torch._scaled_mm` applies both scales in its epilogue.

`W` and `b` change once per step, by the momentum update. `refresh_` rounds them once for all
micro-batches, into tensors that keep their addresses, because captured CUDA graphs read them;
autocast would cast them again in each. The rounded copies belong to no state: parameters stay
float32 under their names, and the momentum update reads and writes those.

Layers are those of `float8.candidates`: the blocks' `qkv`, `proj`, `fc1` and
`fc2`, without the last block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco.models.float8 import BALANCE, candidates
from fastmoco.models.vit import VisionTransformer

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
"""Largest number of e4m3."""
TINY = 1e-30
"""Rows whose entries are all smaller count as zero, so that scales and their
inverses are normal numbers."""
EXPONENT = 0x7F800000
"""The exponent bits of a positive float32."""


class Rows(NamedTuple):
    """A matrix in float8 with a scale for each row; it represents `values * scales`."""

    values: Tensor
    """[M, K] e4m3."""
    scales: Tensor
    """[M, 1] float32, powers of two."""


def quantise_rows(matrix: Tensor) -> Rows:
    """Round a matrix to float8, each row with its own power of two as scale.

    Args:
        matrix: [M, K], any floating dtype; read once for the scales and once
            for the values, both in float32.

    Returns:
        The rows, with a relative error of at most 2^-4 or, for small entries, an error of 2^-10 of
        the scale. A row with NaN or infinity contains NaN, so that non-finite values stay
        non-finite.
    """
    wide = matrix.float()
    largest = wide.abs().amax(dim=1, keepdim=True)
    inverse = (
        (LARGEST / largest.clamp(min=TINY))
        .view(torch.int32)
        .bitwise_and(EXPONENT)
        .view(torch.float32)
    )
    return Rows((wide * inverse).to(FLOAT8).contiguous(), inverse.reciprocal())


class Float8Linear(nn.Linear):
    """A linear layer of the momentum encoder that multiplies in float8; forward only.

    Args:
        linear: its parameters are used, the same objects.
        emulate: multiply the rounded operands in float32, on any device: the reference, slow.

    Attributes:
        rounded: weight and bias for the product, or None before the first `refresh_`.
    """

    def __init__(self, linear: nn.Linear, *, emulate: bool = False) -> None:
        nn.Module.__init__(self)
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.emulate = emulate
        self.weight = linear.weight
        self.bias = linear.bias
        self.rounded: tuple[Rows, Tensor] | None = None
        self._seen: tuple[torch.device, int] | None = None

    @torch.no_grad()
    def refresh_(self) -> None:
        """Round the current weights, in place after the first time, so that
        addresses stay the same.
        """
        bias = self.bias if self.bias is not None else self.weight.new_zeros(self.out_features)
        new = quantise_rows(self.weight), bias.to(torch.bfloat16)
        if self.rounded is None or self.rounded[1].device != self.weight.device:
            self.rounded = new
        else:
            (old_rows, old_bias), (new_rows, new_bias) = self.rounded, new
            for old, now in (
                (old_rows.values, new_rows.values),
                (old_rows.scales, new_rows.scales),
            ):
                old.copy_(now)
            old_bias.copy_(new_bias)
        self._seen = self._state()

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] in autocast's dtype, without autocast in that of
        `x`. Without gradient.
        """
        # torch counts writes by its own operations. Kernels may bypass that count, so a step calls
        # `refresh_` itself.
        if not torch.compiler.is_compiling() and self._seen != self._state():
            self.refresh_()
        if self.rounded is None:
            raise RuntimeError(
                "float8 layer before its first refresh_(): it has no rounded weights"
            )
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        rows = quantise_rows(x.reshape(-1, self.in_features))
        product = multiply_emulated if self.emulate else multiply
        return product(rows, *self.rounded).to(dtype).view(*x.shape[:-1], self.out_features)

    def _state(self) -> tuple[torch.device, int]:
        return self.weight.device, self.weight._version


def multiply(x: Rows, weight: Rows, bias: Tensor) -> Tensor:
    """`x @ weight^T + bias` in hardware.

    Args:
        x: [M, K]; K a multiple of 16.
        weight: [N, K]; N a multiple of 16.
        bias: [N] bf16.

    Returns:
        [M, N] bf16, rounded once. CUDA's fast accumulation has fewer bits than
        float32 and far more than e4m3.
    """
    return torch._scaled_mm(
        x.values,
        weight.values.t(),
        scale_a=x.scales,
        scale_b=weight.scales.t(),
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def multiply_emulated(x: Rows, weight: Rows, bias: Tensor) -> Tensor:
    """Reference of `multiply`: the same product in float32, equal but for the order of sums."""
    with torch.autocast(x.values.device.type, enabled=False):
        wide_x, wide_weight = (rows.values.float() * rows.scales for rows in (x, weight))
        return F.linear(wide_x, wide_weight, bias.float()).to(torch.bfloat16)


def use_float8_inference_(encoder: VisionTransformer, *, emulate: bool = False) -> list[str]:
    """Replace an encoder's `candidates` by float8 layers for the forward, in place. Call it before
    compiling and wrapping.

    Args:
        encoder: on any device, without gradient; its parameters do not change.
        emulate: as `Float8Linear`; for tests.

    Returns:
        Names of the layers.
    """
    chosen = candidates(encoder)
    for name, linear in chosen.items():
        parent, _, child = name.rpartition(".")
        setattr(encoder.get_submodule(parent), child, Float8Linear(linear, emulate=emulate))
    return list(chosen)


def float8_layers(module: nn.Module) -> list[Float8Linear]:
    """The layers of a module that `use_float8_inference_` has made; call
    `refresh_` on each after weights change.
    """
    return [part for part in module.modules() if isinstance(part, Float8Linear)]


def forward_speed(encoder: VisionTransformer, *, fused: bool = False) -> float:
    """Upper bound on the speed of the float8 layers' forward relative to bf16,
    counted from shapes for an H200.

    For each token and each layer of K inputs and N outputs both take 2 K N FLOP. In bf16 they move
    2 K + 2 N bytes, with half the arithmetic rate of float8. In float8 they move K + 2 N, and a
    cast before them reads the operand in bf16 and writes it in float8, 3 K. Each product takes the
    longer of its two times. Bytes of weights are neglected, as in `float8.flop_per_byte`.

    Args:
        encoder: its `candidates` are counted.
        fused: whether layer norm and GELU write float8 instead of bf16, as kernels of torch.compile
            do. Only `proj`, whose operand is the output of attention, then has its own cast; the
            others write K bytes instead of 2 K.
    """
    native = float8 = 0.0
    for name, layer in candidates(encoder).items():
        K, N = layer.in_features, layer.out_features
        cast = -K if fused and not name.endswith("proj") else 3 * K
        native += max(2 * K * N / (BALANCE / 2), 2 * K + 2 * N)
        float8 += max(2 * K * N / BALANCE, K + 2 * N) + cast
    return native / float8 if float8 else 0.0


def require_gain(encoder: VisionTransformer) -> None:
    """Refuse encoders that float8 would slow down, with separate passes for the casts.

    Raises:
        ValueError: with the counted speed.
    """
    found = forward_speed(encoder)
    if found <= 1:
        raise ValueError(
            f"model.momentum_linears='float8': with {encoder.embed_dim} channels products and "
            f"casts of the forward run at {found:.2f} of the speed of bf16 on an H200, counted "
            "from shapes, not measured. Use model.momentum_linears native, or an encoder of at "
            "least the size of vit_small"
        )


def require_whole(sharded: bool) -> None:
    """Refuse sharded weights.

    Raises:
        ValueError: with the cure.
    """
    if sharded:
        raise ValueError(
            "model.momentum_linears='float8': rounds whole weights once per step, but with "
            "parallel.strategy fsdp or hsdp a process has only parts of them; "
            "use parallel.strategy ddp, or model.momentum_linears native"
        )
