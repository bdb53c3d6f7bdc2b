"""Residual add, layer norm and cast, forward and backward: torch's three operations, the same
compiled, and the kernels.

As in a block under autocast: x is the float32 stream, branch and y have 16 bits, and the sum and y
have gradients. Every contender is first compared with float64: both results and all four gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.chips import DTYPES
from benchmarks.contest import Contender, Results, Task, Work, no_compiler
from fastmoco_kernels import residual_norm
from fastmoco_kernels.residual_norm import cost

NAME = "residual_norm"
DEFAULTS = {"rows": 0, "E": 384, "dtype": "bf16", "compile": 1, "rounds": 15}
"""`rows` of width `E`; `dtype` of branch and y: bf16, fp16 or fp32; `compile=0` omits
torch.compile."""
SHAPES = {"cpu": {"rows": 8 * 197}, "cuda": {"rows": 256 * 197}}
QUICK = {"rows": 394, "compile": 0, "rounds": 5}
EPS = 1e-6
_LIMITS = {"bf16": 4e-3, "fp16": 5e-4, "fp32": 1e-5}
"""Twice the rounding error of one result in each dtype, and for float32 that of some sums."""
Norm = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
RESULTS = ("x_new", "y", "dx", "dbranch", "dweight", "dbias")


def tasks(options: dict[str, Any], device: torch.device) -> Task:
    """Both results and all four gradients.

    Raises:
        ValueError: for an unknown dtype.
    """
    if options["dtype"] not in DTYPES:
        raise ValueError(f"dtype={options['dtype']!r} is none of {', '.join(DTYPES)}")
    dtype, rows, E = DTYPES[options["dtype"]], options["rows"], options["E"]

    def inputs(seed: int) -> list[Tensor]:
        """x, branch, weight, bias, and the gradients of x_new and y."""
        generator = torch.Generator(device).manual_seed(seed)
        shapes = ((rows, E), (rows, E), (E,), (E,), (rows, E), (rows, E))
        x, branch, weight, bias, dx_new, dy = (
            torch.randn(shape, device=device, generator=generator) for shape in shapes
        )
        return [x, branch.to(dtype), weight, bias, dx_new, dy.to(dtype)]

    def ours(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return residual_norm(x, branch, weight, bias, EPS, dtype)

    plain = _operations(dtype)
    compiled = torch.compile(plain, fullgraph=True, dynamic=False)
    size = dtype.itemsize
    moved = {
        "forward": cost.residual_norm_bytes(rows, E, branch=size, out=size),
        "backward": cost.residual_norm_backward_bytes(rows, E, branch=size, out=size),
    }
    eager = {f"eager_{way}": cost.eager_bytes(rows, E, backward=way == "backward") for way in moved}
    return Task(
        inputs=inputs,
        truth=lambda given: _open(_operations(torch.float64), [t.double() for t in given])(),
        contenders=[
            Contender(name=NAME, open=partial(_open, ours)),
            Contender(name="eager", open=partial(_open, plain)),
            Contender(
                name="compiled", open=partial(_open, compiled), skipped=no_compiler(options, device)
            ),
        ],
        subject=NAME,
        limits=dict.fromkeys(RESULTS, _LIMITS[options["dtype"]]),
        work=Work(bytes=sum(moved.values())),
        about={"rows": rows, "E": E, "bytes": moved | (eager if size == 2 else {})},
    )


def _operations(out: torch.dtype) -> Norm:
    """Add, `layer_norm` and cast, as autocast does them."""

    def norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        x_new = x + branch
        return x_new, F.layer_norm(x_new, weight.shape, weight, bias, EPS).to(out)

    return norm


def _open(norm: Norm, inputs: list[Tensor]) -> Callable[[], Results]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:4]]

    def call() -> Results:
        results = norm(*leaves)
        gradients = torch.autograd.grad(results, leaves, inputs[4:])
        return dict(zip(RESULTS, (*results, *gradients), strict=True))

    return call
