"""The momentum encoder's moving average: one call against multi-tensor ops and
the per-tensor formula.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.contest import Contender, contest, relative_error
from fastmoco_kernels.ema.op import bytes_moved, ema_update_

NAME = "ema"
DEFAULTS = {"device": "auto", "width": 0, "depth": 12, "hidden": 0, "momentum": 0.99, "rounds": 15}
QUICK = {"width": 64, "depth": 4, "hidden": 256, "rounds": 5}

LIMIT = 1e-6
"""Relative error: float32 rounds to 6e-8, the formula with two products a few times."""


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Measure.

    Args:
        options: `device`; `width` and `depth` of the encoder and `hidden` of its projector (0: a
            ViT-S with its head of 4096 on CUDA, a third of its width and an eighth of its head
            elsewhere); `momentum`; `rounds`.

    Returns:
        The result of `contest`, the numbers of tensors and parameters, and on CUDA our GB/s.
    """
    device = chosen_device(options["device"])
    shapes = vit_shapes(*sizes(options, device))
    momentum = options["momentum"]
    averages, sources = random_tensors(shapes, 1, device), random_tensors(shapes, 2, device)
    truth = [
        momentum * a.double() + (1 - momentum) * s.double()
        for a, s in zip(averages, sources, strict=True)
    ]

    def ours(own: Sequence[Tensor]) -> None:
        ema_update_(own, sources, momentum)

    def foreach_lerp(own: Sequence[Tensor]) -> None:
        torch._foreach_lerp_(list(own), sources, 1 - momentum)

    def mul_then_add(own: Sequence[Tensor]) -> None:
        torch._foreach_mul_(list(own), momentum)
        torch._foreach_add_(list(own), sources, alpha=1 - momentum)

    def formula(own: Sequence[Tensor]) -> None:
        for average, source in zip(own, sources, strict=True):
            average.data = average.data * momentum + source.data * (1 - momentum)

    jobs = {
        "fastmoco": ours,
        "foreach_lerp": foreach_lerp,
        "foreach_mul_add": mul_then_add,
        "formula": formula,
    }
    contenders = [_contender(name, job, averages, truth) for name, job in jobs.items()]
    result = contest(contenders, subject="fastmoco", device=device, rounds=options["rounds"])
    elements = sum(a.numel() for a in averages)
    return {
        "tensors": len(shapes),
        "parameters": elements,
        **with_rate(result, bytes_moved(elements)),
    }


def _contender(
    name: str,
    job: Callable[[Sequence[Tensor]], None],
    averages: Sequence[Tensor],
    truth: Sequence[Tensor],
) -> Contender:
    """A contender with its own averages."""
    own = [average.clone() for average in averages]

    def errors() -> Mapping[str, float]:
        fresh = [average.clone() for average in averages]
        job(fresh)
        return {"average": relative_error(flat(fresh), flat(truth))}

    with torch.no_grad():
        return Contender(name=name, call=lambda: job(own), errors=errors, limits={"average": LIMIT})


def chosen_device(name: str) -> torch.device:
    """The device that an option names; `auto` is CUDA if there is a device."""
    return torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    )


def sizes(options: Mapping[str, Any], device: torch.device) -> tuple[int, int, int]:
    """Width, depth and hidden width, with zeros replaced by defaults for the device."""
    width, hidden = (384, 4096) if device.type == "cuda" else (128, 512)
    return options["width"] or width, options["depth"], options["hidden"] or hidden


def vit_shapes(width: int, depth: int, hidden: int) -> list[tuple[int, ...]]:
    """Shapes of the trainable tensors of a vision transformer with a
    three-layer projector, mostly short vectors.
    """
    block = [
        (width,),
        (width,),
        (3 * width, width),
        (3 * width,),
        (width, width),
        (width,),
        (width,),
        (width,),
    ]
    block += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    head = [
        (hidden, width),
        (hidden,),
        (hidden,),
        (hidden, hidden),
        (hidden,),
        (hidden,),
        (256, hidden),
    ]
    return [(1, 1, width), *(block * depth), (width,), (width,), *head]


def random_tensors(
    shapes: Sequence[tuple[int, ...]], seed: int, device: torch.device
) -> list[Tensor]:
    """Standard normal float32 tensors."""
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(shape, generator=generator, device=device) for shape in shapes]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All tensors as one vector, in float64."""
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def with_rate(result: dict[str, Any], moved: int) -> dict[str, Any]:
    """The result, and GB/s of the subject if it has milliseconds."""
    if "milliseconds" in result:
        result["gb_per_s"] = round(moved / result["milliseconds"]["fastmoco"] / 1e6, 1)
        result["work"] = {"bytes": moved, "ms": result["milliseconds"]["fastmoco"]}
    return result
