"""Soft cross-entropy over a wide head, forward and backward: as the official code of DINO writes
it, with one log-softmax for all pairs, and the op.

From rows and the weight of the head (`form=rows`), or from logits. Every contender is first compared
with float64: the loss and all gradients.
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
from fastmoco_kernels import soft_cross_entropy, soft_cross_entropy_of_rows

NAME = "soft_cross_entropy"
DEFAULTS = {
    "form": "rows",
    "views": 10,
    "images": 0,
    "outputs": 65536,
    "dim": 256,
    "dtype": "fp32",
    "compile": 1,
    "rounds": 7,
}
"""`form`: rows or logits; `views` of `images` images, two with a teacher; `outputs` of the head, whose
rows have `dim` numbers; `dtype` of rows, weight and logits: bf16, fp16 or fp32; `compile=0` omits
torch.compile."""
SHAPES = {"cpu": {"images": 32}, "cuda": {"images": 64, "dtype": "bf16"}}
QUICK = {"views": 4, "images": 4, "outputs": 4096, "dim": 64, "compile": 0, "rounds": 3}
FORMS = ("rows", "logits")
TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.04
_LIMITS = {"bf16": 4e-2, "fp16": 5e-3, "fp32": 1e-4}
"""Logits of narrow types are off by half a unit in the last place, and are divided by 0.1."""


def tasks(options: dict[str, Any], device: torch.device) -> Task:
    """The loss and all gradients.

    Raises:
        ValueError: for an unknown dtype or form.
    """
    if options["dtype"] not in DTYPES:
        raise ValueError(f"dtype={options['dtype']!r} is none of {', '.join(DTYPES)}")
    if options["form"] not in FORMS:
        raise ValueError(f"form={options['form']!r} is none of {', '.join(FORMS)}")
    dtype, form = DTYPES[options["dtype"]], options["form"]
    V, B, K, D = (options[name] for name in ("views", "images", "outputs", "dim"))

    def inputs(seed: int) -> list[Tensor]:
        """Rows and weight, or logits; then the teacher's logits and the centre."""
        generator = torch.Generator(device).manual_seed(seed)

        def unit(*shape: int) -> Tensor:
            return F.normalize(torch.randn(shape, device=device, generator=generator), dim=-1)

        teacher, centre = unit(2, B, K) * K**0.5 / D**0.5, 0.01 * unit(1, K)
        rows, weight = unit(V, B, D).to(dtype), unit(K, D).to(dtype)
        student = [rows, weight] if form == "rows" else [rows @ weight.T]
        return [*student, teacher, centre]

    def ours(*given: Tensor) -> Tensor:
        call: Callable[..., Tensor] = (
            soft_cross_entropy_of_rows if form == "rows" else soft_cross_entropy
        )
        return call(
            *given[:-1],
            centre=given[-1],
            temperature=TEMPERATURE,
            target_temperature=TEACHER_TEMPERATURE,
        )

    compiled = torch.compile(_once, fullgraph=True, dynamic=False)
    size = dtype.itemsize
    work = (
        Work(flops=6 * V * B * K * D, dtype=options["dtype"])
        if form == "rows"
        else Work(bytes=(3 * V * size + 2 * 2 * 4) * B * K)
    )
    return Task(
        inputs=inputs,
        truth=lambda given: _open(_once, [t.double() for t in given])(),
        contenders=[
            Contender(name=NAME, open=partial(_open, ours)),
            Contender(name="official", open=partial(_open, _official)),
            Contender(name="once", open=partial(_open, _once)),
            Contender(
                name="compiled", open=partial(_open, compiled), skipped=no_compiler(options, device)
            ),
        ],
        subject=NAME,
        limits=dict.fromkeys(_names(inputs_of=form), _LIMITS[options["dtype"]]),
        work=work,
        about={"form": form, "views": V, "images": B, "outputs": K, "dim": D},
    )


def _names(inputs_of: str) -> tuple[str, ...]:
    return ("loss", "drows", "dweight") if inputs_of == "rows" else ("loss", "dlogits")


def _student(given: tuple[Tensor, ...]) -> Tensor:
    """[V, B, K] logits in float32 or wider, over the temperature."""
    logits = given[0] @ given[1].T if len(given) == 4 else given[0]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)) / TEMPERATURE


def _official(*given: Tensor) -> Tensor:
    """A log-softmax for every pair, as in the code of DINO."""
    student, (teacher, centre) = _student(given), given[-2:]
    targets = F.softmax((teacher - centre) / TEACHER_TEMPERATURE, dim=-1)
    terms = [
        torch.sum(-targets[q] * F.log_softmax(student[v], dim=-1), dim=-1).mean()
        for q in range(len(targets))
        for v in range(len(student))
        if v != q
    ]
    return torch.stack(terms).mean()


def _once(*given: Tensor) -> Tensor:
    """One log-softmax for all pairs, and one product with the sum of the targets of a view."""
    student, (teacher, centre) = _student(given), given[-2:]
    targets = F.softmax((teacher - centre) / TEACHER_TEMPERATURE, dim=-1)
    shares = F.log_softmax(student, dim=-1)
    swapped = (shares[:2] * targets.flip(0)).sum()
    others = (shares[2:] * targets.sum(0)).sum()
    return -(swapped + others) / (2 * (len(shares) - 1) * shares.shape[1])


def _open(loss: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], Results]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:-2]]

    def call() -> Results:
        value = loss(*leaves, *inputs[-2:])
        gradients = torch.autograd.grad(value, leaves)
        names = _names("rows" if len(leaves) == 2 else "logits")
        return dict(zip(names, (value, *gradients), strict=True))

    return call
