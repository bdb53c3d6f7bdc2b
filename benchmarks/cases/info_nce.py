"""The InfoNCE loss, one direction or both, forward and gradient of the queries: one pass against
other implementations.

Contenders: `naive` (normalise, matmul, / temperature, cross-entropy, autograd; fp16 autocast on
CUDA as moco-v3 runs it), `compiled` (the same through torch.compile), `sdpa_v_is_k` (attention with
values = keys and an explicit gradient: the one-pass idea without a kernel), `chunked` and `triton`
(this project's).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from benchmarks.accuracy import LOSS_SCALE, gradient_of, pairs
from benchmarks.contest import Contender, Results, Task, Work, no_compiler
from fastmoco_kernels import info_nce_loss, symmetric_info_nce_loss
from fastmoco_kernels.info_nce.cost import bytes_moved, flops
from fastmoco_kernels.info_nce.reference import info_nce_reference

NAME = "info_nce"
DEFAULTS = {
    "rows": 8192,
    "keys": 0,
    "dim": 256,
    "temperature": 0.2,
    "rounds": 5,
    "compile": 1,
    "directions": 1,
}
"""`rows` B; `keys` N (0: as many); `dim` D; `temperature`; `compile=0` omits the compiled
contender; `directions` 1, or 2 as in MoCo v3, which this project computes in one launch and the
others one after the other."""
QUICK = {"rows": 1024, "compile": 0}
CHECKED_ROWS = 1024
"""Queries whose gradient is compared with float64, because all would need
float64 logits of rows x keys."""
Inputs = list[tuple[Tensor, Tensor]]
"""Queries and keys of each direction."""
Call = Callable[[], Results]


def tasks(options: dict[str, Any], device: torch.device) -> Task:
    """The loss of all directions, and the gradients of their queries."""
    B, D, directions = options["rows"], options["dim"], options["directions"]
    N = options["keys"] or B
    if N < B:
        raise ValueError(f"keys={N} below rows={B}: every query needs its positive")
    if directions not in (1, 2):
        raise ValueError(f"directions={directions}: must be 1 or 2")

    def inputs(seed: int) -> Inputs:
        drawn = (pairs(N, D, 0.93, 0.8, device, seed=2 * seed + i) for i in range(directions))
        return [(q[:B].contiguous(), keys) for q, keys in drawn]

    cuda, temperature = device.type == "cuda", options["temperature"]
    naive, scale = partial(naive_loss, temperature=temperature), LOSS_SCALE if cuda else 1.0
    missing = no_compiler(options, device)
    contenders = [
        Contender(name="naive", open=partial(_separately, naive, scale)),
        Contender(
            name="compiled",
            open=partial(_separately, torch.compile(naive), scale),
            skipped=missing,
        ),
        Contender(name="sdpa_v_is_k", open=partial(_sdpa, temperature)),
        Contender(name="chunked", open=partial(_ours, "chunked", temperature)),
        Contender(
            name="triton",
            open=partial(_ours, "triton", temperature),
            skipped="" if cuda else "needs a CUDA device",
        ),
    ]
    moved = bytes_moved(B, N, D, directions=directions)
    work = flops(B, N, D, directions=directions)
    # bf16 and the fp16 of autocast round operands; float32 on a CPU does not.
    limits = (2e-3, 2e-2, 2e-2) if cuda else (1e-5, 1e-5, 1e-5)
    return Task(
        inputs=inputs,
        truth=partial(_truth, temperature),
        contenders=contenders,
        subject="triton" if cuda else "chunked",
        limits=dict(zip(("loss", "gradient", "gradient2"), limits, strict=True)),
        work=Work(flops=work, bytes=moved, dtype="bf16" if cuda else "fp32"),
        about={"flops": work, "bytes": {"q": 4 * B * D, "one_pass": moved}},
    )


def _named(loss: Tensor, gradients: list[Tensor]) -> Results:
    return {"loss": loss, **dict(zip(("gradient", "gradient2"), gradients, strict=False))}


def _separately(loss: Callable[..., Tensor], scale: float, inputs: Inputs) -> Call:
    """The loss of each direction, one after the other. fp16 needs a scale, or its gradients are
    flushed to zero.
    """
    leaves = [q.detach().requires_grad_() for q, _ in inputs]

    def call() -> Results:
        value = sum(loss(q, keys) * scale for q, (_, keys) in zip(leaves, inputs, strict=True))
        assert isinstance(value, Tensor)  # noqa: S101 - a type: a sum of at least one
        found = list(torch.autograd.grad(value, leaves))
        return _named(value.detach() / scale, [dq / scale for dq in found] if scale != 1 else found)

    return call


def _ours(backend: str, temperature: float, inputs: Inputs) -> Call:
    how: dict[str, Any] = {"temperature": temperature, "backend": backend}
    if len(inputs) == 1:
        return _separately(partial(info_nce_loss, **how), 1.0, inputs)
    (q1, k2), (q2, k1) = ((q.detach().requires_grad_(), keys) for q, keys in inputs)

    def call() -> Results:
        loss = symmetric_info_nce_loss(q1, k2, q2, k1, **how).loss
        return _named(loss.detach(), list(torch.autograd.grad(loss, (q1, q2))))

    return call


def _sdpa(temperature: float, inputs: Inputs) -> Call:
    def call() -> Results:
        found = [sdpa_loss_and_gradient(q, keys, temperature) for q, keys in inputs]
        return _named(torch.stack([loss for loss, _ in found]).sum(), [dq for _, dq in found])

    return call


def _truth(temperature: float, inputs: Inputs) -> Results:
    """Loss over all queries and gradients of the first ones, in float64, a block at a time."""
    total, gradients = torch.zeros((), dtype=torch.float64, device=inputs[0][0].device), []
    for q, keys in inputs:
        exact = partial(info_nce_reference, keys_ND=keys.double(), temperature=temperature)
        for start in range(0, len(q), CHECKED_ROWS):
            block = q[start : start + CHECKED_ROWS].double()
            loss, dq = gradient_of(partial(exact, positive_offset=start), block)
            total += loss * (len(block) / len(q))
            if start == 0:
                gradients.append(dq * (len(block) / len(q)))
    return _named(total, gradients)


def naive_loss(q: Tensor, keys: Tensor, *, temperature: float) -> Tensor:
    """The usual formula, under fp16 autocast on CUDA as in moco-v3."""
    with torch.autocast(q.device.type, dtype=torch.float16, enabled=q.is_cuda):
        logits = normalize(q, dim=1) @ normalize(keys, dim=1).T / temperature
        return cross_entropy(logits, torch.arange(len(q), device=q.device)) * (2 * temperature)


@torch.no_grad()
def sdpa_loss_and_gradient(q: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Loss and gradient from flash attention with values = keys, which gives the mean key of the
    softmax and the logsumexp.
    """
    norm = q.norm(dim=1, keepdim=True)
    u, v = q / norm, normalize(keys, dim=1)
    if q.is_cuda:
        rows, columns = u.bfloat16()[None, None], v.bfloat16()[None, None]
        mean, lse = torch.ops.aten._scaled_dot_product_flash_attention(
            rows, columns, columns, scale=1 / temperature
        )[:2]
    else:
        rows, columns = u[None, None], v[None, None]
        mean, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            rows, columns, columns, scale=1 / temperature
        )
    own = v[: len(q)]
    loss = (lse.reshape(-1)[: len(q)] - (u * own).sum(1) / temperature).mean() * (2 * temperature)
    du = (mean[0, 0].float() - own) * (2 / len(q))
    return loss, (du - (du * u).sum(1, keepdim=True) * u) / norm
