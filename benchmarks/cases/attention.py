"""Attention forward and backward: torch's kernels, the explicit form (compiled too), xformers, FA4
and the Triton kernel.

Every contender is first compared with float64: output and all three gradients, in the dtype of the
timing. q, k and v are views of one packed projection, as in a vision transformer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.chips import DTYPES
from benchmarks.contest import Contender, Results, Task, Work, no_compiler
from fastmoco_kernels import attention
from fastmoco_kernels.attention.choice import choose_attention
from fastmoco_kernels.attention.cost import attention_bytes, attention_flops, explicit_weights_bytes

NAME = "attention"
DEFAULTS = {
    **dict.fromkeys("BALM", 0),
    "d": 32,
    "dtype": "bf16",
    "subject": "auto",
    "fa4": 0,
    "compile": 1,
}
"""`B` images, `A` heads, `L` queries (1: the class token alone), `M` keys, `d` of a head; `dtype`
bf16, fp16 or fp32; `subject`, whose speed-ups are reported (`auto`: the Triton kernel on CUDA, the
choice of `attention` on a CPU); `fa4=1` includes flash-attention 4, which replaces torch's flash
kernel in the whole process, so `sdpa` and `flash` are then skipped; `compile=0` omits the compiled
explicit form."""
SHAPES = {
    "cpu": {"B": 8, "A": 4, "L": 197, "M": 197},
    "cuda": {"B": 1024, "A": 12, "L": 197, "M": 197},
}
QUICK = {"B": 2, "rounds": 5, "compile": 0}
_LIMITS = {"bf16": 2e-2, "fp16": 3e-3, "fp32": 1e-5}
"""Several times the rounding error of inputs, weights and results in each dtype."""
_NAMES = ("sdpa", "flash", "cudnn", "efficient", "fa4", "xformers", "explicit", "triton")
_CHECKED_IMAGES = 8
"""Images that are compared in float64: the [B, A, L, M] weights of a thousand would not fit."""
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""q, k, v as views [B, A, rows, d] of packed projections, and the gradient of the output."""


def tasks(options: dict[str, Any], device: torch.device) -> Task:
    """Output and the gradients of q, k and v.

    Raises:
        ValueError: for an unknown dtype or subject.
    """
    if options["dtype"] not in DTYPES:
        raise ValueError(f"dtype={options['dtype']!r} is none of {', '.join(DTYPES)}")
    dtype = DTYPES[options["dtype"]]
    B, A, L, M, d = tuple(options[name] for name in "BALMd")
    chosen = choose_attention(device, dtype, L, M, d)
    subject = options["subject"]
    if subject == "auto":
        subject = "triton" if device.type == "cuda" else chosen.backend
    if subject not in (*_NAMES, "explicit_compiled"):
        raise ValueError(f"subject={subject!r} is none of {', '.join(_NAMES)}, explicit_compiled")

    def inputs(seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        packed = torch.randn(B, max(L, M), 3, A, d, device=device, generator=generator).to(dtype)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind()
        grad = torch.randn(B, L, A, d, device=device, generator=generator).to(dtype)
        return q[:, :, :L], k[:, :, :M], v[:, :, :M], grad.transpose(1, 2)

    def truth(given: Inputs) -> Results:
        few = tuple(tensor[:_CHECKED_IMAGES].double() for tensor in given)
        return _open(partial(attention, backend="reference"), few)()

    size = dtype.itemsize
    shape = {"B": B, "A": A, "L": L, "M": M, "d": d}
    both = attention_flops(**shape), attention_flops(**shape, backward=True)
    forward = attention_bytes(**shape, itemsize=size)
    moved = forward, attention_bytes(**shape, itemsize=size, backward=True)
    return Task(
        inputs=inputs,
        truth=truth,
        contenders=[_contender(n, options, device) for n in (*_NAMES, "explicit_compiled")],
        subject=subject,
        limits=dict.fromkeys(("out", "dq", "dk", "dv"), _LIMITS[options["dtype"]]),
        work=Work(flops=sum(both), bytes=sum(moved), dtype=options["dtype"]),
        about={
            "auto": str(chosen),
            "shape": shape,
            "flops": {"forward": both[0], "backward": both[1]},
            "bytes": {
                "forward": moved[0],
                "backward": moved[1],
                "explicit_weights": explicit_weights_bytes(B, A, L, M, size),
            },
        },
    )


def _contender(name: str, options: dict[str, Any], device: torch.device) -> Contender:
    attend: Attend = partial(attention, backend=name.removesuffix("_compiled"))
    reason = ""
    if name == "explicit_compiled":
        reason = no_compiler(options, device)
        attend = torch.compile(attend, fullgraph=True, dynamic=False)
    elif options["fa4"] and name in ("sdpa", "flash"):
        reason = "fa4=1 gives flash-attention 4 torch's place for flash"
    elif name == "fa4" and not options["fa4"]:
        reason = "asked for by fa4=1 alone"
    elif name == "triton" and device.type != "cuda":
        reason = "the interpreter is for tests, not for speed"
    else:
        try:
            L, M, d = (options[key] for key in "LMd")
            choose_attention(device, DTYPES[options["dtype"]], L, M, d, backend=name)
        except ValueError as error:
            reason = str(error)
    return Contender(name=name, open=partial(_open, attend), skipped=reason)


def _open(attend: Attend, inputs: tuple[Tensor, ...]) -> Callable[[], Results]:
    leaves, grad = [tensor.detach().requires_grad_() for tensor in inputs[:3]], inputs[3]

    def call() -> Results:
        out = attend(*leaves)
        found = (out.detach(), *torch.autograd.grad(out, leaves, grad))
        return dict(zip(("out", "dq", "dk", "dv"), found, strict=True))

    return call
