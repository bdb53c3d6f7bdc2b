"""Every configuration of the LARS kernels."""

from __future__ import annotations

import itertools
from typing import Any

import triton.language as tl

from benchmarks.aot.machine_code import AotCase
from fastmoco_kernels.lars.launch import FOLD_BLOCK, NUM_WARPS
from fastmoco_kernels.lars.triton_kernels import (
    lars_fold_kernel,
    lars_norms_kernel,
    lars_update_kernel,
)
from fastmoco_kernels.tables import CHUNK


def aot_cases() -> list[AotCase]:
    """Every configuration of the three kernels."""
    return [
        case for word in ("fp32", "fp64") for case in (*_norm_cases(word), *_update_cases(word))
    ]


_TABLE = {
    "pointers_ptr": "*i64",
    "sizes_ptr": "*i64",
    "chunk_rows_ptr": "*i32",
    "chunk_starts_ptr": "*i64",
}
_CONSTANTS = {"WORD": "constexpr", "CHUNK": "constexpr"}


def _case(
    name: str, kernel: Any, signature: dict[str, str], constexprs: dict[str, Any], num_warps: int
) -> AotCase:
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
    norms = {
        **_TABLE,
        "partials_ptr": f"*{word}",
        "rows": "i32",
        "weight_decay": "fp64",
        **_CONSTANTS,
    }
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
    numbers = {
        "lr": "fp64",
        "momentum": "fp64",
        "weight_decay": "fp64",
        "trust_coefficient": "fp64",
    }
    cases = []
    choices = ((), ("found_inf_ptr",), ("lr_ptr",), ("found_inf_ptr", "lr_ptr"))
    for given, in_buffer in itertools.product(choices, (False, True)):
        optional = {
            name: "*fp32" if name in given else "constexpr" for name in ("found_inf_ptr", "lr_ptr")
        }
        absent: dict[str, Any] = {
            name: None for name, kind in optional.items() if kind == "constexpr"
        }
        signature = {
            **_TABLE,
            "squares_ptr": "*fp64",
            **optional,
            "rows": "i32",
            **numbers,
            **_CONSTANTS,
            "LR_IN_BUFFER": "constexpr",
        }
        words = [f"lars.update {word}", *(name.removesuffix("_ptr") for name in given)]
        name = " ".join([*words, "lr in buffer"] if in_buffer else words)
        constexprs = _constexprs(word) | absent | {"LR_IN_BUFFER": in_buffer}
        cases.append(_case(name, lars_update_kernel, signature, constexprs, NUM_WARPS))
    return cases
