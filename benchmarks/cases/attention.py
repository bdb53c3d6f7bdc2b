"""Attention forward and backward: torch's kernels, the explicit form (compiled too), xformers, FA4
and the Triton kernel.

Every contender is first compared with float64: output and all three gradients, in the dtype of the
timing. q, k and v are views of one packed projection, as in a vision transformer.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.contest import Contender, contest, relative_error
from fastmoco_kernels import attention
from fastmoco_kernels.attention.choice import choose_attention
from fastmoco_kernels.attention.cost import attention_bytes, attention_flops, explicit_weights_bytes

NAME = "attention"
DEFAULTS = {
    "device": "auto",
    "B": 0,
    "A": 0,
    "L": 0,
    "M": 0,
    "d": 32,
    "dtype": "bf16",
    "subject": "auto",
    "fa4": 0,
    "compile": 1,
    "rounds": 7,
    "seed": 0,
}
QUICK = {"B": 2, "rounds": 5, "compile": 0}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_SHAPES = {"cpu": (8, 4, 197, 197), "cuda": (1024, 12, 197, 197)}
_LIMITS = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}
"""Several times the rounding error of inputs, weights and results in each dtype."""
_NAMES = ("sdpa", "flash", "cudnn", "efficient", "fa4", "xformers", "explicit", "triton")
_CHECKED_IMAGES = 8
"""Images that are compared in float64: the [B, A, L, M] weights of a thousand would not fit."""
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Measure.

    Args:
        options: `device`; `B` images, `A` heads, `L` queries, `M` keys (0: 8 x 4 x 197 x 197 on a
            CPU, 1024 x 12 x 197 x 197 on CUDA; `L=1` is the class token alone); `d` of a head;
            `dtype` bf16, fp16 or fp32; `subject`, whose speed-ups are reported (`auto`: the Triton
            kernel on CUDA, the choice of `attention` on a CPU); `fa4=1` includes flash-attention 4,
            which replaces torch's flash kernel in the whole process, so `sdpa` and `flash` are then
            skipped; `compile=0` omits the compiled explicit form; `rounds`; `seed`.

    Returns:
        The result of `contest`, with the shape, FLOPs and the fewest bytes of forward and backward.

    Raises:
        ValueError: for an unknown dtype or subject.
    """
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(automatic if options["device"] == "auto" else options["device"])
    if options["dtype"] not in _DTYPES:
        raise ValueError(f"dtype={options['dtype']!r} is none of {', '.join(_DTYPES)}")
    dtype, d = _DTYPES[options["dtype"]], int(options["d"])
    B, A, L, M = (
        int(options[n]) or size for n, size in zip("BALM", _SHAPES[device.type], strict=True)
    )
    chosen = choose_attention(device, dtype, L, M, d)
    subject = options["subject"]
    if subject == "auto":
        subject = "triton" if device.type == "cuda" else chosen.backend
    q, k, v, grad = _inputs((B, A, L, M, d), dtype, device, options["seed"])
    contenders = _contenders(
        (q, k, v, grad), fa4=bool(options["fa4"]), compiled=bool(options["compile"])
    )
    if subject not in {contender.name for contender in contenders}:
        raise ValueError(f"subject={subject!r} is none of {', '.join(c.name for c in contenders)}")
    result = contest(contenders, subject=subject, device=device, rounds=options["rounds"])
    sizes = (B, A, L, M, d)
    both = attention_flops(*sizes) + attention_flops(*sizes, backward=True)
    return result | {
        "work": {"flops": both, "ms": result.get("milliseconds", {}).get(subject)},
        "auto": str(chosen),
        "shape": dict(zip(("B", "A", "L", "M", "d"), sizes, strict=True)),
        "flops": {
            "forward": attention_flops(*sizes),
            "backward": attention_flops(*sizes, backward=True),
        },
        "bytes": {
            "forward": attention_bytes(*sizes, dtype.itemsize),
            "backward": attention_bytes(*sizes, dtype.itemsize, backward=True),
            "explicit_weights": explicit_weights_bytes(B, A, L, M, dtype.itemsize),
        },
    }


def _inputs(
    sizes: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v as views [B, A, rows, d] of packed projections, and the gradient of the output."""
    B, A, L, M, d = sizes
    generator = torch.Generator(device).manual_seed(seed)
    packed = torch.randn(B, max(L, M), 3, A, d, device=device, generator=generator).to(dtype)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind()
    grad = torch.randn(B, L, A, d, device=device, generator=generator).to(dtype).transpose(1, 2)
    q, k, v = q[:, :, :L], k[:, :, :M], v[:, :, :M]
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad


def _contenders(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor], *, fa4: bool, compiled: bool
) -> list[Contender]:
    q, k, _, _ = inputs
    few = tuple(t.detach()[:_CHECKED_IMAGES] for t in inputs)
    truth = _results(
        lambda a, b, c: attention(a, b, c, backend="reference"), tuple(t.double() for t in few)
    )
    found = []
    for name in (*_NAMES, "explicit_compiled"):
        backend = name.removesuffix("_compiled")
        reason = (
            "fa4=1 gives flash-attention 4 torch's place for flash"
            if fa4 and name in ("sdpa", "flash")
            else ""
        )
        reason = reason or ("asked for by fa4=1 alone" if name == "fa4" and not fa4 else "")
        try:
            choose_attention(q.device, q.dtype, q.shape[2], k.shape[2], q.shape[3], backend=backend)
        except ValueError as error:
            reason = str(error)
        if name == "triton" and q.device.type != "cuda":
            reason = reason or "the interpreter is for tests, not for speed"
        if name == "explicit_compiled":
            no_compiler = q.device.type == "cpu" and shutil.which("g++") is None
            reason = "compile=0" if not compiled else "no C++ compiler" if no_compiler else ""
        found.append(
            Contender(name=name, skipped=reason) if reason else _contender(name, inputs, few, truth)
        )
    return found


def _contender(
    name: str, inputs: tuple[Tensor, ...], few: tuple[Tensor, ...], truth: dict[str, Tensor]
) -> Contender:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, backend=name.removesuffix("_compiled"))

    used: Attend = (
        torch.compile(attend, fullgraph=True, dynamic=False)
        if name.endswith("_compiled")
        else attend
    )
    *qkv, grad = inputs

    def call() -> object:
        return torch.autograd.grad(used(*qkv), qkv, grad)

    def errors() -> dict[str, float]:
        return {
            what: relative_error(value, truth[what]) for what, value in _results(used, few).items()
        }

    return Contender(
        name=name, call=call, errors=errors, limits=dict.fromkeys(truth, _LIMITS[inputs[0].dtype])
    )


def _results(attend: Attend, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Output and gradients, by name."""
    *leaves, grad = (t.detach().requires_grad_() for t in inputs)
    out = attend(*leaves)
    return dict(
        zip(
            ("out", "dq", "dk", "dv"),
            (out, *torch.autograd.grad(out, leaves, grad.detach())),
            strict=True,
        )
    )
