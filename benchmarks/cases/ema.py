"""The momentum encoder's moving average: one call against multi-tensor ops and
the per-tensor formula.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.contest import Contender, Results, Task, Work
from fastmoco_kernels.ema.op import bytes_moved, ema_update_

NAME = "ema"
DEFAULTS = {"width": 0, "depth": 12, "hidden": 0, "momentum": 0.99, "rounds": 15}
"""`width` and `depth` of the encoder, `hidden` of its projector, `momentum` of the average."""
SHAPES = {"cpu": {"width": 128, "hidden": 512}, "cuda": {"width": 384, "hidden": 4096}}
"""A ViT-S with its head on CUDA, a third of its width and an eighth of its head elsewhere."""
QUICK = {"width": 64, "depth": 4, "hidden": 256, "rounds": 5}
LIMIT = 1e-6
"""Relative error: float32 rounds to 6e-8, the formula with two products a few times."""
Pair = tuple[Sequence[Tensor], Sequence[Tensor]]
"""Averages and their sources."""


def tasks(options: dict[str, Any], device: torch.device) -> Task:
    """One update of all averages."""
    shapes, momentum = vit_shapes(options), options["momentum"]

    def ours(own: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        ema_update_(own, sources, momentum)

    def foreach_lerp(own: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        torch._foreach_lerp_(list(own), list(sources), 1 - momentum)

    def mul_then_add(own: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        torch._foreach_mul_(list(own), momentum)
        torch._foreach_add_(list(own), list(sources), alpha=1 - momentum)

    def formula(own: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        for average, source in zip(own, sources, strict=True):
            average.data = average.data * momentum + source.data * (1 - momentum)

    def contender(name: str, update: Callable[..., None]) -> Contender:
        def open_(pair: Pair) -> Callable[[], Results]:
            own = [average.clone() for average in pair[0]]

            def call() -> Results:
                update(own, pair[1])
                return {"average": own}

            return call

        return Contender(name=name, open=open_)

    def truth(pair: Pair) -> Results:
        exact = zip(*pair, strict=True)
        return {"average": [momentum * a.double() + (1 - momentum) * s.double() for a, s in exact]}

    elements = sum(torch.Size(shape).numel() for shape in shapes)
    return Task(
        inputs=lambda seed: tuple(random_tensors(shapes, 2 * seed + i, device) for i in (1, 2)),
        truth=truth,
        contenders=[
            contender("fastmoco", ours),
            contender("foreach_lerp", foreach_lerp),
            contender("foreach_mul_add", mul_then_add),
            contender("formula", formula),
        ],
        subject="fastmoco",
        limits={"average": LIMIT},
        work=Work(bytes=bytes_moved(elements)),
        about={"tensors": len(shapes), "parameters": elements},
    )


def vit_shapes(options: dict[str, Any]) -> list[tuple[int, ...]]:
    """Shapes of the trainable tensors of a vision transformer with a
    three-layer projector, mostly short vectors.
    """
    width, hidden = options["width"], options["hidden"]
    attention = [(3 * width, width), (3 * width,), (width, width), (width,)]
    mlp = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    norm = [(width,), (width,)]
    block = [*norm, *attention, *norm, *mlp]
    head = [(hidden, width), *[(hidden,)] * 2, (hidden, hidden), *[(hidden,)] * 2, (256, hidden)]
    return [(1, 1, width), *(block * options["depth"]), *norm, *head]


def random_tensors(
    shapes: Sequence[tuple[int, ...]], seed: int, device: torch.device
) -> list[Tensor]:
    """Standard normal float32 tensors."""
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(shape, generator=generator, device=device) for shape in shapes]
