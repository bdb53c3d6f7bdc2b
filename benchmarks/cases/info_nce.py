"""The InfoNCE loss of one direction, forward and gradient of the queries: one pass against what others do.

Contenders: ``naive`` (normalise, matmul, / temperature, cross-entropy, autograd; fp16 autocast on CUDA as moco-v3 runs it),
``compiled`` (the same through torch.compile), ``sdpa_v_is_k`` (attention with values = keys, gradient by hand: the one-pass
idea without a kernel), ``chunked`` and ``triton`` (this project's).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from benchmarks.accuracy import LOSS_SCALE, gradient_of, pairs
from benchmarks.contest import Contender, contest, relative_error
from fastmoco_kernels import info_nce_loss
from fastmoco_kernels.info_nce.cost import bytes_moved, flops
from fastmoco_kernels.info_nce.reference import info_nce_reference

NAME = "info_nce"
DEFAULTS = {"rows": 8192, "keys": 0, "dim": 256, "temperature": 0.2, "rounds": 5, "device": "auto", "compile": 1}
CHECKED_ROWS = 1024
"""Queries whose gradient is compared with float64: all of them would need float64 logits of rows x keys."""
Loss = Callable[[Tensor, Tensor], Tensor]


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Measure.

    Args:
        options: ``rows`` B; ``keys`` N (0: as many); ``dim`` D; ``temperature``; ``rounds``; ``device`` (auto: CUDA where
            there is one); ``compile`` (0 leaves the torch.compile'd contender out).

    Returns:
        As `benchmarks.contest.contest`, with the FLOPs and bytes that the one-pass kernels need, and the size of q.
    """
    name = options["device"]
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    B, D, temperature = options["rows"], options["dim"], options["temperature"]
    N = options["keys"] or B
    if N < B:
        raise ValueError(f"keys={N} below rows={B}: every query needs its positive")
    q, keys = pairs(N, D, 0.93, 0.8, device)
    q = q[:B].contiguous()
    subject = "triton" if device.type == "cuda" else "chunked"
    result = contest(
        _contenders(q, keys, temperature, compiled=bool(options["compile"])),
        subject=subject,
        device=device,
        rounds=options["rounds"],
    )
    result["subject"] = subject
    result["flops"] = flops(B, N, D)
    result["bytes"] = {"q": q.nbytes, "one_pass": bytes_moved(B, N, D)}
    return result


def _contenders(q: Tensor, keys: Tensor, temperature: float, *, compiled: bool) -> list[Contender]:
    cuda = q.is_cuda
    naive = partial(naive_loss, temperature=temperature)
    # bf16 and the fp16 of autocast round operands; float32 on a CPU does not
    limits = {"loss": 2e-3, "gradient": 2e-2} if cuda else {"loss": 1e-5, "gradient": 1e-5}
    whole = _truth(q, keys, temperature)

    def one(name: str, gradient: Callable[[Tensor], tuple[Tensor, Tensor]], skipped: str = "") -> Contender:
        def errors() -> dict[str, float]:
            # Rows do not know of each other: the first rows of the whole call, whose loss is a mean over all of them.
            loss, dq = gradient(q)
            return {"loss": relative_error(loss, whole[0]), "gradient": relative_error(dq[: len(whole[1])], whole[1])}

        return Contender(name=name, call=lambda: gradient(q), errors=errors, limits=limits, skipped=skipped)

    def of(loss: Loss) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        return lambda x: gradient_of(lambda y: loss(y, keys), x)

    def scaled(loss: Loss) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """With a loss scale, as fp16 is run: without one the gradient of the logits is flushed to zero."""
        scale = LOSS_SCALE if cuda else 1.0

        def call(x: Tensor) -> tuple[Tensor, Tensor]:
            value, gradient = gradient_of(lambda y: loss(y, keys) * scale, x)
            return value / scale, gradient / scale

        return call

    no_compiler = not cuda and shutil.which("g++") is None
    reason = "compile=0" if not compiled else "torch.compile needs a C++ compiler" if no_compiler else ""
    return [
        one("naive", scaled(naive)),
        one("compiled", scaled(torch.compile(naive)), reason),
        one("sdpa_v_is_k", lambda x: sdpa_loss_and_gradient(x, keys, temperature)),
        one("chunked", of(partial(info_nce_loss, temperature=temperature, backend="chunked"))),
        one(
            "triton",
            of(partial(info_nce_loss, temperature=temperature, backend="triton")),
            "" if cuda else "needs a CUDA device",
        ),
    ]


def _truth(q: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Loss over all queries and gradient of the first ones, in float64, a block at a time."""
    total, exact_keys = torch.zeros((), dtype=torch.float64, device=q.device), keys.double()
    first = None
    for start in range(0, len(q), CHECKED_ROWS):
        block = q[start : start + CHECKED_ROWS].double()
        exact = partial(info_nce_reference, keys_ND=exact_keys, temperature=temperature, positive_offset=start)
        loss, dq = gradient_of(exact, block)
        total += loss * (len(block) / len(q))
        first = dq * (len(block) / len(q)) if first is None else first
    assert first is not None
    return total, first


def naive_loss(q: Tensor, keys: Tensor, *, temperature: float) -> Tensor:
    """The formula as everyone writes it, under fp16 autocast on CUDA as moco-v3 runs it."""
    with torch.autocast(q.device.type, dtype=torch.float16, enabled=q.is_cuda):
        logits = normalize(q, dim=1) @ normalize(keys, dim=1).T / temperature
        return cross_entropy(logits, torch.arange(len(q), device=q.device)) * (2 * temperature)


@torch.no_grad()
def sdpa_loss_and_gradient(q: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Flash attention with values = keys gives the softmax's mean key and logsumexp: loss and gradient without a kernel."""
    norm = q.norm(dim=1, keepdim=True)
    u, v = q / norm, normalize(keys, dim=1)
    if q.is_cuda:
        rows, columns = u.bfloat16()[None, None], v.bfloat16()[None, None]
        mean, lse = torch.ops.aten._scaled_dot_product_flash_attention(rows, columns, columns, scale=1 / temperature)[
            :2
        ]
    else:
        rows, columns = u[None, None], v[None, None]
        mean, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            rows, columns, columns, scale=1 / temperature
        )
    own = v[: len(q)]
    loss = (lse.reshape(-1)[: len(q)] - (u * own).sum(1) / temperature).mean() * (2 * temperature)
    du = (mean[0, 0].float() - own) * (2 / len(q))
    return loss, (du - (du * u).sum(1, keepdim=True) * u) / norm
