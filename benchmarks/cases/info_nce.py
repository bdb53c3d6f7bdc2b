"""The InfoNCE loss, one direction or both, forward and gradient of the queries: one pass against
other implementations.

Contenders: `naive` (normalise, matmul, / temperature, cross-entropy, autograd; fp16 autocast on
CUDA as moco-v3 runs it), `compiled` (the same through torch.compile), `sdpa_v_is_k` (attention with
values = keys and an explicit gradient: the one-pass idea without a kernel), `chunked` and `triton`
(this project's).
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
    "device": "auto",
    "compile": 1,
    "directions": 1,
}
QUICK = {"rows": 1024, "compile": 0}
CHECKED_ROWS = 1024
"""Queries whose gradient is compared with float64, because all would need
float64 logits of rows x keys."""


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Measure.

    Args:
        options: `rows` B; `keys` N (0: as many); `dim` D; `temperature`; `rounds`; `device` (auto:
            CUDA if there is a device); `compile` (0 omits the compiled contender); `directions` 1,
            or 2 as in MoCo v3, which this project computes in one launch and the others one after
            the other.

    Returns:
        As `benchmarks.contest.contest`, with FLOPs and bytes of the one-pass
        kernels, and the size of q.
    """
    name = options["device"]
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    )
    B, D, temperature = options["rows"], options["dim"], options["temperature"]
    N = options["keys"] or B
    if N < B:
        raise ValueError(f"keys={N} below rows={B}: every query needs its positive")
    directions = options["directions"]
    if directions not in (1, 2):
        raise ValueError(f"directions={directions}: must be 1 or 2")
    inputs = []
    for seed in range(directions):
        q, keys = pairs(N, D, 0.93, 0.8, device, seed=seed)
        inputs.append((q[:B].contiguous(), keys))
    subject = "triton" if device.type == "cuda" else "chunked"
    result = contest(
        _contenders(inputs, temperature, compiled=bool(options["compile"])),
        subject=subject,
        device=device,
        rounds=options["rounds"],
    )
    work = {
        "flops": flops(B, N, D, directions=directions),
        "bytes": bytes_moved(B, N, D, directions=directions),
    }
    result["flops"] = work["flops"]
    result["bytes"] = {"q": inputs[0][0].nbytes, "one_pass": work["bytes"]}
    return result | {
        "work": {"flops": work["flops"], "ms": result.get("milliseconds", {}).get(subject)}
    }


Inputs = list[tuple[Tensor, Tensor]]
"""Queries and keys of each direction."""
Gradients = Callable[[Inputs], tuple[Tensor, list[Tensor]]]
"""Loss of all directions and the gradients of their queries."""


def _contenders(inputs: Inputs, temperature: float, *, compiled: bool) -> list[Contender]:
    cuda = inputs[0][0].is_cuda
    naive = partial(naive_loss, temperature=temperature)
    # bf16 and the fp16 of autocast round operands; float32 on a CPU does not
    limits = {"loss": 2e-3, "gradient": 2e-2} if cuda else {"loss": 1e-5, "gradient": 1e-5}
    whole = [_truth(q, keys, temperature) for q, keys in inputs]
    exact = sum(loss for loss, _ in whole)

    def one(name: str, gradients: Gradients, skipped: str = "") -> Contender:
        def errors() -> dict[str, float]:
            # Rows are independent: compare the first rows of the whole call,
            # whose loss is a mean over all of them.
            loss, found = gradients(inputs)
            parts = [
                relative_error(dq[: len(first)], first)
                for dq, (_, first) in zip(found, whole, strict=True)
            ]
            return {"loss": relative_error(loss, torch.as_tensor(exact)), "gradient": max(parts)}

        return Contender(
            name=name, call=lambda: gradients(inputs), errors=errors, limits=limits, skipped=skipped
        )

    def of(loss: Callable[..., Tensor], scale: float = 1.0) -> Gradients:
        """The loss of each direction, one after the other. fp16 needs a scale,
        or its gradients are flushed to zero.
        """

        def call(pairs: Inputs) -> tuple[Tensor, list[Tensor]]:
            leaves = [q.detach().requires_grad_() for q, _ in pairs]
            value = sum(loss(q, keys) * scale for q, (_, keys) in zip(leaves, pairs, strict=True))
            assert isinstance(value, Tensor)
            found = torch.autograd.grad(value, leaves)
            return value.detach() / scale, [dq / scale for dq in found] if scale != 1 else list(
                found
            )

        return call

    def ours(backend: str) -> Gradients:
        if len(inputs) == 1:
            return of(partial(info_nce_loss, temperature=temperature, backend=backend))

        def call(pairs: Inputs) -> tuple[Tensor, list[Tensor]]:
            (q1, k2), (q2, k1) = ((q.detach().requires_grad_(), keys) for q, keys in pairs)
            loss = symmetric_info_nce_loss(
                q1, k2, q2, k1, temperature=temperature, backend=backend
            ).loss
            return loss.detach(), list(torch.autograd.grad(loss, (q1, q2)))

        return call

    def sdpa(pairs: Inputs) -> tuple[Tensor, list[Tensor]]:
        found = [sdpa_loss_and_gradient(q, keys, temperature) for q, keys in pairs]
        return torch.stack([loss for loss, _ in found]).sum(), [dq for _, dq in found]

    no_compiler = not cuda and shutil.which("g++") is None
    reason = (
        "compile=0" if not compiled else "torch.compile needs a C++ compiler" if no_compiler else ""
    )
    scale = LOSS_SCALE if cuda else 1.0
    return [
        one("naive", of(naive, scale)),
        one("compiled", of(torch.compile(naive), scale), reason),
        one("sdpa_v_is_k", sdpa),
        one("chunked", ours("chunked")),
        one("triton", ours("triton"), "" if cuda else "needs a CUDA device"),
    ]


def _truth(q: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Loss over all queries and gradient of the first ones, in float64, a block at a time."""
    total, exact_keys = torch.zeros((), dtype=torch.float64, device=q.device), keys.double()
    first = None
    for start in range(0, len(q), CHECKED_ROWS):
        block = q[start : start + CHECKED_ROWS].double()
        exact = partial(
            info_nce_reference, keys_ND=exact_keys, temperature=temperature, positive_offset=start
        )
        loss, dq = gradient_of(exact, block)
        total += loss * (len(block) / len(q))
        first = dq * (len(block) / len(q)) if first is None else first
    assert first is not None
    return total, first


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
