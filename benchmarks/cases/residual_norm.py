"""Residual add, layer norm and cast, forward and backward: torch's three operations, the same
compiled, and the kernels.

As in a block under autocast: x is the float32 stream, branch and y have 16 bits, and the sum and y
have gradients. Every contender is first compared with float64: both results and all four gradients.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contest import Contender, contest, relative_error
from fastmoco_kernels import residual_norm
from fastmoco_kernels.residual_norm import cost

NAME = "residual_norm"
DEFAULTS = {
    "device": "auto",
    "rows": 0,
    "E": 384,
    "dtype": "bf16",
    "compile": 1,
    "rounds": 15,
    "seed": 0,
}
QUICK = {"rows": 394, "compile": 0, "rounds": 5}
EPS = 1e-6
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_ROWS = {"cpu": 8 * 197, "cuda": 256 * 197}
_LIMITS = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-5}
"""Twice the rounding error of one result in each dtype, and for float32 that of some sums."""
Norm = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Measure.

    Args:
        options: `device`; `rows` (0: 8 images of 197 tokens on a CPU, 256 on CUDA); width `E`;
            `dtype` of branch and y: bf16, fp16 or fp32; `compile=0` omits torch.compile; `rounds`;
            `seed`.

    Returns:
        The result of `contest`, with the fewest bytes of forward and backward, those of torch's
        operations, and on CUDA our GB/s.

    Raises:
        ValueError: for an unknown dtype.
    """
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(automatic if options["device"] == "auto" else options["device"])
    if options["dtype"] not in _DTYPES:
        raise ValueError(f"dtype={options['dtype']!r} is none of {', '.join(_DTYPES)}")
    dtype, E = _DTYPES[options["dtype"]], int(options["E"])
    rows = int(options["rows"]) or _ROWS[device.type]
    inputs = _inputs(rows, E, dtype, device, options["seed"])
    found = contest(
        _contenders(inputs, options), subject=NAME, device=device, rounds=options["rounds"]
    )
    size = dtype.itemsize
    forward = cost.residual_norm_bytes(rows, E, branch=size, out=size)
    backward = cost.residual_norm_backward_bytes(rows, E, branch=size, out=size)
    result = found | {"rows": rows, "E": E, "bytes": {"forward": forward, "backward": backward}}
    if size == 2:
        result["bytes"] |= {
            f"eager_{way}": cost.eager_bytes(rows, E, backward=way == "backward") for way in _WAYS
        }
    if NAME in found.get("milliseconds", {}):
        result["gb_per_s"] = round((forward + backward) / found["milliseconds"][NAME] / 1e6, 1)
    return result


_WAYS = ("forward", "backward")


def _inputs(rows: int, E: int, dtype: torch.dtype, device: torch.device, seed: int) -> list[Tensor]:
    """x, branch, weight, bias, and the gradients of x_new and y."""
    generator = torch.Generator(device).manual_seed(seed)
    shapes = ((rows, E), (rows, E), (E,), (E,), (rows, E), (rows, E))
    x, branch, weight, bias, dx_new, dy = (
        torch.randn(shape, device=device, generator=generator) for shape in shapes
    )
    return [x, branch.to(dtype), weight, bias, dx_new, dy.to(dtype)]


def _contenders(inputs: list[Tensor], options: dict[str, Any]) -> list[Contender]:
    truth = _results(_operations(torch.float64), [t.double() for t in inputs])
    plain = _operations(inputs[1].dtype)
    no_compiler = (
        "no C++ compiler" if inputs[0].device.type == "cpu" and shutil.which("g++") is None else ""
    )
    reason = "left out by compile=0" if not options["compile"] else no_compiler
    compiled: Norm = plain if reason else torch.compile(plain, fullgraph=True, dynamic=False)

    def ours(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return residual_norm(x, branch, weight, bias, EPS, inputs[1].dtype)

    return [
        _contender(NAME, ours, inputs, truth),
        _contender("eager", plain, inputs, truth),
        Contender(name="compiled", skipped=reason)
        if reason
        else _contender("compiled", compiled, inputs, truth),
    ]


def _operations(out: torch.dtype) -> Norm:
    """Add, `layer_norm` and cast, as autocast does them."""

    def norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        x_new = x + branch
        return x_new, F.layer_norm(x_new, weight.shape, weight, bias, EPS).to(out)

    return norm


def _contender(name: str, norm: Norm, inputs: list[Tensor], truth: dict[str, Tensor]) -> Contender:
    leaves = [t.detach().requires_grad_() for t in inputs[:4]]

    def call() -> object:
        return torch.autograd.grad(norm(*leaves), leaves, inputs[4:])

    def errors() -> dict[str, float]:
        return {
            what: relative_error(value, truth[what])
            for what, value in _results(norm, inputs).items()
        }

    return Contender(
        name=name, call=call, errors=errors, limits=dict.fromkeys(truth, _LIMITS[inputs[1].dtype])
    )


def _results(norm: Norm, inputs: list[Tensor]) -> dict[str, Tensor]:
    """x_new, y and the gradients, by name."""
    leaves = [t.detach().requires_grad_() for t in inputs[:4]]
    results = norm(*leaves)
    gradients = torch.autograd.grad(results, leaves, inputs[4:])
    return dict(
        zip(
            ("x_new", "y", "dx", "dbranch", "dweight", "dbias"), (*results, *gradients), strict=True
        )
    )
