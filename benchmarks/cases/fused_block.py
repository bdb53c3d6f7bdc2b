"""A transformer block, forward and backward, under autocast: as modules, the same compiled, and
fused with its own backward.

Inputs and outputs are stream and branch, as between the blocks of an encoder. Every contender is
first compared with float64: both results, both gradients of the inputs, and those of all weights
together.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contest import Contender, contest, relative_error
from fastmoco.models.blocks import Block

NAME = "fused_block"
DEFAULTS = {
    "device": "auto",
    "images": 0,
    "tokens": 197,
    "E": 384,
    "heads": 12,
    "compile": 1,
    "rounds": 9,
    "seed": 0,
}
QUICK = {"images": 1, "tokens": 50, "E": 192, "heads": 6, "compile": 0, "rounds": 5}
_IMAGES = {"cpu": 2, "cuda": 128}
_LIMIT = 2e-2
"""A few roundings to bf16 one after the other."""
Call = Callable[[Tensor, Tensor], Any]


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Measure.

    Args:
        options: `device`; `images` (0: 2 on a CPU, 128 on CUDA) of `tokens`; width `E`; `heads`;
            `compile=0` omits torch.compile; `rounds`; `seed`.

    Returns:
        The result of `contest`, and the shape.
    """
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(automatic if options["device"] == "auto" else options["device"])
    torch.manual_seed(options["seed"])
    shape = (
        int(options["images"]) or _IMAGES[device.type],
        int(options["tokens"]),
        int(options["E"]),
    )
    block = Block(shape[2], int(options["heads"]), 4 * shape[2], "sdpa")
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=shape[2] ** -0.5)
    block = block.to(device)
    # Rounded, so that float64 has the same inputs.
    tensors = [torch.randn(shape).to(device, torch.bfloat16) for _ in range(4)]
    found = contest(
        _contenders(block, tensors, options), subject=NAME, device=device, rounds=options["rounds"]
    )
    return found | dict(zip(("images", "tokens", "E"), shape, strict=True))


def _contenders(block: Block, tensors: list[Tensor], options: dict[str, Any]) -> list[Contender]:
    device = tensors[0].device
    modules, fused = (_copy(block, fused=fused) for fused in (False, True))
    exact = _copy(block, fused=False).double()
    truth = _results(exact, exact, [t.double() for t in tensors], autocast=False)
    no_compiler = "no C++ compiler" if device.type == "cpu" and shutil.which("g++") is None else ""
    reason = "left out by compile=0" if not options["compile"] else no_compiler
    compiled: Call = modules if reason else torch.compile(modules, dynamic=False)
    return [
        _contender(NAME, fused, fused, tensors, truth),
        _contender("modules", modules, modules, tensors, truth),
        Contender(name="compiled", skipped=reason)
        if reason
        else _contender("compiled", modules, compiled, tensors, truth),
    ]


def _copy(block: Block, *, fused: bool) -> Block:
    copied = Block(
        block.norm1.weight.shape[0], block.attn.num_heads, block.mlp.fc1.weight.shape[0], "sdpa"
    )
    copied.load_state_dict(block.state_dict())
    copied.fused = fused
    return copied.to(block.norm1.weight.device)


def _contender(
    name: str, block: Block, call: Call, tensors: list[Tensor], truth: dict[str, Tensor]
) -> Contender:
    def errors() -> dict[str, float]:
        found = _results(block, call, tensors, autocast=True)
        return {what: relative_error(value, truth[what]) for what, value in found.items()}

    return Contender(
        name=name,
        call=lambda: _gradients(block, call, tensors, autocast=True),
        errors=errors,
        limits=dict.fromkeys(truth, _LIMIT),
    )


def _gradients(
    block: Block, call: Call, tensors: list[Tensor], *, autocast: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Results and all gradients."""
    x, branch, dx, dbranch = tensors
    wide = block.norm1.weight.dtype
    inputs = [x.to(wide).requires_grad_(), branch.detach().requires_grad_()]
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        results = list(call(*inputs))
    outer = [dx.to(results[0].dtype), dbranch.to(results[1].dtype)]
    return results, list(torch.autograd.grad(results, [*inputs, *block.parameters()], outer))


def _results(
    block: Block, call: Call, tensors: list[Tensor], *, autocast: bool
) -> dict[str, Tensor]:
    results, gradients = _gradients(block, call, tensors, autocast=autocast)
    weights = torch.cat([gradient.flatten().double() for gradient in gradients[2:]])
    values = (*results, *gradients[:2], weights)
    return dict(zip(("stream", "branch", "dstream", "dbranch", "weights"), values, strict=True))
