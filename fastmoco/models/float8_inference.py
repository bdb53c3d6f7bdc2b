"""Matrix products in float8 for the momentum encoder alone: it has no backward, so one product a layer, without torchao.

    y = s_x s_w (x8 w8^T) + b,    x8 = e4m3(x / s_x),    w8 = e4m3(W / s_w)

A row of `x` is a token, a row of `W` an output channel. Each has a scale of its own: the smallest power of two that
brings its largest entry to e4m3's 448 or below. So scaling rounds nothing, a token's result hangs on no other token, and
keys are those of the whole batch whatever the chunks. `torch._scaled_mm` takes both scales in its epilogue.

`W` and `b` change once a step, by the average, and serve every chunk of it: `refresh_` rounds them once, into tensors that
keep their addresses (a captured CUDA graph reads them), where autocast casts all weights anew in every chunk. They belong to
no state: parameters stay the float32 tensors that they were, under their names, and the average is taken in those.

Layers are those of `float8.candidates`: the blocks' `qkv`, `proj`, `fc1` and `fc2`, without the last block.
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
"""A row whose entries are all smaller counts as zero; keeps scales and their inverses normal numbers."""
EXPONENT = 0x7F800000
"""The bits of a positive float32 that are left of its mantissa."""


class Rows(NamedTuple):
    """A matrix in float8 with a scale for each row; `values * scales` is what it stands for."""

    values: Tensor
    """[M, K] e4m3."""
    scales: Tensor
    """[M, 1] float32, powers of two."""


def quantise_rows(matrix: Tensor) -> Rows:
    """Round a matrix to float8, each row scaled by a power of two of its own.

    Args:
        matrix: [M, K], any floating dtype; read once for the scales and once for the values, both in float32.

    Returns:
        The rows, each entry within 2^-4 of itself or, where it is small, 2^-10 of the scale. A row with NaN or infinity has
        NaN, so that what is not finite stays so.
    """
    wide = matrix.float()
    largest = wide.abs().amax(dim=1, keepdim=True)
    inverse = (LARGEST / largest.clamp(min=TINY)).view(torch.int32).bitwise_and(EXPONENT).view(torch.float32)
    return Rows((wide * inverse).to(FLOAT8).contiguous(), inverse.reciprocal())


class Float8Linear(nn.Linear):
    """A linear layer of the momentum encoder that multiplies in float8; forward only.

    Args:
        linear: whose parameters it takes over, the same objects.
        emulate: multiply what was rounded to float8 in float32, on any device: the reference, slow.

    Attributes:
        rounded: weight and bias as the product reads them, or None before the first `refresh_`.
    """

    def __init__(self, linear: nn.Linear, *, emulate: bool = False) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.emulate = linear.in_features, linear.out_features, emulate
        self.weight, self.bias = linear.weight, linear.bias
        self.rounded: tuple[Rows, Tensor] | None = None
        self._seen: tuple[torch.device, int] | None = None

    @torch.no_grad()
    def refresh_(self) -> None:
        """Round the weights as they are now. In place where that was done before, so that addresses stay."""
        bias = self.bias if self.bias is not None else self.weight.new_zeros(self.out_features)
        new = quantise_rows(self.weight), bias.to(torch.bfloat16)
        if self.rounded is None or self.rounded[1].device != self.weight.device:
            self.rounded = new
        else:
            (old_rows, old_bias), (new_rows, new_bias) = self.rounded, new
            for old, now in ((old_rows.values, new_rows.values), (old_rows.scales, new_rows.scales)):
                old.copy_(now)
            old_bias.copy_(new_bias)
        self._seen = self._state()

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] in autocast's dtype, without autocast in that of `x`. Without gradient."""
        # Whoever writes weights by torch's operations is seen here; kernels may write past torch's count, so a step refreshes.
        if not torch.compiler.is_compiling() and self._seen != self._state():
            self.refresh_()
        if self.rounded is None:
            raise RuntimeError("float8 layer before its first refresh_(): there are no rounded weights to multiply by")
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        rows = quantise_rows(x.reshape(-1, self.in_features))
        product = multiply_emulated if self.emulate else multiply
        return product(rows, *self.rounded).to(dtype).view(*x.shape[:-1], self.out_features)

    def _state(self) -> tuple[torch.device, int]:
        return self.weight.device, self.weight._version


def multiply(x: Rows, weight: Rows, bias: Tensor) -> Tensor:
    """`x @ weight^T + bias` by the hardware.

    Args:
        x: [M, K]; K a multiple of 16.
        weight: [N, K]; N a multiple of 16.
        bias: [N] bf16.

    Returns:
        [M, N] bf16, rounded once. CUDA's fast accumulation keeps fewer bits than float32 in between, and far more than e4m3's.
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
    """The same from what the rows stand for, in float32: the reference of `multiply`, equal but for the order of sums."""
    with torch.autocast(x.values.device.type, enabled=False):
        wide_x, wide_weight = (rows.values.float() * rows.scales for rows in (x, weight))
        return F.linear(wide_x, wide_weight, bias.float()).to(torch.bfloat16)


def use_float8_inference_(encoder: VisionTransformer, *, emulate: bool = False) -> list[str]:
    """Compute an encoder's `candidates` in float8 from now on, forward only, in place. Before compiling and wrapping.

    Args:
        encoder: on any device, without gradient; its parameters stay as they are.
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
    """The layers of a module that `use_float8_inference_` has made; `refresh_` each when weights have moved."""
    return [part for part in module.modules() if isinstance(part, Float8Linear)]


def forward_speed(encoder: VisionTransformer, *, fused: bool = False) -> float:
    """How much faster the float8 layers' forward could be than bf16's, counted from shapes for an H200.

    For a token and a layer of K inputs and N outputs both take 2 K N FLOP. In bf16 they move 2 K + 2 N bytes at half of
    float8's rate; in float8 K + 2 N, and a pass before them reads the operand in bf16 and writes it in float8, 3 K. Each
    product takes the longer of its two times. Weights are left out, as in `float8.flop_per_byte`.

    Args:
        encoder: its `candidates` are counted.
        fused: layer norm and GELU write float8 instead of bf16, as torch.compile's kernels do: then only `proj`, whose
            operand is attention's output, has a pass of its own, and the others write K bytes where they would write 2 K.
    """
    native = float8 = 0.0
    for name, layer in candidates(encoder).items():
        K, N = layer.in_features, layer.out_features
        cast = -K if fused and not name.endswith("proj") else 3 * K
        native += max(2 * K * N / (BALANCE / 2), 2 * K + 2 * N)
        float8 += max(2 * K * N / BALANCE, K + 2 * N) + cast
    return native / float8 if float8 else 0.0


def require_gain(encoder: VisionTransformer) -> None:
    """Refuse encoders that float8 can only slow down, by casts in passes of their own.

    Raises:
        ValueError: with what was counted.
    """
    found = forward_speed(encoder)
    if found <= 1:
        raise ValueError(
            f"model.momentum_linears='float8': with {encoder.embed_dim} channels the forward's products and casts run at "
            f"{found:.2f} of bf16's speed on an H200, counted from shapes, not measured here. Take model.momentum_linears "
            "native, or an encoder from vit_small up"
        )


def require_whole(sharded: bool) -> None:
    """Refuse weights that lie in shards.

    Raises:
        ValueError: with the cure.
    """
    if sharded:
        raise ValueError(
            "model.momentum_linears='float8': rounds whole weights once a step, and under parallel.strategy fsdp or hsdp a "
            "process holds parts of them; take parallel.strategy ddp, or model.momentum_linears native"
        )
