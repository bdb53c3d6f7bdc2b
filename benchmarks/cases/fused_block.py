"""A transformer block, forward and backward, under autocast: as modules, the same compiled, and
fused with its own backward.

Inputs and outputs are stream and branch, as between the blocks of an encoder. Every contender is
first compared with float64: both results, both gradients of the inputs, and those of all weights
together.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contest import Contender, Results, Task, no_compiler
from fastmoco.models.blocks import Block

NAME = "fused_block"
DEFAULTS = {"images": 0, "tokens": 197, "E": 384, "heads": 12, "compile": 1, "rounds": 9}
"""`images` of `tokens`, width `E`, `heads`; `compile=0` omits torch.compile."""
SHAPES = {"cpu": {"images": 2}, "cuda": {"images": 128}}
QUICK = {"images": 1, "tokens": 50, "E": 192, "heads": 6, "compile": 0, "rounds": 5}
RESULTS = ("stream", "branch", "dstream", "dbranch", "weights")
_LIMIT = 2e-2
"""A few roundings to bf16 one after the other."""
Call = Callable[[Tensor, Tensor], Any]


def tasks(options: dict[str, Any], device: torch.device) -> Task:
    """Both results and all gradients."""
    shape = tuple(options[name] for name in ("images", "tokens", "E"))
    block = Block(shape[2], options["heads"], 4 * shape[2], "sdpa")
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=shape[2] ** -0.5)
    block = block.to(device)
    modules, fused, exact = (_copy(block, fused=fused) for fused in (False, True, False))
    exact.double()

    def inputs(seed: int) -> list[Tensor]:
        """Rounded, so that float64 has the same inputs."""
        generator = torch.Generator().manual_seed(seed)
        drawn = (torch.randn(shape, generator=generator) for _ in range(4))
        return [tensor.to(device, torch.bfloat16) for tensor in drawn]

    compiled: Call = torch.compile(modules, dynamic=False)
    return Task(
        inputs=inputs,
        truth=lambda given: _open(exact, exact, [t.double() for t in given], autocast=False)(),
        contenders=[
            Contender(name=NAME, open=partial(_open, fused, fused)),
            Contender(name="modules", open=partial(_open, modules, modules)),
            Contender(
                name="compiled",
                open=partial(_open, modules, compiled),
                skipped=no_compiler(options, device),
            ),
        ],
        subject=NAME,
        limits=dict.fromkeys(RESULTS, _LIMIT),
        about=dict(zip(("images", "tokens", "E"), shape, strict=True)),
    )


def _copy(block: Block, *, fused: bool) -> Block:
    copied = Block(
        block.norm1.weight.shape[0], block.attn.num_heads, block.mlp.fc1.weight.shape[0], "sdpa"
    )
    copied.load_state_dict(block.state_dict())
    copied.fused = fused
    return copied.to(block.norm1.weight.device)


def _open(
    block: Block, call: Call, tensors: list[Tensor], *, autocast: bool = True
) -> Callable[[], Results]:
    x, branch, dx, dbranch = tensors
    inputs = [x.to(block.norm1.weight.dtype).requires_grad_(), branch.detach().requires_grad_()]

    def once() -> Results:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            results = list(call(*inputs))
        outer = [dx.to(results[0].dtype), dbranch.to(results[1].dtype)]
        found = torch.autograd.grad(results, [*inputs, *block.parameters()], outer)
        return dict(zip(RESULTS, (*results, *found[:2], found[2:]), strict=True))

    return once
