"""Accuracy of the gradient of the loss: the one-pass kernel and the fp16
autocast formula, both against float64.

`python -m benchmarks.accuracy` prints a table. Its exit code is 1 unless the gradient error of the
default precision is below that of the autocast formula on every set of trained-like data, at
temperatures 0.2 and 0.07.

On a GPU the kernel and torch's autocast run. Without one both are emulated on the CPU by rounding
the same values as a GPU and summing in float32: for the kernel the unit rows and the terms of the
sum, with the positive in float32; for autocast the operands of the product, the logits, the scaled
logits, their gradient, and the gradient of the rows.

Data are pairs of directions. "random": independent and uniform. "trained-like" and "late":
positives at a mean cosine of 0.93 and 0.99, and directions whose variance falls with the dimension
d as (d + 1)^-0.8, so that negatives have cosines of 0 +- 0.13 and some are hard; at temperature
0.07 the mean probability of the positive is then 0.96 and 0.98.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from benchmarks.contest import relative_error
from fastmoco_kernels import info_nce_loss
from fastmoco_kernels.info_nce.cost import exponent_ceiling
from fastmoco_kernels.info_nce.reference import info_nce_reference

SETS = {"random": (0.0, 0.0), "trained-like": (0.93, 0.8), "late": (0.99, 0.8)}
"""Mean cosine of the positives, and the decay of the spectrum."""
TEMPERATURES = (0.2, 0.07)
GATED = ("trained-like", "late")
PRECISIONS = ("bf16", "fp16", "tf32")
LOSS_SCALE = 2.0**16
"""Loss scale of the fp16 formula, the initial value of torch's gradient scaler."""
DEFAULT = {0.2: "bf16", 0.07: "tf32"}
"""The resolved value of `precision="auto"` for each temperature."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--rows", type=int, default=4096, help="queries, and keys")
    parser.add_argument("--dim", type=int, default=256)
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    how = (
        "measured on the GPU"
        if device.type == "cuda"
        else "emulated on the CPU by rounding operands"
    )
    print(
        f"Relative error of dL/dq against float64, N = M = {arguments.rows}, D = {arguments.dim}; "
        f"{how}.\n"
    )
    columns = ("autocast", *PRECISIONS)
    print(
        "| data, temperature | "
        + " | ".join(f"{c} gradient" for c in columns)
        + " | autocast loss | bf16 loss |"
    )
    print("|---|" + "---|" * (len(columns) + 2))
    beaten = []
    for data, (cosine, decay) in SETS.items():
        for temperature in TEMPERATURES:
            q, keys = pairs(arguments.rows, arguments.dim, cosine, decay, device)
            found = errors(q, keys, temperature)
            gradients = " | ".join(f"{found[c][1]:.1e}" for c in columns)
            print(
                f"| {data} {temperature} | {gradients} | {found['autocast'][0]:.1e} | "
                f"{found['bf16'][0]:.1e} |",
                flush=True,
            )
            if data in GATED and not found[DEFAULT[temperature]][1] < found["autocast"][1]:
                beaten.append(
                    f"{data} {temperature}: {DEFAULT[temperature]} is not below the autocast "
                    "formula"
                )
    print(
        "\n"
        + (
            "\n".join(beaten)
            or f"The default ({DEFAULT}) is below the autocast formula on every trained-like set."
        )
    )
    return 1 if beaten else 0


def pairs(
    rows: int,
    dim: int,
    positive_cosine: float,
    decay: float,
    device: torch.device,
    *,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """[rows, dim] float32 unnormalised queries, and keys whose row i has about
    this cosine with query i.
    """
    generator = torch.Generator().manual_seed(seed)
    spectrum = (torch.arange(dim, dtype=torch.float64) + 1) ** (-decay / 2)
    unit, other = (
        normalize(
            torch.randn(rows, dim, generator=generator, dtype=torch.float64) * spectrum, dim=1
        )
        for _ in range(2)
    )
    keys = positive_cosine * unit + math.sqrt(1 - positive_cosine**2) * other
    lengths = torch.rand(2, rows, 1, generator=generator, dtype=torch.float64) + 0.5
    return (unit * lengths[0]).float().to(device), (keys * lengths[1]).float().to(device)


def errors(q: Tensor, keys: Tensor, temperature: float) -> dict[str, tuple[float, float]]:
    """Relative errors of loss and gradient, by method."""
    truth = gradient_of(
        lambda x: info_nce_reference(x, keys.double(), temperature=temperature, positive_offset=0),
        q.double(),
    )
    if q.is_cuda:
        # with a loss scale, as in practice: without one fp16 flushes the gradient of the logits
        scaled, gradient = gradient_of(
            lambda x: autocast_loss(x, keys, temperature) * LOSS_SCALE, q
        )
        found = {"autocast": (scaled / LOSS_SCALE, gradient / LOSS_SCALE)}
        for precision in PRECISIONS:
            loss = partial(info_nce_loss, keys=keys, temperature=temperature, precision=precision)
            found[precision] = gradient_of(loss, q)
    else:
        found = {"autocast": emulated_autocast(q, keys, temperature)}
        for precision in PRECISIONS:
            found[precision] = emulated_kernel(q, keys, temperature, precision)
    return {
        name: (relative_error(loss, truth[0]), relative_error(gradient, truth[1]))
        for name, (loss, gradient) in found.items()
    }


def gradient_of(loss: Callable[[Tensor], Tensor], q: Tensor) -> tuple[Tensor, Tensor]:
    """A loss and its gradient."""
    q = q.detach().clone().requires_grad_()
    value = loss(q)
    return value.detach(), torch.autograd.grad(value, q)[0]


def autocast_loss(q: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """The formula as in moco-v3, under fp16 autocast: normalisation and cross-entropy in float32,
    the product in fp16.
    """
    with torch.autocast("cuda", dtype=torch.float16):
        logits = normalize(q, dim=1) @ normalize(keys, dim=1).T / temperature
        return cross_entropy(logits, torch.arange(len(q), device=q.device)) * (2 * temperature)


def emulated_autocast(q: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """`autocast_loss` forward and backward with fp16 in the places of autocast,
    and a loss scale of 2^16.
    """
    norm = q.norm(dim=1, keepdim=True)
    u, v = q / norm, normalize(keys, dim=1)
    u16, v16 = _rounded(u, torch.float16), _rounded(v, torch.float16)
    logits = _rounded(_rounded(u16 @ v16.T, torch.float16) / temperature, torch.float16)
    own = torch.arange(len(q))
    loss = cross_entropy(logits, own) * (2 * temperature)
    p = logits.softmax(1)
    p[own, own] -= 1
    dlogits = _rounded(p * (2 * temperature / len(q) * LOSS_SCALE), torch.float16)
    dlogits = _rounded(dlogits / temperature, torch.float16)
    du = _rounded(dlogits @ v16, torch.float16) / LOSS_SCALE
    return loss, (du - (du * u).sum(1, keepdim=True) * u) / norm


def emulated_kernel(
    q: Tensor, keys: Tensor, temperature: float, precision: str
) -> tuple[Tensor, Tensor]:
    """The computation of `triton_kernels.py`: rounded operands, float32 sums,
    the positive in float32.
    """

    def rounded(x: Tensor) -> Tensor:
        return _tf32(x) if precision == "tf32" else _rounded(x, getattr(torch, _DTYPES[precision]))

    norm = q.norm(dim=1, keepdim=True)
    u, v = q / norm, normalize(keys, dim=1)
    scale_log2 = math.log2(math.e) / temperature
    reference = max(scale_log2 - exponent_ceiling(precision), 0.0)
    terms = torch.exp2((rounded(u) @ rounded(v).T) * scale_log2 - reference)
    terms.fill_diagonal_(0.0)
    total = terms.sum(1)
    mean = (rounded(terms) @ rounded(v)) / total[:, None]
    odds = total.log2() + reference - (u * v).sum(1) * scale_log2
    share = 1 / (1 + torch.exp2(-odds))
    loss = torch.log1p(torch.exp2(odds)).mean() * (2 * temperature)
    du = (mean - v) * share[:, None] * (2 / len(q))
    return loss, (du - (du * u).sum(1, keepdim=True) * u) / norm


_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).float()


def _tf32(x: Tensor) -> Tensor:
    """The nearest float32 with ten bits of mantissa."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


if __name__ == "__main__":
    raise SystemExit(main())
