"""Launches of the LARS kernels: two for the norms, one for the update, however many tensors there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fastmoco_kernels._aot import AotCase
from fastmoco_kernels.backends import device_guard
from fastmoco_kernels.lars.triton_kernels import lars_fold_kernel, lars_norms_kernel, lars_update_kernel
from fastmoco_kernels.tensors import CHUNK, pointer_table, same_layout

FOLD_BLOCK = 256
"""Partial sums that one step of the fold adds; 16.8 million elements have 8192."""
NUM_WARPS = 4
_WORDS = {torch.float32: tl.float32, torch.float64: tl.float64}


def squares_triton(params: Sequence[Tensor], grads: Sequence[Tensor], weight_decay: float) -> Tensor:
    """First pass, as `op.lars_squares`."""
    columns = [params, matching_grads(params, grads)]  # held until the launch: the table knows addresses alone
    table = pointer_table("lars_squares", columns, [_scaled(params)])
    first = params[0]
    squares = torch.empty(table.rows, 2, dtype=torch.float64, device=first.device)
    partials = torch.empty(max(table.chunks, 1), 2, dtype=first.dtype, device=first.device)
    with device_guard(first):
        if table.chunks:
            lars_norms_kernel[(table.chunks,)](
                table.pointers,
                table.sizes,
                table.chunk_rows,
                table.chunk_starts,
                partials,
                table.rows,
                weight_decay,
                WORD=_WORDS[first.dtype],
                CHUNK=table.chunk,
                num_warps=NUM_WARPS,
            )
        lars_fold_kernel[(table.rows,)](
            table.pointers, table.first_chunks, partials, squares, table.rows, BLOCK=FOLD_BLOCK, num_warps=1
        )
    return squares


def update_triton_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    squares_T2: Tensor,
    lr: Tensor,
    *,
    momentum: float,
    weight_decay: float,
    trust_coefficient: float,
    found_inf: Tensor | None,
) -> None:
    """Second pass, as `op.lars_update_`. Waits for nothing: ``lr`` is read on the device if it is there."""
    columns = [params, matching_grads(params, grads), momentum_buffers]
    table = pointer_table("lars_update_", columns, [_scaled(params)])
    if not table.chunks:
        return
    with device_guard(params[0]):
        lars_update_kernel[(table.chunks,)](
            table.pointers,
            table.sizes,
            table.chunk_rows,
            table.chunk_starts,
            squares_T2,
            found_inf,
            lr if lr.is_cuda else None,
            table.rows,
            0.0 if lr.is_cuda else lr.item(),
            momentum,
            weight_decay,
            trust_coefficient,
            WORD=_WORDS[params[0].dtype],
            CHUNK=table.chunk,
            num_warps=NUM_WARPS,
        )
    torch.autograd.graph.increment_version([*params, *momentum_buffers])


def matching_grads(params: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """The gradients in their parameters' dtype and memory order; what fits already is passed on."""
    return [
        grad if grad.dtype == param.dtype and same_layout(param, grad) else torch.empty_like(param).copy_(grad)
        for param, grad in zip(params, grads, strict=True)
    ]


def _scaled(params: Sequence[Tensor]) -> list[Tensor | None]:
    """The column that marks tensors of two or more dimensions."""
    return [param if param.ndim > 1 else None for param in params]


def aot_cases() -> list[AotCase]:
    """Every configuration of the three kernels."""
    return [case for word in ("fp32", "fp64") for case in (*_norm_cases(word), *_update_cases(word))]


_TABLE = {"pointers_ptr": "*i64", "sizes_ptr": "*i64", "chunk_rows_ptr": "*i32", "chunk_starts_ptr": "*i64"}
_CONSTANTS = {"WORD": "constexpr", "CHUNK": "constexpr"}


def _case(name: str, kernel: Any, signature: dict[str, str], constexprs: dict[str, Any], num_warps: int) -> AotCase:
    """There is one configuration of each kernel, so each is the default everywhere."""
    return AotCase(
        name=name,
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=num_warps,
        num_stages=3,
        default_on=(80, 90, 100),
    )


def _constexprs(word: str) -> dict[str, Any]:
    return {"WORD": tl.float32 if word == "fp32" else tl.float64, "CHUNK": CHUNK}


def _norm_cases(word: str) -> list[AotCase]:
    """The two kernels of the first pass."""
    norms = {**_TABLE, "partials_ptr": f"*{word}", "rows": "i32", "weight_decay": "fp64", **_CONSTANTS}
    fold = {
        "pointers_ptr": "*i64",
        "first_chunks_ptr": "*i32",
        "partials_ptr": f"*{word}",
        "squares_ptr": "*fp64",
        "rows": "i32",
        "BLOCK": "constexpr",
    }
    return [
        _case(f"lars.norms {word}", lars_norms_kernel, norms, _constexprs(word), NUM_WARPS),
        _case(f"lars.fold {word}", lars_fold_kernel, fold, {"BLOCK": FOLD_BLOCK}, 1),
    ]


def _update_cases(word: str) -> list[AotCase]:
    """The second pass, without and with what it may be given as a tensor on the device."""
    numbers = {"lr": "fp64", "momentum": "fp64", "weight_decay": "fp64", "trust_coefficient": "fp64"}
    cases = []
    for given in ((), ("found_inf_ptr",), ("lr_ptr",), ("found_inf_ptr", "lr_ptr")):
        optional = {name: "*fp32" if name in given else "constexpr" for name in ("found_inf_ptr", "lr_ptr")}
        absent: dict[str, Any] = {name: None for name, kind in optional.items() if kind == "constexpr"}
        signature = {**_TABLE, "squares_ptr": "*fp64", **optional, "rows": "i32", **numbers, **_CONSTANTS}
        name = " ".join([f"lars.update {word}", *(name.removesuffix("_ptr") for name in given)])
        cases.append(_case(name, lars_update_kernel, signature, _constexprs(word) | absent, NUM_WARPS))
    return cases
