"""Every configuration of the soft cross-entropy."""

from __future__ import annotations

from typing import Any

from benchmarks.aot.machine_code import AotCase
from fastmoco_kernels.soft_cross_entropy.launch import OPTIONS, Tile, tile_of
from fastmoco_kernels.soft_cross_entropy.triton_kernels import (
    soft_cross_entropy_gradient_kernel,
    soft_cross_entropy_target_kernel,
    soft_cross_entropy_value_kernel,
)

_KERNELS = {
    "target": soft_cross_entropy_target_kernel,
    "value": soft_cross_entropy_value_kernel,
    "gradient": soft_cross_entropy_gradient_kernel,
}
_DINO = {"SOFTMAX": True, "CENTRED": True, "Q": 2}
_SWAV = {"SOFTMAX": False, "CENTRED": False, "Q": 2}
_OTHERS = (
    {"SOFTMAX": True, "CENTRED": False, "Q": 2},
    {"SOFTMAX": True, "CENTRED": True, "Q": 10},
    {"SOFTMAX": False, "CENTRED": False, "Q": 1},
)
_INTEGERS, _NUMBERS = ("B", "K"), ("scale", "target_scale", "factor")


def aot_cases() -> list[AotCase]:
    """DINO's and SwAV's calls in the types that they have; other targets at DINO's width.

    Types are those of logits and targets. The width decides the tile only.
    """
    cases: dict[str, AotCase] = {}
    wide, prototypes, narrow = (tile_of(K, 2) for K in (65536, 3000, 100))
    calls = [
        (_DINO, wide, ("bf16", "bf16")),
        (_DINO, wide, ("bf16", "fp32")),
        (_DINO, wide, ("fp16", "fp16")),
        (_DINO, wide, ("fp32", "fp32")),
        (_SWAV, prototypes, ("fp32", "fp32")),
        (_SWAV, narrow, ("fp32", "fp32")),
        *((other, tile_of(65536, other["Q"]), ("bf16", "fp32")) for other in _OTHERS),
    ]
    for flags, tile, types in calls:
        for way in _KERNELS:
            for incoming in (False, True) if way == "gradient" else (False,):
                if way != "target" or flags["SOFTMAX"]:
                    case = _case(way, types, flags, tile, incoming)
                    cases.setdefault(case.name, case)
    return list(cases.values())


def _case(
    way: str, types: tuple[str, str], flags: dict[str, Any], tile: Tile, incoming: bool
) -> AotCase:
    """One configuration; types by the names of the arguments."""
    kernel = _KERNELS[way]
    logits, targets = types
    kinds = {"logits_ptr": logits, "gradient_ptr": logits, "targets_ptr": targets}
    scalars = dict.fromkeys(_INTEGERS, "i32") | dict.fromkeys(_NUMBERS, "fp32")
    signature = {
        name: f"*{kinds.get(name, 'fp32')}"
        if name.endswith("_ptr")
        else scalars.get(name, "constexpr")
        for name in kernel.arg_names
    }
    constants = {**flags, "INCOMING": incoming, "BLOCK": tile.block}
    shown = " ".join(name for name in ("SOFTMAX", "CENTRED", "INCOMING") if constants[name])
    name = (f"soft_cross_entropy.{way}", "/".join(types), f"Q={flags['Q']}", shown)
    shape = (f"block {tile.block}", f"w{tile.warps}")
    return AotCase(
        name=" ".join(filter(None, (*name, *shape))),
        kernel=kernel,
        signature=signature,
        constexprs={k: v for k, v in constants.items() if k in kernel.arg_names},
        num_warps=tile.warps,
        num_stages=3,
        default_on=(80, 90, 100),
        aligned=tuple(name for name in signature if name.endswith("_ptr")),
        fp_fusion=OPTIONS["enable_fp_fusion"],
        quick=flags in (_DINO, _SWAV) and types in (("bf16", "fp32"), ("fp32", "fp32")),
    )
